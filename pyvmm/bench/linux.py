# SPDX-License-Identifier: Apache-2.0
"""Boot a Linux guest as a user does, in a separate process, and record the times of its stages.

All VMMs run the same kernel with the same initramfs of one line of shell, so only the VMM's cost differs. The init
prints a word on the console and powers off. The word's arrival on the VMM's stdout is the time of init.
"""

from __future__ import annotations

import compileall
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

from pyvmm import __file__ as _package
from pyvmm.bench.qemu import command
from pyvmm.cpio import CpioWriter
from pyvmm.errors import PyvmmError
from pyvmm.guest.kernels import BUSYBOX, IMAGE, directory

WORD: Final = b"PYVMM-INIT"
INIT: Final = b"#!/bin/busybox sh\necho " + WORD + b"\nexec /bin/busybox poweroff -f\n"
PARAMETERS: Final = "console=ttyAMA0 quiet panic=-1"
MEMORY: Final = 256
"""MiB."""
_TAIL: Final = 400


_SCRIPT: Final = "import sys\nfrom pyvmm.cli import main\nsys.exit(main())\n"
_LACKING: Final = """\
from pyvmm.kvm import fd, stand_in
from pyvmm.uapi import kvm_cap
fd.KERNEL = stand_in.Lacking(kvm_cap.{})
"""


@dataclass(frozen=True, slots=True)
class Files:
    """A named kernel, the initramfs to start with it, and the beginning of pyvmm's command."""

    kernel: str
    initrd: str
    program: tuple[str, ...]


def install(folder: str, *, lacking: str = "") -> tuple[str, ...]:
    """Install this pyvmm in ``folder``, compiled and with a script, as pip does; return the beginning of its command.

    In a lab the modules are on a file system of the workstation, where opening each costs several messages. The
    installed copy is on the host's own file system. ``lacking`` names a capability (KVM_CAP_*) to hide from pyvmm.
    """
    site = os.path.join(folder, "site")
    # A lab may list what it does not find: what another has compiled since it looked.
    shutil.copytree(os.path.dirname(_package), os.path.join(site, "pyvmm"), ignore=_unseen)
    compileall.compile_dir(site, quiet=2)
    script = os.path.join(site, "main.py")
    with open(script, "w") as file:
        file.write(_LACKING.format(lacking) * bool(lacking) + _SCRIPT)
    return (sys.executable, script)


def _unseen(folder: str, names: Sequence[str]) -> set[str]:
    return {name for name in names if ".pyc." in name or not os.path.exists(os.path.join(folder, name))}


@contextlib.contextmanager
def files(kernel: str, init: bytes = INIT) -> Iterator[Files]:
    """Make an initramfs of busybox and ``init``. HostError where there is no kernel of this name."""
    where = directory(kernel, None)
    archive = io.BytesIO()
    cpio = CpioWriter(archive)
    cpio.character_device("dev/console", 5, 1)
    with open(os.path.join(where, BUSYBOX), "rb") as busybox:
        cpio.file("bin/busybox", busybox.read(), mode=0o755)
    cpio.file("init", init, mode=0o755)
    cpio.finish()
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        initrd = os.path.join(folder, "initrd.cpio")
        with open(initrd, "wb") as file:
            file.write(archive.getvalue())
        yield Files(shutil.copy(os.path.join(where, IMAGE), folder), initrd, install(folder))


@dataclass(frozen=True, slots=True)
class Boot:
    """The times of a VMM's stages, in ns of CLOCK_MONOTONIC. Only pyvmm reports ``entered``, its first KVM_RUN."""

    executed: int
    entered: int
    init: int
    ended: int


def pyvmm(guest: Files, protection: str, cpus: int, *options: str, parameters: str = PARAMETERS) -> list[str]:
    """Return the command that boots ``guest``."""
    return [
        *guest.program,
        "run",
        "--log-json",
        "--protection",
        protection,
        "--cpus",
        str(cpus),
        "--mem",
        f"{MEMORY}M",
        "--params",
        parameters,
        "--initrd",
        guest.initrd,
        *options,
        guest.kernel,
    ]


