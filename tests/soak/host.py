# SPDX-License-Identifier: Apache-2.0
"""What a host holds, as its kernel tells, in numbers that runs of guests must not change."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

DEBUGFS: Final = Path("/sys/kernel/debug")
PATIENCE: Final = 60.0
"""Seconds in which a kernel frees what nobody holds any more."""
WARNING: Final = 4
"""The least serious level of a kernel's message that is a warning (syslog(2))."""
MARK: Final = "PYVMM_SOAK"
"""In the environment of each run, and so in that of all that it starts."""


def _meminfo(name: str) -> int:
    lines = (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return next((int(value.split()[0]) for key, value in lines if key == name), 0)


def _programs() -> list[Path]:
    """Return the processes that have a program: not the kernel's own."""
    found: list[Path] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes():
                found.append(process)
    return found


def _of_each(tell: Callable[[Path], int]) -> int:
    total = 0
    for process in _programs():
        with contextlib.suppress(OSError):
            total += tell(process)
    return total


def _locked(process: Path) -> int:
    lines = (line.split() for line in (process / "status").read_text().splitlines())
    return sum(int(words[1]) for words in lines if words[0] in ("VmLck:", "VmPin:"))


def _entries(*directories: str) -> int:
    return sum(sum(map(len, (dirs, files))) for each in directories for _, dirs, files in os.walk(each))


ASKED: Final[dict[str, Callable[[], int]]] = {
    "processes": lambda: len(_programs()),
    "their threads": lambda: _of_each(lambda process: len(os.listdir(process / "task"))),
    "their descriptors": lambda: _of_each(lambda process: len(os.listdir(process / "fd"))),
    "their locked and pinned memory, KiB": lambda: _of_each(_locked),
    "Mlocked, KiB": lambda: _meminfo("Mlocked"),
    "Shmem, KiB": lambda: _meminfo("Shmem"),
    "SecPageTables (stage 2), KiB": lambda: _meminfo("SecPageTables"),
    "VMs of KVM": lambda: sum(1 for each in (DEBUGFS / "kvm").glob("*-*")),
    "unix sockets": lambda: len(Path("/proc/net/unix").read_text().splitlines()) - 1,
    "network interfaces": lambda: len(os.listdir("/sys/class/net")),
    "mounts": lambda: len(Path("/proc/self/mounts").read_text().splitlines()),
    "temporary files": lambda: _entries(tempfile.gettempdir(), "/run", "/dev/shm"),
    "taint of the kernel": lambda: int(Path("/proc/sys/kernel/tainted").read_text()),
    "kernel warnings": lambda: len(warnings()),
}


VARIES: Final = {"Shmem, KiB": 1024}
"""What a number may grow by without a leak. A lab's root is in memory, and programs keep caches there."""


def prepare() -> None:
    """Mount what tells of KVM's VMs. Needs root."""
    if not os.path.ismount(DEBUGFS):
        subprocess.run(["mount", "-t", "debugfs", "debugfs", DEBUGFS], check=False)


def held() -> dict[str, int]:
    """Return what the host holds now."""
    return {what: ask() for what, ask in ASKED.items()}


def settled(before: dict[str, int]) -> dict[str, int]:
    """Return what the host holds, as soon as that is no more than ``before``; at last what it holds anyway."""
    end = time.monotonic() + PATIENCE
    while more(now := held(), before) and time.monotonic() < end:
        time.sleep(0.2)
    return now


def more(now: dict[str, int], before: dict[str, int]) -> list[str]:
    """Return what there is more of than there was ``before``."""
    return [what for what, number in now.items() if number > before[what] + VARIES.get(what, 0)]


def warnings() -> list[str]:
    """Return the kernel's messages that are warnings or worse, as far as it still has them."""
    found: list[str] = []
    kmsg = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            try:
                record = os.read(kmsg, 8192).decode(errors="replace")
            except BlockingIOError:
                return found
            except BrokenPipeError:  # overwritten before it was read
                continue
            head, _, text = record.partition(";")
            if int(head.split(",")[0]) & 7 <= WARNING:
                found.append(text.splitlines()[0])
    finally:
        os.close(kmsg)


def marked(mark: str) -> list[int]:
    """Return the processes with this mark."""
    wanted = f"{MARK}={mark}".encode()
    found: list[int] = []
    for process in _programs():
        with contextlib.suppress(OSError):
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found
