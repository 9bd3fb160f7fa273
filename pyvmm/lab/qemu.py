# SPDX-License-Identifier: Apache-2.0
"""The QEMU process that is the lab's machine: its command line, its console, its end.

Owns the process (in its own process group; the kernel kills it when this one ends) and a thread that keeps the last
bytes of the console. The channel to the agent is an inherited socket, so nothing is left in the file system.

A machine that can be saved has its RAM in a file, a monitor, and a fixed number of 9p devices. Each device shows one
directory or none.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.lab import kernels
from pyvmm.lab.cache import Image
from pyvmm.lab.frames import PORT_NAME
from pyvmm.lab.monitor import Monitor
from pyvmm.lab.shares import Share
from pyvmm.labenv import COUNTS

PROGRAM = "qemu-system-aarch64"
INSTALL = "apt install qemu-system-arm"
OLDEST = (7, 2)  # the version in Debian 12; older ones are not known to run a pKVM host
CONSOLE_BYTES = 64 * 1024
ENDING_SECONDS = 5.0  # from QEMU's closing the channel to its end

NO_EL2 = "no-el2"
MODES = {"protected": "kvm-arm.mode=protected", "nvhe": "kvm-arm.mode=nvhe", "vhe": "", NO_EL2: ""}
"""Kernel parameter of each of KVM's modes, and of a machine whose kernel was started without EL2."""

WITH_VHE = "neoverse-n1"
WITHOUT_VHE = "cortex-a72"
WITHOUT_VHE_16K = "cortex-a35"
"""The CPU for a kernel with pages of 16 KiB, which QEMU's cortex-a72 does not have."""
RIGHT_HVHE = (8, 2)
"""The first version of QEMU that emulates pKVM rightly on a CPU with VHE, as boards have it.

There the hypervisor runs in the EL2&0 regime (hVHE). QEMU 7.2 was seen to miss invalidations of its TLB: EL2 scrubbed
other pages than it meant to, and a guest's came back to the host as they were.
"""

BOOTS = ("saved", "fresh")
SHARES = 8
"""9p devices of a machine that can be saved: its devices are the same whatever it is shown."""


@dataclass(frozen=True, slots=True)
class LabOptions:
    """The lab's machine. ``memory`` is in MiB, ``boot_timeout`` in seconds.

    ``icount`` makes time count instructions (one CPU only): measurements repeat, but runs take longer.
    """

    mode: str = "protected"
    cpus: int = 2
    memory: int = 2048
    icount: bool = False
    boot_timeout: float = 180.0
    verbose: bool = False
    """Copy the lab's console to stderr."""
    boot: str = BOOTS[0]
    """``saved``: restore the lab from a saved boot where that can be done (see saved). ``fresh``: boot it."""
    gic: int = 3
    """Version of the host's interrupt controller: 3, or 2 as on a Raspberry Pi 4. 0: KVM has none for guests."""
    its: bool = True
    """Whether a GICv3 of the host has an ITS."""
    cpu: str | None = None
    """QEMU's name of the CPU, such as ``neoverse-n1`` or ``max``; where it is None, by the mode, QEMU's version and the
    kernel's pages."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"no lab mode {self.mode!r}", hint=f"one of {', '.join(MODES)}")
        if self.cpu is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.cpu):
            raise UsageError(f"{self.cpu!r} is not a CPU's name", hint=f"{PROGRAM} -cpu help lists them")
        if self.gic not in (0, 2, 3):
            raise UsageError(f"no interrupt controller GICv{self.gic}", hint="2, 3, or 0: none for guests")
        if self.boot not in BOOTS:
            raise UsageError(f"no way to start a lab {self.boot!r}", hint=f"one of {', '.join(BOOTS)}")
        if self.icount and self.cpus != 1:
            raise UsageError(f"icount counts the instructions of one CPU, not of {self.cpus}")
        if not 1 <= self.cpus <= 8:
            raise UsageError(f"a lab has 1 to 8 CPUs, not {self.cpus}")
        if self.memory < 512:
            raise UsageError(f"{self.memory} MiB are too little for the lab", hint="512 at least, 2048 if not said")


class LabError(PyvmmError):
    """The lab's machine did not start, or ended too early. Has its command line, and the end of its console."""

    def __init__(self, what: str, command: list[str], console: str, *, hint: str | None = None) -> None:
        tail = "".join(f"\n  | {line}" for line in _telling_lines(console)) or " (nothing)"
        super().__init__(f"{what}\n  started as: {shlex.join(command)}\n  its console:{tail}", hint=hint)
        self.command = command
        self.console = console


