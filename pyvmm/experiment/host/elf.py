# SPDX-License-Identifier: Apache-2.0
"""Pages found in the core file of a process."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from pyvmm.experiment.host.syscalls import Answer, pread_file

PT_LOAD = 1
ABSENT = "the page is not in the file"


def core_page(path: Path, address: int) -> Answer:
    """Read a page of a process from its core file; ABSENT if the file lacks it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset, start, size in _segments(fd):
            if start <= address < start + size:
                return pread_file(fd, offset + address - start)
    finally:
        os.close(fd)
    return Answer(-1, 0, b"", ABSENT)


def _segments(fd: int) -> Iterator[tuple[int, int, int]]:
    """Yield offset in the file, address and size of an ELF file's loadable segments."""
    header = os.pread(fd, 64, 0)
    (start,), (size, count) = struct.unpack_from("<Q", header, 32), struct.unpack_from("<HH", header, 54)
    for number in range(count):
        entry = os.pread(fd, size, start + number * size)
        kind, _, offset, virtual, _, length = struct.unpack_from("<IIQQQQ", entry)
        if kind == PT_LOAD:
            yield offset, virtual, length
