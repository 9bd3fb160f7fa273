# SPDX-License-Identifier: Apache-2.0
"""Files, slots and mappings without pyvmm's own refusals: what experiments ask of the kernel and a machine never does.

Owns nothing: what is made here is given back by the experiment's stack or by the machine.
"""

from __future__ import annotations

import errno as _errno
import itertools
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyvmm._native import ffi, lib
from pyvmm.errors import KvmError
from pyvmm.experiment.host.syscalls import madvise
from pyvmm.kvm import libc
from pyvmm.kvm.guest_memfd import GuestMemfd
from pyvmm.memory import mman
from pyvmm.memory.address import PAGE_SIZE
from pyvmm.memory.backing import Backing, Memfd, PrivateGuestMemfd, SharedGuestMemfd
from pyvmm.memory.mman import MappingError
from pyvmm.uapi.falloc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from pyvmm.uapi.mman import MADV_HWPOISON, MAP_SHARED, PROT_READ, PROT_WRITE

if TYPE_CHECKING:
    from pyvmm.experiment.experiment import Experiment

_numbers = itertools.count(100)
"""Slot numbers that pyvmm's own table, which counts from 0, does not come to."""

ORDERS = ("mailbox", "interrupted")
"""Exits that every order to the guest costs, or that a kick makes."""


def name(errno: int) -> str:
    """Name an errno as the kernel does; ``ok`` for 0."""
    if not errno:
        return "ok"
    return "EOPNOTSUPP" if errno == _errno.EOPNOTSUPP else _errno.errorcode.get(errno, str(errno))


def answer(call: Callable[[], object]) -> str:
    """Make a call that the kernel may refuse; returns ``ok``, or the errno's name."""
    try:
        call()
    except (KvmError, MappingError, OSError) as error:
        return name(error.errno or 0)
    return "ok"


def exits(x: Experiment) -> int:
    """Count how often vCPUs have come back from KVM_RUN until now for anything but orders and kicks."""
    return sum(each.count for each in x.machine.counters.exits if each.name not in ORDERS)


def make(x: Experiment, size: int) -> Backing:
    """Make a file of the kind that the guest's memory is of; whoever gets it, or the experiment's end, closes it."""
    match x.backing:
        case "guest_memfd":
            backing: Backing = SharedGuestMemfd(x.machine.vm, size)
        case "private":
            backing = PrivateGuestMemfd(x.machine.vm, size)
        case _:
            backing = Memfd(size, thp=x.backing == "thp", hugetlb=x.backing == "hugetlb")
    return x.stack.enter_context(backing)


def slot(
    x: Experiment, gpa: int, size: int, hva: int, *, flags: int = 0, file: GuestMemfd | None = None, offset: int = 0
) -> int:
    """Make a slot in KVM alone and return its number; KvmError where the kernel refuses."""
    number = next(_numbers)
    x.machine.vm.set_memory(number, gpa, size, hva, flags=flags, guest_memfd=file, offset=offset)
    return number


def place(x: Experiment, gpa: int) -> tuple[Backing, int]:
    """Return the file that holds the page at ``gpa``, and the offset there."""
    for each in x.memory.slots:
        if each.gpa <= gpa < each.end:
            return each.backing, each.offset + gpa - each.gpa
    raise ValueError(f"gpa {gpa:#x} is in no slot")


def load64(address: int) -> int | None:
    """Load 64 bits at an address of ours, guarded; None where that faults."""
    room = bytearray(8)
    done = lib.pv_copy(ffi.from_buffer("uint8_t[]", room), ffi.cast("void *", address), 8)
    return int.from_bytes(room, "little") if done == 8 else None


def punch(fd: int, offset: int, size: int) -> str:
    """Punch a hole in a file, whatever pyvmm says; returns ``ok``, or the errno's name."""
    return answer(lambda: mman.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size))


def allocate(fd: int, offset: int, size: int) -> str:
    """Allocate a range of a file; returns ``ok``, or the errno's name."""
    return answer(lambda: mman.fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, size))


def kib(fd: int) -> int:
    """Return what fstat(2) says a file takes (st_blocks), in KiB."""
    return os.fstat(fd).st_blocks // 2


def present(address: int) -> bool:
    """Whether the page tables of this process have a page at an address of ours, which is not touched."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        return bool(int.from_bytes(os.pread(file.fileno(), 8, address // PAGE_SIZE * 8), "little") >> 63)


def poison(fd: int, offset: int) -> str:
    """Have a page of a file treated as broken memory (MADV_HWPOISON); returns ``ok``, or the errno's name.

    The frame is lost to the host until it boots again, so this is for the lab.
    In a forked child with a mapping of its own: the kernel sends SIGBUS to whoever asks.
    """
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            address, _ = libc.mmap(PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset)
            os._exit(madvise(address, PAGE_SIZE, MADV_HWPOISON).errno)
        finally:
            os._exit(_errno.EIO)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return name(0 if code == -signal.SIGBUS else code)


def free_kib() -> int:
    """Return the host's free memory in KiB, that in its CPUs' lists included: good for telling megabytes, not pages."""
    pages = 0
    with open("/proc/zoneinfo") as lines:
        for line in lines:
            match line.split():
                case ["nr_free_pages", count] | ["count:", count]:
                    pages += int(count)
    return pages * 4