def _telling_lines(console: str) -> list[str]:
    """Return the last informative lines: those before a panic say more than its trace."""
    lines = console.splitlines()
    end = next((i + 1 for i, line in enumerate(lines) if "Kernel panic" in line), len(lines))
    return lines[max(end - 20, 0) : end]


def require_qemu() -> str:
    """Return QEMU's path. If it is missing or too old, raises HostError with what to install."""
    path = find_qemu()
    qemu_version(path)
    return path


def find_qemu() -> str:
    """Return QEMU's path. Raises HostError if it is not installed."""
    path = shutil.which(PROGRAM)
    if path is None:
        raise HostError(f"{PROGRAM} is not installed", hint=INSTALL)
    return path


def qemu_version(path: str) -> str:
    """Return QEMU's version. Raises HostError if QEMU prints none, or if it is too old."""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{path} does not run: {error}", hint=f"{INSTALL} --reinstall") from error
    found = re.search(r"version (\d+\.\d+\S*)", answer)
    if found is None:
        raise HostError(f"{path} does not say its version: {answer[:80]!r}", hint=f"{INSTALL} --reinstall")
    major, minor = _numbers(found[1])
    if (major, minor) < OLDEST:
        raise HostError(
            f"{path} is version {major}.{minor}; the lab needs {OLDEST[0]}.{OLDEST[1]} or newer", hint=INSTALL
        )
    return found[1]


def _numbers(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


@dataclass(frozen=True, slots=True)
class Ram:
    """The file with a machine's RAM, and whether the machine starts from its contents.

    A booting machine writes to the file. A restored one maps it privately, so the file does not change.
    """

    file: int
    restored: bool
    empty: Path
    """What 9p devices show that have nothing to show."""


def command_line(
    program: str,
    version: str,
    image: Image,
    options: LabOptions,
    shares: Sequence[Share],
    channel: int,
    ram: Ram | None = None,
    monitor: int = -1,
    tree: int = -1,
) -> list[str]:
    """Return the arguments of ``program``, a QEMU of ``version``.

    ``channel``, with ``ram`` ``monitor``, and where the machine boots with a device tree of ours ``tree``, are the
    numbers of inherited files.
    """
    arguments = [program, "-M", _machine(options) + (",memory-backend=ram" if ram else "")]
    arguments += _parts(options, version, image)
    if ram is None or not ram.restored:
        arguments += ["-kernel", str(image.kernel), "-initrd", str(image.root), "-append", _append(options)]
        arguments += ["-dtb", f"/proc/self/fd/{tree}"] if _has_own_tree(options) else []
    arguments += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]
    arguments += ["-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,fd={channel}"]
    arguments += ["-device", f"virtserialport,chardev=agent,name={PORT_NAME}"]
    if options.icount:
        arguments += ["-icount", "shift=0,sleep=off", "-seed", "1"]
    if ram is not None:
        sharing = "off" if ram.restored else "on"
        path = f"/proc/self/fd/{ram.file}"
        arguments += ["-object", f"memory-backend-file,id=ram,size={options.memory}M,mem-path={path},share={sharing}"]
        arguments += ["-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"]
        arguments += ["-incoming", "defer"] if ram.restored else []
        shares = [*shares, *[Share(ram.empty, ram.empty, readonly=True)] * (SHARES - len(shares))]
    for number, share in enumerate(shares):
        readonly = ",readonly=on" if share.readonly else ""
        path = str(share.source).replace(",", ",,")
        arguments += [
            "-virtfs",
            f"local,path={path},mount_tag={mount_tag(number)},security_model=none,multidevs=remap{readonly}",
        ]
    return arguments


def mount_tag(number: int) -> str:
    """Return the name under which the lab mounts the share with this number."""
    return f"share{number}"


