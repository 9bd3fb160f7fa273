# SPDX-License-Identifier: Apache-2.0
"""Virtqueues of the native loop against their twin in Python: honest drivers, and any contents of the rings."""

from __future__ import annotations

import os
import select
import struct
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm._native import ffi, lib
from pyvmm.devices.virtio.queue import Queue
from tests.memory_helper import BASE
from tests.twin_virtqueue import Broken, Device, Driver, Popped, Rings
from tests.virtqueue_rig import HALF, PAGE, SIZE, Copy, Guest, native_queue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.twin_virtqueue import Segment

KINDS = [(packed, event_idx) for packed in (False, True) for event_idx in (False, True)]
TABLES = BASE + 4 * PAGE
DATA = BASE + HALF - PAGE  # runs from one slot into the other
EMPTY = bytes(SIZE)


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def fresh(guest: Guest) -> Guest:
    guest.close_pages(())
    guest.load(EMPTY)
    return guest


def rings_of(size: int, packed: bool = False, event_idx: bool = False, indirect: bool = True) -> Rings:
    return Rings(size, BASE, BASE + PAGE, BASE + 2 * PAGE, packed, event_idx, indirect)


def segments_of(random: Random, most: int) -> list[Segment]:
    count = random.randrange(1, most + 1)
    readable = random.randrange(count + 1)
    return [(DATA + 64 * i, random.randrange(1, 64), i >= readable) for i in range(count)]


@settings(max_examples=150)
@given(seed=st.integers(0, 1 << 32))
def test_a_correct_driver_gets_every_request_back_once_and_both_wake_each_other(guest: Guest, seed: int) -> None:
    random = Random(seed)
    packed, event_idx = random.choice(KINDS)
    size = random.choice([1, 2, 3, 5, 8] if packed else [1, 2, 4, 8])
    guest.close_pages(())
    guest.load(EMPTY)
    rings = rings_of(size, packed, event_idx)
    driver = Driver(guest, rings, TABLES)
    with native_queue(guest.native, rings) as native:
        twin = Device(Copy(EMPTY), rings, 256)
        waiting: list[tuple[int, list[Segment]]] = []
        held: list[tuple[Popped, int]] = []
        asleep = wants = False
        used = 0
        driver.interrupts(on=False)
        for _ in range(random.randrange(20, 120)):
            match random.choice(["add", "add", "serve", "serve", "arm", "listen", "collect"]):
                case "add":
                    segments = segments_of(random, min(size, 4))
                    name = driver.add(segments, indirect=random.random() < 0.3)
                    if name is not None:
                        waiting.append((name, segments))
                        kick = driver.kick_wanted()
                        assert kick or not asleep, "a device that sleeps was not kicked"
                        asleep = asleep and not kick
                case "serve":
                    twin.ram = Copy(guest.contents)
                    for _ in range(random.randrange(1, 4)):
                        popped, expected = native.pop(), twin.pop()
                        assert popped == (0 if expected is None else expected)
                        assert isinstance(popped, Popped) or not waiting
                        if isinstance(popped, Popped):
                            name, segments = waiting.pop(0)
                            assert (popped.id, list(popped.segments)) == (name, segments)
                            held.append((popped, random.randrange(100)))
                    random.shuffle(held)
                    while held and random.random() < 0.7:
                        popped, written = held.pop()
                        assert native.push(popped, written) == 0
                        twin.push(popped, written)
                        used += 1
                    told = native.interrupt()
                    assert told == twin.interrupt()
                    assert told or not (wants and used), "a driver that listens was not interrupted"
                    wants = wants and not told
                    assert guest.contents == twin.ram.data
                case "arm":
                    twin.ram = Copy(guest.contents)
                    armed = native.arm()
                    assert armed == twin.arm() == (not waiting)
                    assert guest.contents == twin.ram.data
                    asleep = bool(armed)
                case "listen":
                    # Like a driver: look, ask for an interrupt, look again.
                    list(driver.used())
                    driver.interrupts(on=True)
                    used, wants = 0, True
                case "collect":
                    list(driver.used())
                    used = 0
                    if not wants or event_idx:
                        driver.interrupts(on=False)
                        wants = False
        for popped, written in held:
            assert native.push(popped, written) == 0
        while isinstance(popped := native.pop(), Popped):
            assert native.push(popped, 0) == 0
        list(driver.used())
        assert not driver.flight
        assert driver.room == size
        assert native.error == lib.PV_QUEUE_OK


