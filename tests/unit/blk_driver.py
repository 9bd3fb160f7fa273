"""A driver of a disk over plain memory, without KVM: requests as segments at guest addresses, in a split ring."""

from __future__ import annotations

import os
import select
import struct
from typing import TYPE_CHECKING, NamedTuple, Self

from pyvmm._native import ffi, lib
from pyvmm.devices.virtio.queue import Queue
from pyvmm.memory import mman
from pyvmm.uapi.mman import PROT_NONE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.devices.virtio.blk import Blk

PAGE = 4096
BASE = 0x8000_0000
SIZE = 4 << 20
RINGS = BASE
DATA = BASE + 0x1_0000
DRIVER_OFFSET, DEVICE_OFFSET = 0x4000, 0x8000
_NEXT, _WRITE = 1, 2


class Segment(NamedTuple):
    gpa: int
    size: int
    writable: bool = False


class Transport:
    """Hears what a device tells its transport."""

    def __init__(self) -> None:
        self.reset_needed = False
        self.changes = 0

    def needs_reset(self) -> None:
        self.reset_needed = True

    def config_changed(self) -> None:
        self.changes += 1


class Driver:
    """Drives queue 0 of a started device; a context manager that stops and closes it."""

    def __init__(self, device: Blk, features: int | None = None, *, size: int = 256) -> None:
        lib.pv_install_signals()
        self.device = device
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, SIZE)
        self.hva = mman.map_shared(self.fd, SIZE)
        self._ledger = ffi.new("uint8_t[]", SIZE // PAGE)
        self._regions = ffi.new("struct pv_region[]", 1)
        region = self._regions[0]
        region.gpa, region.size, region.ledger = BASE, SIZE, self._ledger
        region.view = ffi.cast("uint8_t *", self.hva)
        self._map = ffi.new("struct pv_map *", {"count": 1, "regions": self._regions})
        self.vm = ffi.new("struct pv_vm *", {"map": self._map})
        self.interrupts = os.eventfd(0, os.EFD_CLOEXEC)
        self.line = ffi.new("struct pv_interrupt *", {"fd": self.interrupts})
        self.transport = device.transport = Transport()
        self.queue = Queue(self.vm, self.line, 0, size)
        self.size = size
        self._features = device.features if features is None else features
        self.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.device.close()
        self.queue.close()
        os.close(self.interrupts)
        mman.unmap(self.hva, SIZE)
        os.close(self.fd)

    def restart(self) -> None:
        """Set the queue up as a driver does after a reset, and start the device."""
        self._given = self._seen = 0
        self.write(RINGS, bytes(DATA - RINGS))
        self.queue.reset()
        self.queue.setup(self.size, 0, RINGS, RINGS + DRIVER_OFFSET, RINGS + DEVICE_OFFSET)
        assert self.device.negotiate(self._features) is None
        self.device.start([self.queue], self._features)

    def write(self, gpa: int, data: bytes) -> None:
        """Store into guest memory, as the guest may: whatever the host may touch."""
        os.pwrite(self.fd, data, gpa - BASE)

    def read(self, gpa: int, size: int) -> bytes:
        return os.pread(self.fd, size, gpa - BASE)

    def hide(self, gpa: int, size: int = PAGE, *, hidden: bool = True) -> None:
        """Take pages from the host, or give them back."""
        mman.protect(self.hva + gpa - BASE, size, PROT_NONE if hidden else mman.PROT_RW)

    def submit(self, *chains: Sequence[Segment]) -> list[int]:
        """Make requests available, all at once, and kick; returns their heads. The next ones use the same table."""
        heads, at = [], 0
        for segments in chains:
            heads.append(at)
            for n, segment in enumerate(segments):
                flags = (_NEXT if n + 1 < len(segments) else 0) | (_WRITE if segment.writable else 0)
                entry = struct.pack("<QIHH", segment.gpa, segment.size, flags, at + 1)
                self.write(RINGS + 16 * at, entry)
                at += 1
        assert at <= self.size
        for head in heads:
            self.write(RINGS + DRIVER_OFFSET + 4 + 2 * (self._given % self.size), struct.pack("<H", head))
            self._given += 1
        self.write(RINGS + DRIVER_OFFSET + 2, struct.pack("<H", self._given & 0xFFFF))
        os.eventfd_write(self.queue.kick, 1)
        return heads

    def wait(self, count: int = 1, timeout: float = 20.0) -> list[tuple[int, int]]:
        """Wait for so many used entries, (head, bytes written) each."""
        found: list[tuple[int, int]] = []
        while len(found) < count:
            self.line.status = 0  # acknowledged, before the ring is looked at
            (index,) = struct.unpack("<H", self.read(RINGS + DEVICE_OFFSET + 2, 2))
            while self._seen & 0xFFFF != index:
                entry = self.read(RINGS + DEVICE_OFFSET + 4 + 8 * (self._seen % self.size), 8)
                found.append(struct.unpack("<II", entry))
                self._seen += 1
            if len(found) < count:
                ready, _, _ = select.select([self.interrupts], [], [], timeout)
                assert ready, f"{len(found)} of {count} requests came back within {timeout} s"
                os.eventfd_read(self.interrupts)
        return found

    def request(self, kind: int, sector: int, data: bytes = b"", room: int = 0) -> tuple[int, bytes, int]:
        """Make one well laid out request and wait for it: (status, the ``room`` bytes read, used length)."""
        self.write(DATA, struct.pack("<IIQ", kind, 0, sector))
        self.write(DATA + PAGE, data)
        end = DATA + PAGE + len(data) + room
        self.write(end, b"\xee")
        chain = [Segment(DATA, 16)]
        if data:
            chain.append(Segment(DATA + PAGE, len(data)))
        if room:
            chain.append(Segment(DATA + PAGE + len(data), room, True))
        chain.append(Segment(end, 1, True))
        self.submit(chain)
        [(_, written)] = self.wait()
        return self.read(end, 1)[0], self.read(end - room, room), written
