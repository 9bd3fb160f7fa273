# SPDX-License-Identifier: Apache-2.0
"""Both ends of a virtqueue in pure Python, written from virtio 1.2: the driver, and the device end that C implements.

:class:`Driver` lays requests out in memory and takes used ones back. :class:`Device` is the oracle of the
differential tests: it decides as C does, and names the same errors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from pyvmm._native import lib

NEXT, WRITE, INDIRECT, AVAILABLE, USED = 1, 2, 4, 1 << 7, 1 << 15
U16 = 0xFFFF
DESCRIPTOR = 16

#: (gpa, bytes, whether the device may write it)
Segment = tuple[int, int, bool]


class Fault(Exception):
    """Memory that cannot be accessed; the address is that of its first byte."""


class Ram(Protocol):
    def read(self, gpa: int, n: int, /) -> bytes: ...
    def write(self, gpa: int, data: bytes, /) -> None: ...


@dataclass(frozen=True)
class Rings:
    """The addresses and the format of a queue."""

    size: int
    descriptors: int
    driver: int
    device: int
    packed: bool = False
    event_idx: bool = False
    indirect: bool = True

    @property
    def flags(self) -> int:
        return (
            lib.PV_QUEUE_PACKED * self.packed
            | lib.PV_QUEUE_EVENT_IDX * self.event_idx
            | lib.PV_QUEUE_INDIRECT * self.indirect
        )

    def step(self, slot: int, wrap: int, by: int) -> tuple[int, int]:
        """Return a packed ring's position and wrap counter ``by`` slots later."""
        slot += by
        return (slot - self.size, wrap ^ 1) if slot >= self.size else (slot, wrap)


def passed(at: int, now: int, old: int) -> bool:
    return (now - at - 1 & U16) < (now - old & U16)


