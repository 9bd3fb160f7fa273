# SPDX-License-Identifier: Apache-2.0
"""Small kernel files for tests of the boot protocol, and a memory that records what is loaded."""

from __future__ import annotations

import os
import struct
from typing import Any

from pyvmm.machine import boot
from pyvmm.machine.boot import BootImage
from pyvmm.machine.content import Bytes


def identify(data: bytes, source: str, **more: Any) -> BootImage:
    return boot.identify(Bytes(data), source, **more)


def loaded(image: BootImage) -> tuple[bytes, list[int], int, str]:
    """Return what loading an image writes, by gpa."""
    memory = Recorder()
    for part in image.segments:
        part.data.load(memory, part.gpa, part.size)
    return b"".join(data for _, data in memory.writes), [part.gpa for part in image.segments], image.pc, image.kind


CODE = bytes(range(1, 65)) * 4


def linux_image(
    size: int = 4096,
    *,
    text_offset: int = 0,
    image_size: int | None = None,
    flags: int = 0b1010,
    code: int = 0x91005A4D,
) -> bytes:
    header = struct.pack(
        "<2I3Q24x4sI", code, 0x14000000, text_offset, size if image_size is None else image_size, flags, b"ARM\x64", 0
    )
    return header.ljust(size, b"\x55")


def elf(
    *,
    machine: int = 183,
    kind: int = 2,
    elf_class: int = 2,
    order: int = 1,
    entry: int = 0x8010_0000,
    segments: tuple[tuple[int, int, bytes, int], ...] = ((1, 0x8010_0000, CODE, 4096),),
    vaddr: int | None = None,
) -> bytes:
    at = 64 + 56 * len(segments)
    mark = "<" if order == 1 else ">"
    heads, bodies = b"", b""
    for kind_, paddr, body, memory in segments:
        virtual = paddr if vaddr is None else vaddr
        heads += struct.pack(mark + "2I6Q", kind_, 5, at + len(bodies), virtual, paddr, len(body), memory, 4096)
        bodies += body
    identity = b"\x7fELF" + bytes([elf_class, order, 1]) + bytes(9)
    head = struct.pack(mark + "2HI3QI6H", kind, machine, 1, entry, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    return identity + head + heads + bodies


def zboot(method: bytes, payload: bytes, size: int | None = None) -> bytes:
    """Return an EFI zboot image. ``size`` is what its header says of the payload."""
    said = len(payload) if size is None else size
    return struct.pack("<4s4s2I8x32s", b"MZ\0\0", b"zimg", 64, said, method).ljust(64, b"\0") + payload


class Recorder:
    def __init__(self) -> None:
        self.writes: list[tuple[int, bytes]] = []

    def write(self, gpa: int, data: bytes) -> None:
        self.writes.append((gpa, bytes(data)))

    def load_file(self, gpa: int, fd: int, at: int, size: int) -> int:
        data = os.pread(fd, size, at)
        self.writes.append((gpa, data))
        return len(data)