def qemu(program: Sequence[str], guest: Files, cpus: int, *options: str, parameters: str = PARAMETERS) -> list[str]:
    """Return the command that boots ``guest`` under QEMU with KVM, without default devices."""
    return command(program, guest.kernel, parameters, "-initrd", guest.initrd, *options, cpus=cpus, memory=MEMORY)


def kvmtool(program: Sequence[str], guest: Files, cpus: int) -> list[str]:
    """Return the command that boots ``guest`` under kvmtool, whose console is an 8250."""
    return [
        *program,
        "run",
        *("--kernel", guest.kernel),
        *("--initrd", guest.initrd),
        *("--cpus", str(cpus)),
        *("--mem", str(MEMORY)),
        *("--irqchip", "gicv3"),
        *("--network", "mode=none"),
        *("--console", "serial"),
        *("--params", PARAMETERS.replace("ttyAMA0", "ttyS0")),
    ]


def to_init(argv: Sequence[str], seconds: float | None) -> float:
    """Run a VMM until its guest's init says the word; return the ns from its exec to then.

    Raises PyvmmError without the word after ``seconds``. None waits without limit.
    """
    executed = time.monotonic_ns()
    with _started(argv, None if seconds is None else executed + int(seconds * 1e9)) as (_, init):
        return float(init - executed)


def boot(argv: Sequence[str], seconds: float | None) -> Boot:
    """Run a VMM to its guest's end. Raises PyvmmError after ``seconds``, or if init never ran.

    None waits without limit.
    """
    with tempfile.TemporaryFile() as said:
        executed = time.monotonic_ns()
        process = _start(argv, said)
        try:
            init, console = _watch(process, None if seconds is None else executed + int(seconds * 1e9))
        finally:
            process.kill()
            process.wait()
        ended = time.monotonic_ns()
        said.seek(0)
        words = said.read()
    if process.returncode or not init:
        tail = (words or console).decode(errors="replace").strip()[-_TAIL:]
        raise PyvmmError(f"{argv[0]} ended with status {process.returncode} before the guest's init did: {tail}")
    return Boot(executed, _entered(words), init, ended)


@contextlib.contextmanager
def booted(argv: Sequence[str], seconds: float) -> Iterator[int]:
    """Run a VMM whose guest's init prints the word and stays, and yield its pid. Raises as :func:`boot`."""
    with _started(argv, time.monotonic_ns() + int(seconds * 1e9)) as (pid, _):
        yield pid


@contextlib.contextmanager
def _started(argv: Sequence[str], until: int | None) -> Iterator[tuple[int, int]]:
    """Run a VMM. Yield its pid and the time of its init's word, in ns. Kill it afterwards."""
    with tempfile.TemporaryFile() as said:
        process = _start(argv, said)
        try:
            init, console = _watch(process, until, stay=True)
            if not init:
                said.seek(0)
                words = (said.read() or console)[-_TAIL:].decode(errors="replace")
                raise PyvmmError(f"{argv[0]} ended before the guest's init said a word: {words}")
            yield process.pid, init
        finally:
            process.kill()
            process.wait()


def _start(argv: Sequence[str], said: IO[bytes]) -> subprocess.Popen[bytes]:
    # What is installed needs no other directories, which would be looked into for every module first.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, env=environment)


def _watch(process: subprocess.Popen[bytes], until: int | None, *, stay: bool = False) -> tuple[int, bytes]:
    """Wait for the process's end. Returns the word's time (0 without it) and the whole output.

    ``stay``: return once the word has come.
    """
    assert process.stdout is not None
    import select

    console, init = b"", 0
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    while poll.poll(None if until is None else max(until - time.monotonic_ns(), 0) / 1e6):
        data = os.read(process.stdout.fileno(), 1 << 16)
        if not data:
            process.wait()
            return init, console
        console += data
        if not init and WORD in console:
            init = time.monotonic_ns()
            if stay:
                return init, console
    raise PyvmmError(f"the guest did not end in time; the last it printed: {console[-_TAIL:].decode(errors='replace')}")


def _entered(words: bytes) -> int:
    return int(run_ended(words).get("started_ns", 0))


def run_ended(words: bytes) -> dict[str, Any]:
    """Return pyvmm's summary from its stderr; empty for another VMM."""
    for each in words.splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(each)
            if isinstance(event, dict) and event.get("event") == "run_ended":
                return event
    return {}
