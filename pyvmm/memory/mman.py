# SPDX-License-Identifier: Apache-2.0
"""Map guest memory, with addresses as integers. Python never holds a view of it.

Owns nothing: the caller that maps must unmap. Every error names the call, its values, and the reason.
"""

from __future__ import annotations

import errno
import os

from pyvmm.errors import HostError, PyvmmError, hex_
from pyvmm.kvm import libc
from pyvmm.memory.address import Hva, align_up
from pyvmm.pages import HOST_PAGE, HUGE_SIZE
from pyvmm.uapi.mman import (
    MADV_DONTDUMP,
    MADV_DONTFORK,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
)

PROT_RW = PROT_READ | PROT_WRITE


class MappingError(PyvmmError):
    """A call on memory failed. ``errno`` is the kernel's error."""

    def __init__(self, call: str, values: str, code: int, cause: str | None = None, hint: str | None = None) -> None:
        name = errno.errorcode.get(code, str(code))
        super().__init__(f"{call}({values}): {name}: {cause or os.strerror(code)}", hint=hint)
        self.errno = code


def map_shared(fd: int, size: int, *, offset: int = 0, reserve: bool = False) -> Hva:
    """Map ``size`` bytes of ``fd`` for reading and writing, shared, excluded from forks and core dumps.

    A mapping of a huge page or more starts on a multiple of it, so that huge pages can back an equally aligned gpa.
    ``reserve`` makes the kernel reserve the pages now (hugetlb: a small pool fails here, not with SIGBUS).
    """
    return _map_aligned(size, MAP_SHARED | (0 if reserve else MAP_NORESERVE), fd, offset)


def map_anonymous(size: int) -> Hva:
    """Map ``size`` bytes of anonymous memory, aligned and excluded from forks and core dumps as above."""
    return _map_aligned(size, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)


def _map_aligned(size: int, flags: int, fd: int, offset: int) -> Hva:
    # A fork copies the pinned pages of a private mapping, and a core dump reads all pages. Both use the kernel's own
    # mapping, which destroys donated pages (copy_present_page, mm/memory.c; get_dump_page, mm/gup.c).
    granule = HUGE_SIZE if size >= HUGE_SIZE else HOST_PAGE
    room = size + granule - HOST_PAGE
    start = _mmap(0, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    address = align_up(start, granule)
    try:
        _mmap(address, size, PROT_RW, flags | MAP_FIXED, fd, offset)
        advise(address, size, MADV_DONTFORK)
        advise(address, size, MADV_DONTDUMP)
    except BaseException:
        unmap(start, room)
        raise
    if address > start:
        unmap(start, address - start)
    if start + room > address + size:
        unmap(address + size, start + room - address - size)
    return Hva(address)


def map_over(address: int, size: int, fd: int, offset: int, access: int) -> None:
    """Replace an existing mapping by another part of a file, atomically for readers."""
    _mmap(address, size, access, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, offset)
    advise(address, size, MADV_DONTFORK)
    advise(address, size, MADV_DONTDUMP)


def unmap(address: int, size: int) -> None:
    """Remove the mappings in a range. A range without mappings is allowed."""
    _check(libc.munmap(address, size), "munmap", address, size)


def protect(address: int, size: int, access: int) -> None:
    """Change the access of a mapping to PROT_NONE or PROT_RW."""
    _check(
        libc.mprotect(address, size, access),
        "mprotect",
        address,
        size,
        f"prot={access}",
        hint="each change of access splits a mapping: raise /proc/sys/vm/max_map_count",
    )


def advise(address: int, size: int, advice: int) -> None:
    """Call madvise. Raises :class:`MappingError` with its errno."""
    _check(libc.madvise(address, size, advice), "madvise", address, size, f"advice={advice}")


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """Allocate, or with FALLOC_FL_PUNCH_HOLE drop, a range of a file's pages."""
    if code := libc.fallocate(fd, mode, offset, size):
        raise MappingError("fallocate", f"fd={fd}, mode={mode:#x}, offset={offset:#x}, size={size:#x}", code)


def _mmap(address: int, size: int, access: int, flags: int, fd: int, offset: int) -> int:
    result, code = libc.mmap(size, access, flags, fd, offset, address)
    if not code:
        return result
    cause = hint = None
    if code == errno.ENOMEM:
        cause = "this process's address space or the kernel's commit limit is used up"
        hint = "use less guest memory; see `ulimit -v`, /proc/sys/vm/max_map_count and overcommit_memory"
    elif code == errno.EAGAIN:
        cause = "the mapping would be locked (mlockall), but RLIMIT_MEMLOCK does not allow it"
    elif code == errno.ENODEV and fd >= 0:
        raise HostError(
            f"this kernel cannot map the file behind guest memory (mmap of fd {fd}: ENODEV)",
            hint="mapping a guest_memfd needs Linux 6.18, and the MMAP flag at its creation",
        )
    values = f"size={size:#x}, prot={access}, flags={flags:#x}, fd={fd}, offset={offset:#x}"
    raise MappingError("mmap", values, code, cause, hint)


def _check(code: int, call: str, address: int, size: int, more: str = "", hint: str | None = None) -> None:
    if code:
        values = ", ".join(filter(None, (hex_(address), f"size={size:#x}", more)))
        raise MappingError(call, values, code, hint=hint if code == errno.ENOMEM else None)
