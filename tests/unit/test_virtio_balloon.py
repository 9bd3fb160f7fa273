# SPDX-License-Identifier: Apache-2.0
"""The balloon device: which pages the host gets, which it never gets, and what the two sides tell each other."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pyvmm.devices.virtio.balloon import DEFLATE, F_DEFLATE_ON_OOM, F_REPORTING, INFLATE, MOST, VirtioBalloon
from pyvmm.errors import PyvmmError, UsageError
from pyvmm.memory import mman
from pyvmm.uapi.falloc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from tests.unit.plain_guest import BASE, PAGE, SIZE, Segment
from tests.unit.queue_driver import RAM, Driver

FIRST = BASE // PAGE
LAST = FIRST + SIZE // PAGE
NAMES = BASE + 0x1_4000
"""Behind the rings."""


class Memory:
    """The driver's memory as the balloon sees it, with a record of punched holes."""

    def __init__(self) -> None:
        self.driver: Driver | None = None
        self.punched: list[tuple[int, int]] = []
        self.refuses: str | None = None

    def contains(self, gpa: int, size: int = 1) -> bool:
        return gpa >= BASE and gpa + size <= BASE + SIZE

    def punch(self, gpa: int, size: int) -> None:
        if self.refuses:
            raise PyvmmError(self.refuses)
        assert self.driver is not None
        assert gpa % PAGE == size % PAGE == 0
        self.punched.append((gpa, size))
        mman.fallocate(self.driver.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, gpa - BASE, size)


class Guest:
    """A driver that names pages; ``reporting`` is its reporting queue, as in Linux or as specified."""

    def __init__(self, reporting: int = 2) -> None:
        self.memory = Memory()
        self.balloon = VirtioBalloon(self.memory, RAM)
        self.driver = self.memory.driver = Driver(self.balloon, queues=(INFLATE, DEFLATE, reporting))
        self.reporting = self.driver.rings[reporting]

    def name(self, numbers: Sequence[int], queue: int = INFLATE) -> None:
        data = struct.pack(f"<{len(numbers)}I", *numbers)
        self.driver.write(NAMES, data)
        ring = self.driver.rings[queue]
        ring.give(Segment(NAMES, max(len(data), 1)))
        ring.wait()

    def report(self, *ranges: tuple[int, int]) -> None:
        self.reporting.give(*(Segment(gpa, size, True) for gpa, size in ranges))
        self.reporting.wait()

    @property
    def resident(self) -> int:
        return os.fstat(self.driver.fd).st_blocks * 512


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    with guest.driver:
        yield guest


def test_the_host_gets_inflated_pages_in_as_few_pieces_as_possible(guest: Guest) -> None:
    pages = [FIRST + n for n in (300, 302, 301, 500, 300)]
    for page in pages:
        guest.driver.write(page * PAGE, b"x" * PAGE)
    guest.name([])
    before = guest.resident
    guest.name(pages)
    assert guest.memory.punched == [((FIRST + 300) * PAGE, 3 * PAGE), ((FIRST + 500) * PAGE, PAGE)]
    assert guest.resident == before - 4 * PAGE
    assert guest.driver.read((FIRST + 301) * PAGE, PAGE) == bytes(PAGE)
    assert guest.balloon.punched == 4 * PAGE


def test_a_page_inflated_twice_is_zeroed_twice(guest: Guest) -> None:
    guest.name([FIRST + 300])
    guest.driver.write((FIRST + 300) * PAGE, b"back in use")
    guest.name([FIRST + 300])
    assert guest.driver.read((FIRST + 300) * PAGE, 16) == bytes(16)


def test_a_deflate_does_not_change_memory(guest: Guest) -> None:
    guest.driver.write((FIRST + 300) * PAGE, b"mine")
    guest.name([FIRST + 300], DEFLATE)
    assert guest.memory.punched == []
    assert guest.driver.read((FIRST + 300) * PAGE, 4) == b"mine"


@pytest.mark.parametrize("number", [0, FIRST - 1, LAST, 0xFFFF_FFFF])
def test_pages_outside_ram_are_ignored(guest: Guest, number: int) -> None:
    guest.name([number])
    assert guest.memory.punched == []
    assert guest.balloon.refused == 1