def _machine(options: LabOptions) -> str:
    el2 = "off" if options.mode == NO_EL2 else "on"
    return f"virt,virtualization={el2},gic-version={options.gic or 3}" + ("" if options.its else ",its=off")


def _parts(options: LabOptions, version: str, image: Image) -> list[str]:
    return ["-cpu", _cpu(options, version, image), "-smp", str(options.cpus), "-m", str(options.memory)]


def _has_own_tree(options: LabOptions) -> bool:
    return options.gic == 0 and options.mode != NO_EL2


def _tree(program: str, version: str, image: Image, options: LabOptions) -> int:
    """Return the file of a tree in which KVM finds no interrupt controller; the caller closes it."""
    from pyvmm.lab import hosttree  # the exception

    whole = hosttree.dump(program, _machine(options), _parts(options, version, image))
    return hosttree.into_file(hosttree.without_vgic(whole))


def _cpu(options: LabOptions, version: str, image: Image) -> str:
    cpu = options.cpu
    if cpu is None and (options.mode == "nvhe" or (options.mode == "protected" and _numbers(version) < RIGHT_HVHE)):
        cpu = WITHOUT_VHE_16K if kernels.page_of(image.kernel) == 16384 else WITHOUT_VHE
    # With icount a tick of the counter is one instruction.
    return (cpu or WITH_VHE) + (",cntfrq=1000000000" if options.icount else "")


def _append(options: LabOptions) -> str:
    words = [
        MODES[options.mode],
        "mitigations=off lsm=landlock audit=0 panic=-1",  # no background work that would be measured, and no hangs
        "nokaslr kpti=off cryptomgr.notests=1 initcall_blacklist=load_system_certificate_list",  # boot time
        "console=ttyAMA0",
        f"{COUNTS}=instructions" if options.icount else "",  # for programs in the lab that read times
        "" if options.verbose else "loglevel=4",
    ]
    return " ".join(filter(None, words))


class Qemu:
    """A running QEMU. ``channel`` is our end of the agent's port; ``monitor`` is that of QEMU itself, with ``ram``.

    ``version`` is that of ``program``.
    """

    def __init__(
        self,
        program: str,
        version: str,
        image: Image,
        options: LabOptions,
        shares: Sequence[Share] = (),
        ram: Ram | None = None,
    ) -> None:
        self.version = version
        with ExitStack() as kept, ExitStack() as given:  # what stays ours, and what QEMU has afterwards
            tree = -1
            if (ram is None or not ram.restored) and _has_own_tree(options):
                tree = _tree(program, version, image, options)
                given.callback(os.close, tree)
            self.channel, channel = socket.socketpair()
            kept.enter_context(self.channel)
            given.enter_context(channel)
            ours, monitor = socket.socketpair()
            kept.enter_context(ours)
            given.enter_context(monitor)
            self.monitor = Monitor(ours)
            kept.callback(self.monitor.close)
            inherited = [channel.fileno()]
            if ram is not None:
                inherited += [monitor.fileno(), ram.file]
            if tree >= 0:
                inherited.append(tree)
            self.command = command_line(
                program, version, image, options, shares, channel.fileno(), ram, monitor.fileno(), tree
            )
            try:
                self._process = subprocess.Popen(
                    # If this process ends, the kernel kills QEMU.
                    ["setpriv", "--pdeathsig", "KILL", "--", *self.command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=inherited,
                    start_new_session=True,  # a ^C at the terminal is for this process, not for QEMU
                )
            except OSError as error:
                raise HostError(f"QEMU could not be started: {error}", hint="apt install util-linux") from error
            kept.pop_all()
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
        """Return the console's last 64 KiB."""
        return b"".join(list(self._console)).decode(errors="replace").replace("\r", "")

    def failed(self, what: str, *, ended: bool, hint: str | None = None) -> LabError:
        """Stop the machine, and return an error with its whole history.

        ``ended`` says that the machine closed the channel itself: then the error says how QEMU ended.
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
        """Kill and reap QEMU, which holds nothing but memory. May be called again."""
        self._process.kill()
        self._process.wait()
        self._reader.join(timeout=5)
        if self._process.stdout is not None:
            self._process.stdout.close()
        with suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)  # wakes another thread that waits for it
        self.channel.close()
        self.monitor.close()