class Driver:
    """The driver's end. ``tables`` is the gpa of the indirect tables, a page for each id."""

    def __init__(self, ram: Ram, rings: Rings, tables: int) -> None:
        self.ram, self.rings, self.tables = ram, rings, tables
        self.free = list(range(rings.size))  # descriptors (split), ids (packed)
        self.room = rings.size
        self.flight: dict[int, list[int]] = {}
        self.next, self.wrap = 0, 1
        self.last, self.last_wrap = 0, 1
        self.untold = 0

    def word(self, gpa: int) -> int:
        return int(struct.unpack("<H", self.ram.read(gpa, 2))[0])

    def add(self, segments: Sequence[Segment], *, indirect: bool = False) -> int | None:
        """Make a request available. Returns its id, or None if there is no room."""
        need = 1 if indirect else len(segments)
        if need > self.room or not self.free:
            return None
        self.room -= need
        return self._add_packed(segments, indirect) if self.rings.packed else self._add_split(segments, indirect)

    def _add_split(self, segments: Sequence[Segment], indirect: bool) -> int:
        taken = [self.free.pop(0) for _ in range(1 if indirect else len(segments))]
        rings, head = self.rings, taken[0]
        if indirect:
            table = self.tables + 4096 * head
            # Backwards: the order in the table must not matter.
            places = [0, *range(len(segments) - 1, 0, -1)]
            self._chain(table, segments, places)
            data = struct.pack("<QIHH", table, DESCRIPTOR * len(segments), INDIRECT | WRITE, U16)
            self.ram.write(rings.descriptors + DESCRIPTOR * head, data)
        else:
            self._chain(rings.descriptors, segments, taken)
        self.flight[head] = taken
        self.ram.write(rings.driver + 4 + 2 * (self.next % rings.size), struct.pack("<H", head))
        self.next = self.next + 1 & U16
        self.ram.write(rings.driver + 2, struct.pack("<H", self.next))
        self.untold += 1
        return head

    def _chain(self, table: int, segments: Sequence[Segment], places: Sequence[int]) -> None:
        for number, (gpa, size, writable) in enumerate(segments):
            more = number + 1 < len(segments)
            following = places[number + 1] if more else 0
            data = struct.pack("<QIHH", gpa, size, WRITE * writable | NEXT * more, following)
            self.ram.write(table + DESCRIPTOR * places[number], data)

    def _add_packed(self, segments: Sequence[Segment], indirect: bool) -> int:
        rings = self.rings
        name = self.free.pop()
        if indirect:
            table = self.tables + 4096 * name
            for number, (gpa, size, writable) in enumerate(segments):
                self.ram.write(table + DESCRIPTOR * number, struct.pack("<QIHH", gpa, size, 0, WRITE * writable))
            segments = [(table, DESCRIPTOR * len(segments), False)]
        first: tuple[int, bytes] | None = None
        for number, (gpa, size, writable) in enumerate(segments):
            flags = (AVAILABLE if self.wrap else USED) | WRITE * writable | INDIRECT * indirect
            flags |= NEXT * (number + 1 < len(segments))
            at = rings.descriptors + DESCRIPTOR * self.next
            self.ram.write(at, struct.pack("<QIH", gpa, size, name))
            if first is None:
                first = at + 14, struct.pack("<H", flags)
            else:
                self.ram.write(at + 14, struct.pack("<H", flags))
            self.next, self.wrap = self.rings.step(self.next, self.wrap, 1)
        assert first is not None
        self.ram.write(*first)
        self.flight[name] = [len(segments)]
        self.untold += len(segments)
        return name

    def kick_wanted(self) -> bool:
        """Return whether the device wants a kick for the requests added since the last call."""
        rings, added, self.untold = self.rings, self.untold, 0
        if not rings.packed:
            if rings.event_idx:
                return passed(self.word(rings.device + 4 + 8 * rings.size), self.next, self.next - added & U16)
            return not self.word(rings.device) & 1
        at, flags = struct.unpack("<HH", self.ram.read(rings.device, 4))
        if flags != 2:
            return bool(flags == 0)
        where = at & 0x7FFF if at >> 15 == self.wrap else (at & 0x7FFF) - rings.size & U16
        return passed(where, self.next, self.next - added & U16)

    def interrupts(self, on: bool, after: int = 0) -> None:
        """Ask for interrupts or not. With an event index: once ``after`` entries beyond the next are used."""
        rings = self.rings
        if not rings.packed:
            if rings.event_idx:
                at = self.last + after if on else self.last - 1
                self.ram.write(rings.driver + 4 + 2 * rings.size, struct.pack("<H", at & U16))
            else:
                self.ram.write(rings.driver, struct.pack("<H", not on))
        elif rings.event_idx and on:
            at, wrap = self.rings.step(self.last, self.last_wrap, after)
            self.ram.write(rings.driver, struct.pack("<HH", at | wrap << 15, 2))
        else:
            self.ram.write(rings.driver, struct.pack("<HH", 0, not on))

    def used(self) -> Iterator[tuple[int, int]]:
        """Take back every used request; returns (id, bytes written) of each."""
        while (entry := self._packed_used() if self.rings.packed else self._split_used()) is not None:
            yield entry

    def _split_used(self) -> tuple[int, int] | None:
        rings = self.rings
        if self.word(rings.device + 2) == self.last:
            return None
        head, written = struct.unpack("<II", self.ram.read(rings.device + 4 + 8 * (self.last % rings.size), 8))
        self.last = self.last + 1 & U16
        taken = self.flight.pop(head)
        self.free += taken
        self.room += len(taken)
        return head, written

    def _packed_used(self) -> tuple[int, int] | None:
        rings = self.rings
        _, written, name, flags = struct.unpack("<QIHH", self.ram.read(rings.descriptors + DESCRIPTOR * self.last, 16))
        if bool(flags & AVAILABLE) != self.last_wrap or bool(flags & USED) != self.last_wrap:
            return None
        (slots,) = self.flight.pop(name)
        self.free.append(name)
        self.room += slots
        self.last, self.last_wrap = self.rings.step(self.last, self.last_wrap, slots)
        return name, written


