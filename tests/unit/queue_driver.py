# SPDX-License-Identifier: Apache-2.0
"""A driver of a device with several queues over plain memory, without KVM: split rings, chains of any length."""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Callable, Sequence
from typing import Self

from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.devices.virtio.queue import Queue
from tests.unit.plain_guest import BASE, NEXT, SIZE, WRITE, PlainGuest, Segment

RAM = range(BASE, BASE + SIZE)
_RING_ROOM = 0x4000
_DRIVER, _DEVICE = 0x2000, 0x3000


class Ring:
    """The driver's side of one queue."""

    def __init__(self, driver: Driver, queue: Queue) -> None:
        self._driver = driver
        self.queue = queue
        self.base = BASE + queue.index * _RING_ROOM
        self._given = self._seen = self._next = 0

    def setup(self) -> None:
        self._given = self._seen = self._next = 0
        self._driver.write(self.base, bytes(_RING_ROOM))
        self.queue.reset()
        self.queue.setup(self.queue.most, 0, self.base, self.base + _DRIVER, self.base + _DEVICE)

    def give(self, *segments: Segment, kick: bool = True) -> int:
        """Make one chain available; returns its head. Descriptors are used in turn: do not have too many in use."""
        size = self.queue.most
        head = self._next
        for n, segment in enumerate(segments):
            at, self._next = self._next, (self._next + 1) % size
            flags = (NEXT if n + 1 < len(segments) else 0) | (WRITE if segment.writable else 0)
            self._driver.write(self.base + 16 * at, struct.pack("<QIHH", *segment[:2], flags, self._next))
        self._driver.write(self.base + _DRIVER + 4 + 2 * (self._given % size), struct.pack("<H", head))
        self._given += 1
        self._driver.write(self.base + _DRIVER + 2, struct.pack("<H", self._given & 0xFFFF))
        if kick:
            os.eventfd_write(self.queue.kick, 1)
        return head

    def used(self) -> list[tuple[int, int]]:
        """Return the chains used since the last call: (head, bytes written) of each."""
        found = []
        (index,) = struct.unpack("<H", self._driver.read(self.base + _DEVICE + 2, 2))
        while self._seen & 0xFFFF != index:
            entry = self._driver.read(self.base + _DEVICE + 4 + 8 * (self._seen % self.queue.most), 8)
            found.append(struct.unpack("<II", entry))
            self._seen += 1
        return found

    def wait(self, count: int = 1) -> list[tuple[int, int]]:
        """Wait until ``count`` chains came back."""
        found: list[tuple[int, int]] = []

        def enough() -> bool:
            found.extend(self.used())
            return len(found) >= count

        self._driver.until(enough)
        return found


class Driver(PlainGuest):
    """Guest memory, a started device and its rings; a context manager that stops and closes the device."""

    def __init__(self, device: VirtioDevice, *, queues: Sequence[int] | None = None, start: bool = True) -> None:
        super().__init__()
        self.device = device
        device.transport = self.transport
        self.queues = [Queue(self.vm, self.line, index, most) for index, most in enumerate(device.queue_sizes)]
        self.rings = [Ring(self, queue) for queue in self.queues]
        self._wanted = range(len(self.queues)) if queues is None else queues
        if start:
            self.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.device.stop()
        self.device.close()
        for queue in self.queues:
            queue.close()
        self.close()

    def restart(self) -> None:
        """Reset, set the queues up and start the device, as a driver does."""
        self.device.stop()
        for index in self._wanted:
            self.rings[index].setup()
        assert self.device.negotiate(self.device.features) is None
        self.device.start(self.queues, self.device.features)

    def until(self, condition: Callable[[], object], timeout: float = 20.0) -> None:
        """Wait until ``condition`` is true. Checks at every interrupt, and from time to time without one."""
        end = time.monotonic() + timeout
        while not condition():
            self.line.status = 0  # acknowledge before reading the rings
            if condition():
                return
            assert time.monotonic() < end, f"the condition was not true within {timeout:g} s"
            if select.select([self.interrupts], [], [], 0.02)[0]:
                os.eventfd_read(self.interrupts)
