# SPDX-License-Identifier: Apache-2.0
"""The QEMU process that is the lab's machine: its command line, its console, its end.

Owns the process (in a group of its own, told by the kernel to die with us) and a thread that keeps the console's last
bytes. The channel to the agent is an inherited socket, so nothing is left in the file system.
"""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.lab.cache import Image
from pyvmm.lab.frames import PORT_NAME
from pyvmm.lab.shares import Share
from pyvmm.labenv import COUNTS

PROGRAM = "qemu-system-aarch64"
INSTALL = "apt install qemu-system-arm"
OLDEST = (7, 2)  # Debian 12's; older ones are not known to run a pKVM host
CONSOLE_BYTES = 64 * 1024
ENDING_SECONDS = 5.0  # from QEMU's closing the channel to its end

MODES = {
    "protected": ("cortex-a72", "kvm-arm.mode=protected"),
    "nvhe": ("cortex-a72", "kvm-arm.mode=nvhe"),
    "vhe": ("neoverse-n1", ""),
}
"""CPU and kernel parameter of each of KVM's modes.

pKVM gets a CPU without VHE. On one with it the hypervisor runs in the EL2&0 regime (hVHE), where QEMU 7.2 was seen to
miss invalidations of its TLB: EL2 scrubbed other pages than it meant to, and a guest's came back to the host as they
were.
"""


@dataclass(frozen=True, slots=True)
class LabOptions:
    """What machine the lab is. ``memory`` is in MiB, ``boot_timeout`` in seconds.

    ``icount`` makes time count instructions (one CPU only): measurements repeat, wall time suffers.
    """

    mode: str = "protected"
    cpus: int = 2
    memory: int = 2048
    icount: bool = False
    boot_timeout: float = 180.0
    verbose: bool = False
    """Copy the lab's console to stderr."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"no lab mode {self.mode!r}", hint=f"one of {', '.join(MODES)}")
        if self.icount and self.cpus != 1:
            raise UsageError(f"icount counts the instructions of one CPU, not of {self.cpus}")
        if not 1 <= self.cpus <= 8:
            raise UsageError(f"a lab has 1 to 8 CPUs, not {self.cpus}")
        if self.memory < 512:
            raise UsageError(f"{self.memory} MiB are too little for the lab", hint="512 at least, 2048 if not said")


class LabError(PyvmmError):
    """The lab's machine did not start, or ended too early: how it was started, and the last of its console."""

    def __init__(self, what: str, command: list[str], console: str, *, hint: str | None = None) -> None:
        tail = "".join(f"\n  | {line}" for line in _telling_lines(console)) or " (nothing)"
        super().__init__(f"{what}\n  started as: {shlex.join(command)}\n  its console:{tail}", hint=hint)
        self.command = command
        self.console = console


def _telling_lines(console: str) -> list[str]:
    """Give the last lines that tell something: a panic's own trace says less than what came before it."""
    lines = console.splitlines()
    end = next((i + 1 for i, line in enumerate(lines) if "Kernel panic" in line), len(lines))
    return lines[max(end - 20, 0) : end]


def require_qemu() -> str:
    """Give QEMU's path. HostError where it is missing or too old, saying what to install."""
    return _find_qemu()[0]


def _find_qemu() -> tuple[str, str]:
    """Give QEMU's path and version."""
    path = shutil.which(PROGRAM)
    if path is None:
        raise HostError(f"{PROGRAM} is not installed", hint=INSTALL)
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{path} does not run: {error}", hint=f"{INSTALL} --reinstall") from error
    found = re.search(r"version (\d+)\.(\d+)\S*", answer)
    if found is None:
        raise HostError(f"{path} does not say its version: {answer[:80]!r}", hint=f"{INSTALL} --reinstall")
    if (int(found[1]), int(found[2])) < OLDEST:
        raise HostError(
            f"{path} is version {found[1]}.{found[2]}; the lab needs {OLDEST[0]}.{OLDEST[1]} or newer", hint=INSTALL
        )
    return path, found[0].removeprefix("version ")


