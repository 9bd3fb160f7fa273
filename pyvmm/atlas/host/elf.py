"""Pages found in ELF files of memory: this process's core file, and /proc/kcore, the kernel's mapping of all memory."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from pyvmm.atlas.host.syscalls import PAGE, Answer, pread_file

PT_LOAD = 1
ABSENT = "the page is not in the file"


def core_page(path: Path, address: int) -> Answer:
    """Read a page of a process from its core file; ABSENT where it is not in there."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset, start, _, size in _segments(fd):
            if start <= address < start + size:
                return pread_file(fd, offset + address - start)
    finally:
        os.close(fd)
    return Answer(-1, 0, b"", ABSENT)


def kcore_page(frame: int) -> Answer:
    """pread(2) of the physical page with a frame number in /proc/kcore; ABSENT where it is not in there."""
    fd = os.open("/proc/kcore", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset, _, physical, size in _segments(fd):
            if physical <= frame * PAGE < physical + size:
                return pread_file(fd, offset + frame * PAGE - physical)
    finally:
        os.close(fd)
    return Answer(-1, 0, b"", ABSENT)


def _segments(fd: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield offset in the file, virtual address, physical address and size of an ELF file's loadable segments."""
    header = os.pread(fd, 64, 0)
    (start,), (size, count) = struct.unpack_from("<Q", header, 32), struct.unpack_from("<HH", header, 54)
    for number in range(count):
        entry = os.pread(fd, size, start + number * size)
        kind, _, offset, virtual, physical, length = struct.unpack_from("<IIQQQQ", entry)
        if kind == PT_LOAD:
            yield offset, virtual, physical, length
