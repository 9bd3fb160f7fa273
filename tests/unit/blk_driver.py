# SPDX-License-Identifier: Apache-2.0
"""A driver of a disk over plain memory, without KVM: requests as segments at guest addresses, in a split ring."""

from __future__ import annotations

import os
import select
import struct
from typing import TYPE_CHECKING, Self

from pyvmm.devices.virtio.queue import Queue
from tests.unit.plain_guest import BASE, NEXT, PAGE, WRITE, PlainGuest, Segment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.devices.virtio.blk import VirtioBlk

RINGS = BASE
DATA = BASE + 0x1_0000
DRIVER_OFFSET, DEVICE_OFFSET = 0x4000, 0x8000


class Driver(PlainGuest):
    """Drives queue 0 of a started device; a context manager that stops and closes it."""

    def __init__(self, device: VirtioBlk, features: int | None = None, *, size: int = 256) -> None:
        super().__init__()
        self.device = device
        device.transport = self.transport
        self.queue = Queue(self.vm, self.line, 0, size)
        self.size = size
        self._features = device.features if features is None else features
        self.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.device.close()
        self.queue.close()
        self.close()

    def restart(self) -> None:
        """Set the queue up as a driver does after a reset, and start the device."""
        self._given = self._seen = 0
        self.write(RINGS, bytes(DATA - RINGS))
        self.queue.reset()
        self.queue.setup(self.size, 0, RINGS, RINGS + DRIVER_OFFSET, RINGS + DEVICE_OFFSET)
        assert self.device.negotiate(self._features) is None
        self.device.start([self.queue], self._features)

    def submit(self, *chains: Sequence[Segment]) -> list[int]:
        """Make requests available, all at once, and kick; returns their heads. The next ones use the same table."""
        heads, at = [], 0
        for segments in chains:
            heads.append(at)
            for n, segment in enumerate(segments):
                flags = (NEXT if n + 1 < len(segments) else 0) | (WRITE if segment.writable else 0)
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
        """Wait for ``count`` used entries; returns (head, bytes written) of each."""
        found: list[tuple[int, int]] = []
        while len(found) < count:
            self.line.status = 0  # acknowledge before reading the ring
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
        """Make a correct request and wait for it; returns (status, the ``room`` bytes read, used length)."""
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