class Broken(Exception):
    """The driver's mistake: one of enum pv_queue_error."""

    def __init__(self, error: int) -> None:
        super().__init__(error)
        self.error = error


@dataclass(frozen=True)
class Popped:
    id: int
    slots: int
    segments: tuple[Segment, ...]


class Device:
    """The device's end; a chain has at most ``room`` segments."""

    def __init__(self, ram: Ram, rings: Rings, room: int) -> None:
        self.ram, self.rings, self.room = ram, rings, room
        self.next, self.next_wrap = 0, 1
        self.used, self.used_wrap = 0, 1
        self.seen = 0
        self.taken = self.unsaid = 0
        self.asked = True
        self.broken = 0

    def fail(self, name: str) -> NoReturn:
        self.broken = getattr(lib, f"PV_QUEUE_{name}")
        raise Broken(self.broken)

    def get(self, gpa: int, n: int, error: str = "RING") -> bytes:
        try:
            return self.ram.read(gpa, n)
        except Fault:
            self.fail(error)

    def put(self, gpa: int, data: bytes) -> None:
        try:
            self.ram.write(gpa, data)
        except Fault:
            self.fail("RING")

    def word(self, gpa: int) -> int:
        return int(struct.unpack("<H", self.get(gpa, 2))[0])

    # -- requests

    def pop(self) -> Popped | None:
        popped = self._pop_packed() if self.rings.packed else self._pop_split()
        if popped is not None and self.asked and not self.rings.event_idx:
            self._ask(False)
        return popped

    def _take(self, segments: list[Segment], gpa: int, size: int, writable: bool) -> None:
        if not size or gpa + size >= 1 << 64:
            self.fail("SEGMENT")
        if not writable and segments and segments[-1][2]:
            self.fail("ORDER")
        if sum(each for _, each, _ in segments) + size >= 1 << 32:
            self.fail("LENGTH")
        if len(segments) == self.room:
            self.fail("ROOM")
        segments.append((gpa, size, writable))

    def _table(self, segments: list[Segment], gpa: int, size: int) -> None:
        count = size // DESCRIPTOR
        if not self.rings.indirect or not size or size % DESCRIPTOR or gpa + size >= 1 << 64:
            self.fail("INDIRECTION")
        index = steps = start = 0
        copy = b""
        while True:
            # C copies up to 32 at a time, and can fault on a page after the one it needs.
            if not start <= index < start + len(copy) // DESCRIPTOR:
                start = index
                copy = self.get(gpa + DESCRIPTOR * index, DESCRIPTOR * min(32, count - index), "TABLE")
            address, length, a, b = struct.unpack_from("<QIHH", copy, DESCRIPTOR * (index - start))
            flags = b if self.rings.packed else a
            if flags & INDIRECT:
                self.fail("INDIRECTION")
            self._take(segments, address, length, bool(flags & WRITE))
            steps += 1
            if index + 1 == count if self.rings.packed else not flags & NEXT:
                return
            index = index + 1 if self.rings.packed else b
            if index >= count:
                self.fail("DESCRIPTOR")
            if steps >= count:
                self.fail("LOOP")

    def _look(self) -> None:
        seen = self.word(self.rings.driver + 2)
        if (seen - self.next & U16) > self.rings.size or (seen - self.used & U16) > self.rings.size:
            self.fail("INDEX")
        self.seen = seen

    def _pop_split(self) -> Popped | None:
        rings = self.rings
        if self.seen == self.next:
            self._look()
        if self.seen == self.next:
            return None
        head = index = self.word(rings.driver + 4 + 2 * (self.next % rings.size))
        segments: list[Segment] = []
        for _ in range(rings.size):
            if index >= rings.size:
                self.fail("DESCRIPTOR")
            data = self.get(rings.descriptors + DESCRIPTOR * index, DESCRIPTOR)
            gpa, size, flags, index = struct.unpack("<QIHH", data)
            if flags & INDIRECT:
                if flags & NEXT:
                    self.fail("INDIRECTION")
                self._table(segments, gpa, size)
                break
            self._take(segments, gpa, size, bool(flags & WRITE))
            if not flags & NEXT:
                break
        else:
            self.fail("DESCRIPTOR" if index >= rings.size else "LOOP")
        self.next = self.next + 1 & U16
        return Popped(head, 1, tuple(segments))

    def _available(self) -> bool:
        flags = self.word(self.rings.descriptors + DESCRIPTOR * self.next + 14)
        return bool(flags & AVAILABLE) == self.next_wrap and bool(flags & USED) != self.next_wrap

    def _pop_packed(self) -> Popped | None:
        rings = self.rings
        if not self._available():
            return None
        slot, wrap, slots, name = self.next, self.next_wrap, 0, 0
        segments: list[Segment] = []
        more = True
        while more:
            if slots >= rings.size - self.taken:
                self.fail("INDEX" if self.taken else "LOOP")
            data = self.get(rings.descriptors + DESCRIPTOR * slot, DESCRIPTOR)
            gpa, size, name, flags = struct.unpack("<QIHH", data)
            slots += 1
            slot, wrap = rings.step(slot, wrap, 1)
            more = bool(flags & NEXT)
            if not flags & INDIRECT:
                self._take(segments, gpa, size, bool(flags & WRITE))
                continue
            if more:
                self.fail("INDIRECTION")
            self._table(segments, gpa, size)
        self.next, self.next_wrap = slot, wrap
        self.taken += slots
        return Popped(name, slots, tuple(segments))

    def push(self, popped: Popped, written: int) -> None:
        rings = self.rings
        if rings.packed:
            at = rings.descriptors + DESCRIPTOR * self.used
            flags = (AVAILABLE | USED) * self.used_wrap | WRITE * bool(written)
            self.put(at + 8, struct.pack("<IH", written, popped.id))
            self.used, self.used_wrap = self.rings.step(self.used, self.used_wrap, popped.slots)
            self.taken -= popped.slots
            self.put(at + 14, struct.pack("<H", flags))
        else:
            self.put(rings.device + 4 + 8 * (self.used % rings.size), struct.pack("<II", popped.id, written))
            self.used = self.used + 1 & U16
            self.put(rings.device + 2, struct.pack("<H", self.used))
        self.unsaid += popped.slots

    # -- notifications

    def interrupt(self) -> bool:
        """Return whether the driver is interrupted."""
        rings, unsaid = self.rings, self.unsaid
        if not unsaid:
            return False
        if rings.packed:
            at, flags = struct.unpack("<HH", self.get(rings.driver, 4))
            self.unsaid = 0
            if flags != 2 or not rings.event_idx:
                return bool(flags != 1)
            where = at & 0x7FFF if at >> 15 == self.used_wrap else (at & 0x7FFF) - rings.size & U16
        elif rings.event_idx:
            where = self.word(rings.driver + 4 + 2 * rings.size)
        else:
            where = self.word(rings.driver)
            self.unsaid = 0
            return not where & 1
        self.unsaid = 0
        return unsaid > U16 or passed(where, self.used, self.used - unsaid & U16)

    def _ask(self, kick: bool) -> None:
        rings = self.rings
        self.asked = kick
        if rings.packed:
            if rings.event_idx:
                self.put(rings.device, struct.pack("<H", self.next | self.next_wrap << 15))
            self.put(rings.device + 2, struct.pack("<H", 2 if rings.event_idx else not kick))
        elif rings.event_idx:
            self.put(rings.device + 4 + 8 * rings.size, struct.pack("<H", self.next))
        else:
            self.put(rings.device, struct.pack("<H", not kick))

    def arm(self) -> bool:
        """Ask for kicks; return whether no request has come meanwhile."""
        self._ask(True)
        if self.rings.packed:
            return not self._available()
        self._look()
        return self.seen == self.next