def command_line(program: str, image: Image, options: LabOptions, shares: list[Share], channel: int) -> list[str]:
    """Give QEMU's arguments; ``channel`` is the inherited socket's number."""
    cpu, parameter = MODES[options.mode]
    if options.icount:
        cpu += ",cntfrq=1000000000"  # a tick of the counter is an instruction
    append = [
        parameter,
        "mitigations=off lsm= audit=0 panic=-1",  # nothing that would be measured along, and no hanging
        "nokaslr kpti=off cryptomgr.notests=1 initcall_blacklist=load_system_certificate_list",  # boot time
        "console=ttyAMA0",
        f"{COUNTS}=instructions" if options.icount else "",  # for whoever reads times in there
        "" if options.verbose else "loglevel=4",
    ]
    arguments = [
        program,
        "-M",
        "virt,virtualization=on,gic-version=3",
        "-cpu",
        cpu,
        "-smp",
        str(options.cpus),
        "-m",
        str(options.memory),
        "-kernel",
        str(image.kernel),
        "-initrd",
        str(image.root),
        "-append",
        " ".join(filter(None, append)),
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
        "-device",
        "virtio-serial-pci",
        "-chardev",
        f"socket,id=agent,fd={channel}",
        "-device",
        f"virtserialport,chardev=agent,name={PORT_NAME}",
    ]
    if options.icount:
        arguments += ["-icount", "shift=0,sleep=off", "-seed", "1"]
    for share in shares:
        readonly = ",readonly=on" if share.readonly else ""
        path = str(share.source).replace(",", ",,")
        arguments += [
            "-virtfs",
            f"local,path={path},mount_tag={share.tag},security_model=none,multidevs=remap{readonly}",
        ]
    return arguments


class Qemu:
    """A running QEMU. ``channel`` is our end of the agent's port."""

    def __init__(self, image: Image, options: LabOptions, shares: list[Share]) -> None:
        program, self.version = _find_qemu()
        self.channel, theirs = socket.socketpair()
        with theirs:  # QEMU has it then
            self.command = command_line(program, image, options, shares, theirs.fileno())
            try:
                self._process = subprocess.Popen(
                    # Whatever ends us ends QEMU: the kernel sends it the signal.
                    ["setpriv", "--pdeathsig", "KILL", "--", *self.command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # a ^C at the terminal is for us, not for it
                )
            except OSError as error:
                self.channel.close()
                raise HostError(f"QEMU could not be started: {error}", hint="apt install util-linux") from error
        self._console: deque[bytes] = deque()
        self._reader = threading.Thread(
            target=self._keep_console,
            args=(self._process.stdout, options.verbose),
            name="pyvmm-lab-console",
            daemon=True,
        )
        self._reader.start()

    def _keep_console(self, stream: BinaryIO, verbose: bool) -> None:
        kept = 0
        while data := stream.read1(4096):  # type: ignore[attr-defined]
            if verbose:
                sys.stderr.buffer.write(data)
                sys.stderr.buffer.flush()
            self._console.append(data)
            kept += len(data)
            while kept > CONSOLE_BYTES:
                kept -= len(self._console.popleft())

    @property
    def pid(self) -> int:
        return self._process.pid

    def console(self) -> str:
        """Give the console's last 64 KiB."""
        return b"".join(list(self._console)).decode(errors="replace").replace("\r", "")

    def failed(self, what: str, *, ended: bool, hint: str | None = None) -> LabError:
        """Give the error that tells this machine's story; it is stopped first, so that the story is whole.

        ``ended`` says that the machine has left the channel by itself: how QEMU ended then belongs to the story.
        """
        status = None
        if ended:
            with suppress(subprocess.TimeoutExpired):
                status = self._process.wait(ENDING_SECONDS)
        self.stop()
        if status is not None and status < 0:
            what += f" (QEMU was killed by signal {-status})"
        elif status:
            what += f" (QEMU exited with status {status})"
        return LabError(what, self.command, self.console(), hint=hint)

    def stop(self) -> None:
        """Kill and reap QEMU; its memory is all it holds. May be called again."""
        self._process.kill()
        self._process.wait()
        self._reader.join(timeout=5)
        if self._process.stdout is not None:
            self._process.stdout.close()
        with suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for it in another thread
        self.channel.close()