def test_pages_of_rings_are_kept_even_if_the_guest_gives_them(guest: Guest) -> None:
    rings = [ring.base // PAGE for ring in guest.driver.rings[:3]]
    for number in rings:
        guest.name([number])
    guest.report((BASE, SIZE))
    assert guest.memory.punched == []
    assert guest.balloon.refused == 4


def test_page_numbers_beyond_the_limit_and_odd_bytes_are_ignored(guest: Guest) -> None:
    guest.driver.write(NAMES, struct.pack("<I", FIRST + 300) * (MOST + 8) + b"xyz")
    guest.driver.rings[INFLATE].give(Segment(NAMES, 3))
    guest.driver.rings[INFLATE].give(Segment(NAMES, 4 * MOST + 32 + 3))
    guest.driver.rings[INFLATE].wait(2)
    assert guest.memory.punched == [((FIRST + 300) * PAGE, PAGE)]


@pytest.mark.parametrize("queue", [2, 4])
def test_reports_come_by_the_queue_linux_uses_or_the_specified_one(queue: int) -> None:
    guest = Guest(queue)
    with guest.driver:
        guest.report((BASE + 0x20_0000, 0x10_0000), (BASE + 0x38_0100, 0x3000))
        assert guest.memory.punched == [(BASE + 0x20_0000, 0x10_0000), (BASE + 0x38_1000, 0x2000)]


def test_a_report_of_less_than_a_page_or_outside_ram_is_ignored(guest: Guest) -> None:
    guest.report((BASE + 0x20_0100, 0x800), (0x900_0000, PAGE), (BASE + SIZE - PAGE, 2 * PAGE))
    assert guest.memory.punched == []
    assert guest.balloon.refused == 2


def test_a_report_without_the_feature_is_not_served() -> None:
    guest = Guest()
    with guest.driver:
        guest.balloon.stop()
        guest.driver.rings[2].setup()
        guest.balloon.start(guest.driver.queues, F_DEFLATE_ON_OOM)
        guest.reporting.give(Segment(BASE + 0x20_0000, PAGE, True))
        guest.name([])
        assert guest.reporting.used() == []
    assert F_REPORTING & guest.balloon.features


def test_page_numbers_in_a_private_page_fail_only_their_request(guest: Guest) -> None:
    guest.driver.hide(NAMES + PAGE)
    guest.driver.rings[INFLATE].give(Segment(NAMES + PAGE, 4))
    guest.driver.rings[INFLATE].wait()
    guest.name([FIRST + 300])
    assert len(guest.memory.punched) == 1


def test_a_host_that_cannot_take_a_page_logs_it_and_goes_on(guest: Guest) -> None:
    guest.memory.refuses = "no"
    guest.name([FIRST + 300])
    guest.memory.refuses = None
    guest.name([FIRST + 301])
    assert guest.balloon.punched == PAGE


def test_the_target_is_in_pages_and_the_guests_answer_is_bounded(guest: Guest) -> None:
    guest.balloon.aim(1 << 20)
    assert struct.unpack_from("<I", guest.balloon.config()) == (256,)
    assert guest.driver.transport.changes == 1
    guest.balloon.write_config(4, struct.pack("<I", 100))
    assert guest.balloon.actual == 100 * PAGE
    guest.balloon.write_config(4, b"\xff" * 4)
    guest.balloon.write_config(0, b"\xff" * 4)
    guest.balloon.write_config(6, b"\xff" * 4)
    assert guest.balloon.actual == SIZE
    assert guest.balloon.target == 1 << 20
    for size in (-1, SIZE + 1):
        with pytest.raises(UsageError, match="balloon"):
            guest.balloon.aim(size)


def test_a_restored_device_has_the_saved_sizes() -> None:
    one, other = VirtioBalloon(Memory(), RAM, 1 << 20), VirtioBalloon(Memory(), RAM)
    one.write_config(4, struct.pack("<I", 9))
    other.load(one.save())
    assert (other.target, other.actual) == (1 << 20, 9 * PAGE)
    one.close()
    other.close()


class Pages(RuleBasedStateMachine):
    """The host gets only pages that the guest names, and only whole pages of RAM that are not rings."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = Guest()
        self.kept = {BASE // PAGE + n for n in range(0x14)}
        self.kept.add(NAMES // PAGE)
        self.full: dict[int, bytes] = {}

    def teardown(self) -> None:
        self.guest.driver.__exit__()

    @rule(page=st.integers(FIRST + 0x20, LAST - 1), byte=st.integers(1, 255))
    def touches(self, page: int, byte: int) -> None:
        self.guest.driver.write(page * PAGE, bytes([byte]) * PAGE)
        self.full[page] = bytes([byte])

    @rule(names=st.lists(st.one_of(st.integers(FIRST - 2, LAST + 2), st.integers(0, (1 << 32) - 1)), max_size=40))
    def inflates(self, names: list[int]) -> None:
        before = len(self.guest.memory.punched)
        self.guest.name([name for name in names if name != NAMES // PAGE])
        for gpa, size in self.guest.memory.punched[before:]:
            gone = set(range(gpa // PAGE, (gpa + size) // PAGE))
            assert gone <= set(names) & set(range(FIRST, LAST))
            for page in gone:
                self.full.pop(page, None)

    @rule(start=st.integers(FIRST - 1, LAST), size=st.integers(1, 5 * PAGE), skew=st.integers(0, PAGE - 1))
    def reports(self, start: int, size: int, skew: int) -> None:
        gpa = start * PAGE + skew
        before = len(self.guest.memory.punched)
        self.guest.report((gpa, size))
        for punched, length in self.guest.memory.punched[before:]:
            assert gpa <= punched
            assert punched + length <= gpa + size
            for page in range(punched // PAGE, (punched + length) // PAGE):
                self.full.pop(page, None)

    @rule(names=st.lists(st.integers(0, (1 << 32) - 1), max_size=9))
    def deflates(self, names: list[int]) -> None:
        self.guest.name(names, DEFLATE)

    @rule()
    def resets(self) -> None:
        self.guest.driver.restart()

    @invariant()
    def what_was_not_named_is_as_it_was(self) -> None:
        for page, byte in self.full.items():
            assert self.guest.driver.read(page * PAGE, PAGE) == byte * PAGE

    @invariant()
    def the_rings_hold(self) -> None:
        assert not self.guest.driver.transport.reset_needed


Pages.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]  # to it each is the metaclass's
)
TestPages = Pages.TestCase