def descriptor(random: Random, size: int, packed: bool) -> bytes:
    gpa = random.choice(
        [DATA, DATA, DATA, TABLES, BASE + SIZE - 8, BASE + SIZE, 0, (1 << 64) - 8, BASE, TABLES + PAGE - 32]
    )
    length = random.choice([8, 16, 16, 32, 48, 640, 8192, 0, 24, 0xFFFF_FFFF, 0x8000_0000])
    flags = random.choice([0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 0x80, 0x8000, 0xFFF8])
    other = random.choice([*range(size), *range(size), size, 0xFFFF])
    if packed:
        flags |= random.choice([0x80, 0x80, 0x80, 0, 0x8080, 0x8000])
        return struct.pack("<QIHH", gpa, length, other, flags)
    return struct.pack("<QIHH", gpa, length, flags, other)


@settings(max_examples=400)
@given(seed=st.integers(0, 1 << 32))
def test_the_loop_and_its_twin_see_the_same_in_any_rings(guest: Guest, seed: int) -> None:
    random = Random(seed)
    packed, event_idx = random.choice(KINDS)
    size = random.choice([1, 2, 3, 8] if packed else [1, 2, 4, 8])
    places = [BASE, BASE + PAGE, BASE + 2 * PAGE, BASE + HALF - 16, BASE + SIZE - 16, BASE + SIZE, 1 << 63, 0]
    weights = [60, 60, 60, 4, 1, 1, 1, 1]
    descriptors, driver, device = random.choices(places, weights, k=3)
    rings = Rings(size, descriptors, driver, device, packed, event_idx, random.random() < 0.8)
    data = bytearray(EMPTY)

    def place(gpa: int, what: bytes) -> None:
        at = gpa - BASE
        if 0 <= at < SIZE:
            data[at : at + len(what)] = what[: SIZE - at]

    for at in (descriptors, TABLES, TABLES + PAGE - 32):
        place(at, b"".join(descriptor(random, size, packed) for _ in range(40 if at != descriptors else size)))
    if driver != descriptors:
        words = [random.choice([0, 1, 2, size, 0xFFFF]), random.choice([1, 1, 2, size, size + 1, 0xFFFF])]
        words += [random.choice([*range(size), *range(size), 0xFFFF]) for _ in range(size + 1)]
        place(driver, struct.pack(f"<{len(words)}H", *words))
    guest.close_pages(())
    guest.load(bytes(data))
    closed = {random.randrange(SIZE // PAGE)} if random.random() < 0.2 else set()
    guest.close_pages(closed)
    room = random.choice([1, 3, 256])
    copy = Copy(bytes(data), closed)
    twin = Device(copy, rings, room)
    with native_queue(guest.native, rings) as native:
        held: list[tuple[Popped, Popped]] = []
        expected_error = lib.PV_QUEUE_OK
        try:
            for _ in range(12):
                match random.choice(["pop", "pop", "push", "interrupt", "arm"]):
                    case "pop":
                        popped = native.pop(room)
                        expected = twin.pop()
                        assert popped == (0 if expected is None else expected)
                        if isinstance(popped, Popped) and expected is not None:
                            held.append((popped, expected))
                    case "push" if held:
                        ours, theirs = held.pop(0)
                        pushed = native.push(ours, 7)
                        twin.push(theirs, 7)
                        assert pushed == 0
                    case "interrupt":
                        told = native.interrupt()
                        assert told == twin.interrupt()
                    case "arm":
                        armed = native.arm()
                        assert armed == twin.arm()
        except Broken as broken:
            expected_error = broken.error
        assert native.error == expected_error
        if native.error:
            assert native.pop() == -1
            assert not native.interrupt()
    guest.close_pages(())
    assert guest.contents == copy.data


def test_every_kick_is_counted_and_wakes_are_not(fresh: Guest) -> None:
    interrupt = ffi.new("struct pv_interrupt *", {"fd": -1})
    queue = Queue(fresh.native, interrupt, 0, 8)
    try:
        for kicks, wakes in ((0, 1), (3, 0), (5, 2), (1, 0)):
            before = int(queue.native.kicks)
            for _ in range(kicks):
                os.eventfd_write(queue.kick, 1)
            for _ in range(wakes):
                queue.wake()
            assert select.select([queue.kick], [], [], 0)[0]
            queue.take()
            assert not select.select([queue.kick], [], [], 0)[0]
            assert queue.native.kicks - before == kicks
        os.eventfd_write(queue.kick, 2**64 - 2)  # the maximum: a wake finds no room, and needs none
        queue.wake()
        queue.take()
        assert not select.select([queue.kick], [], [], 0)[0]
    finally:
        queue.close()
