# SPDX-License-Identifier: Apache-2.0
"""Write a newc cpio archive, the format of an initramfs, without disk access or root.

The format is described in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Entries are
deterministic: root owns everything, times are zero, inode numbers count up.
"""

from __future__ import annotations

import stat
from typing import BinaryIO


class CpioWriter:
    """Appends entries to ``out``; parents are made as needed, a second entry of the same path is ignored."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0
        self._seen: set[str] = set()

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._entry(path, stat.S_IFDIR | mode)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._entry(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._entry(path, stat.S_IFCHR | mode, device=(major, minor))

    def finish(self) -> None:
        """End the archive; the kernel takes further archives after it in the same file."""
        self._write("TRAILER!!!", 0)

    def _entry(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        path = path.strip("/")
        if path in self._seen:
            return
        parent = path.rpartition("/")[0]
        if parent and parent not in self._seen:
            self.directory(parent)
        self._seen.add(path)
        self._write(path, mode, data, device)

    def _write(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        name = path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        numbers = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers)
        for part in (header + name, data):
            self._out.write(part)
            self._out.write(bytes(-len(part) % 4))
