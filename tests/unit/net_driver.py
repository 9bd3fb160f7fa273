# SPDX-License-Identifier: Apache-2.0
"""A driver of a network card over plain memory, without KVM: split or packed rings, one descriptor a segment."""

from __future__ import annotations

import os
import select
import struct
import time
from typing import TYPE_CHECKING, Self

from pyvmm._native import lib
from pyvmm.devices.virtio.queue import Queue
from tests.unit.plain_guest import BASE, NEXT, WRITE, PlainGuest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.devices.virtio.net import VirtioNet

AREA = 0x1_0000
"""Bytes of a queue's rings; buffers follow those of both."""
DATA = BASE + 2 * AREA
AVAILABLE, USED = 1 << 7, 1 << 15
PATIENCE = 20.0


class Ring:
    """The driver's side of one queue."""

    def __init__(self, driver: Driver, index: int, size: int, *, packed: bool) -> None:
        self.driver, self.size = driver, size
        self.base = BASE + index * AREA
        self.queue = Queue(driver.vm, driver.line, index, size)
        self.setup(packed=packed)

    def setup(self, *, packed: bool) -> None:
        """Start empty, in memory of zeros."""
        self.packed = packed
        flags = lib.PV_QUEUE_PACKED if packed else 0
        self.queue.setup(self.size, flags, self.base, self.base + 0x8000, self.base + 0xC000)
        self.given = self.seen = 0
        self.at, self.wrap = 0, 1
        self.seen_at, self.seen_wrap = 0, 1
        self.chains: dict[int, int] = {}

    def give(self, *chains: Sequence[tuple[int, int, bool]], kick: bool = True) -> list[int]:
        """Make chains of (gpa, size, whether writable) available; returns their ids."""
        ids = [self._give_packed(chain) if self.packed else self._give_split(chain) for chain in chains]
        if not self.packed:
            self.driver.write(self.base + 0x8002, struct.pack("<H", self.given & 0xFFFF))
        if kick:
            os.eventfd_write(self.queue.kick, 1)
        return ids

    def _give_split(self, chain: Sequence[tuple[int, int, bool]]) -> int:
        head = self.at
        for n, (gpa, size, writable) in enumerate(chain):
            following = (self.at + 1) % self.size
            flags = (NEXT if n + 1 < len(chain) else 0) | (WRITE if writable else 0)
            self.driver.write(self.base + 16 * self.at, struct.pack("<QIHH", gpa, size, flags, following))
            self.at = following
        self.driver.write(self.base + 0x8004 + 2 * (self.given % self.size), struct.pack("<H", head))
        self.given += 1
        return head

    def _give_packed(self, chain: Sequence[tuple[int, int, bool]]) -> int:
        ident = self.at
        first = None
        for n, (gpa, size, writable) in enumerate(chain):
            flags = (NEXT if n + 1 < len(chain) else 0) | (WRITE if writable else 0)
            flags |= AVAILABLE if self.wrap else USED
            entry = struct.pack("<QIHH", gpa, size, ident, flags)
            if first is None:
                first = (self.base + 16 * self.at, entry)
            else:
                self.driver.write(self.base + 16 * self.at, entry)
            self.at += 1
            if self.at == self.size:
                self.at, self.wrap = 0, self.wrap ^ 1
        assert first is not None
        self.driver.write(*first)
        self.chains[ident] = len(chain)
        return ident

    def used(self) -> list[tuple[int, int]]:
        """Take the used chains; returns (id, bytes written) of each."""
        found = []
        if not self.packed:
            (index,) = struct.unpack("<H", self.driver.read(self.base + 0xC002, 2))
            while self.seen & 0xFFFF != index:
                entry = self.driver.read(self.base + 0xC004 + 8 * (self.seen % self.size), 8)
                found.append(struct.unpack("<II", entry))
                self.seen += 1
            return found
        while True:
            _, size, ident, flags = struct.unpack("<QIHH", self.driver.read(self.base + 16 * self.seen_at, 16))
            if bool(flags & AVAILABLE) != bool(self.seen_wrap) or bool(flags & USED) != bool(self.seen_wrap):
                return found
            found.append((ident, size))
            self.seen_at += self.chains.pop(ident)
            if self.seen_at >= self.size:
                self.seen_at, self.seen_wrap = self.seen_at - self.size, self.seen_wrap ^ 1


class Driver(PlainGuest):
    """Drives a card, and stops and closes it at the end."""

    def __init__(self, device: VirtioNet, features: int | None = None, *, size: int = 64, packed: bool = False) -> None:
        super().__init__()
        self.device = device
        device.transport = self.transport
        self.rx, self.tx = (Ring(self, index, size, packed=packed) for index in range(2))
        self.features = device.features if features is None else features
        device.start([self.rx.queue, self.tx.queue], self.features)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.device.stop()
        self.device.close()
        self.rx.queue.close()
        self.tx.queue.close()
        self.close()

    def reset(self, *, packed: bool) -> None:
        """Reset the card and begin again with empty rings."""
        self.device.stop()
        for ring in (self.rx, self.tx):
            ring.queue.reset()
            self.write(ring.base, bytes(AREA))
            ring.setup(packed=packed)
        self.device.start([self.rx.queue, self.tx.queue], self.features)

    def wait(self, ring: Ring, count: int = 1) -> list[tuple[int, int]]:
        """Wait for ``count`` used entries of a ring."""
        found = ring.used()
        while len(found) < count:
            self.line.status = 0  # acknowledged, before the ring is looked at
            if more := ring.used():
                found += more
                continue
            ready, _, _ = select.select([self.interrupts], [], [], PATIENCE)
            assert ready, f"{len(found)} of {count} buffers came back"
            os.eventfd_read(self.interrupts)
        return found


def eventually(true: Callable[[], bool], what: str) -> None:
    """Wait until the condition is true."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.002)
