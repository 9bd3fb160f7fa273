# SPDX-License-Identifier: Apache-2.0
"""Files, slots and mappings without pyvmm's checks, for experiments that test the kernel's answers.

Owns nothing: the experiment's stack or the machine releases the objects.
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
from pyvmm.memory.backing import Backing, Memfd, PrivateGuestMemfd, SharedGuestMemfd
from pyvmm.memory.mman import MappingError
from pyvmm.pages import HOST_PAGE
from pyvmm.uapi.falloc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from pyvmm.uapi.mman import MADV_HWPOISON, MAP_SHARED, PROT_READ, PROT_WRITE

if TYPE_CHECKING:
    from pyvmm.experiment.experiment import Experiment

_numbers = itertools.count(100)
"""Slot numbers that pyvmm's own table, which counts from 0, does not reach."""

ORDERS = ("mailbox", "interrupted")
"""Exits that every order to the guest, or a kick, causes."""


def name(errno: int) -> str:
    """Name an errno as the kernel does; ``ok`` for 0."""
    if not errno:
        return "ok"
    return "EOPNOTSUPP" if errno == _errno.EOPNOTSUPP else _errno.errorcode.get(errno, str(errno))


def answer(call: Callable[[], object]) -> str:
    """Make a call that the kernel may refuse. Returns ``ok``, or the errno's name."""
    try:
        call()
    except (KvmError, MappingError, OSError) as error:
        return name(error.errno or 0)
    return "ok"


def exits(x: Experiment) -> int:
    """Return the number of exits from KVM_RUN, except those for orders and kicks."""
    return sum(each.count for each in x.machine.counters.exits if each.name not in ORDERS)


def make(x: Experiment, size: int) -> Backing:
    """Make a backing of the same kind as guest memory. Its receiver, or the experiment's end, closes it."""
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
    """Make a slot only in KVM and return its number. Raises KvmError if the kernel refuses."""
    number = next(_numbers)
    x.machine.vm.set_memory(number, gpa, size, hva, flags=flags, guest_memfd=file, offset=offset)
    return number


def place(x: Experiment, gpa: int) -> tuple[Backing, int]:
    """Return the file of the page at ``gpa``, and its offset there."""
    for each in x.memory.slots:
        if each.gpa <= gpa < each.end:
            return each.backing, each.offset + gpa - each.gpa
    raise ValueError(f"gpa {gpa:#x} is in no slot")


def load64(address: int) -> int | None:
    """Load 64 bits from an address of this process, guarded. None if that faults."""
    room = bytearray(8)
    done = lib.pv_copy(ffi.from_buffer("uint8_t[]", room), ffi.cast("void *", address), 8)
    return int.from_bytes(room, "little") if done == 8 else None


def punch(fd: int, offset: int, size: int) -> str:
    """Punch a hole in a file, without pyvmm's checks. Returns ``ok``, or the errno's name."""
    return answer(lambda: mman.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size))


def allocate(fd: int, offset: int, size: int) -> str:
    """Allocate a range of a file. Returns ``ok``, or the errno's name."""
    return answer(lambda: mman.fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, size))


def kib(fd: int) -> int:
    """Return a file's allocated size by fstat(2) (st_blocks), in KiB.

    A guest_memfd's is always 0: the kernel counts no blocks there, and fstat(2) does not tell how much one holds.
    """
    return os.fstat(fd).st_blocks // 2


def present(address: int) -> bool:
    """Whether this process's page tables have a page at an address. Does not access the page."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        return bool(int.from_bytes(os.pread(file.fileno(), 8, address // HOST_PAGE * 8), "little") >> 63)


def poison(fd: int, offset: int) -> str:
    """Mark a page of a file as broken memory (MADV_HWPOISON). Returns ``ok``, or the errno's name.

    The host loses the frame until it reboots, so use it only in the lab. It runs in a forked child with a separate
    mapping, because the kernel sends SIGBUS to the caller.
    """
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            address, _ = libc.mmap(HOST_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset)
            os._exit(madvise(address, HOST_PAGE, MADV_HWPOISON).errno)
        finally:
            os._exit(_errno.EIO)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return name(0 if code == -signal.SIGBUS else code)


def free_kib() -> int:
    """Return the host's free memory in KiB, including per-CPU lists. Accurate to megabytes, not to pages."""
    pages = 0
    with open("/proc/zoneinfo") as lines:
        for line in lines:
            match line.split():
                case ["nr_free_pages", count] | ["count:", count]:
                    pages += int(count)
    return pages * HOST_PAGE >> 10
