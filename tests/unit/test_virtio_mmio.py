"""The transport, and a device behind it, met by drivers that keep to the rules, that do not, and that do anything."""

from __future__ import annotations

import io
import json
import os
import struct
import threading
import time
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from memory_helper import BASE

from pyvmm import log
from pyvmm._native import lib
from pyvmm.devices.virtio.device import Feature, VirtioDevice
from pyvmm.devices.virtio.mmio import VirtioMmio
from pyvmm.devices.virtio.queue import Chain, ChainFault, Queue
from pyvmm.devices.virtio.registers import Register, Status
from pyvmm.devices.virtio.rng import MOST, Rng
from pyvmm.devices.virtio.worker import Stuck, Worker
from tests.twin_virtqueue import Driver, Rings
from tests.virtqueue_rig import HALF, PAGE, SIZE, Guest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MINE = 1 << 5
TABLES, DATA = BASE + 8 * PAGE, BASE + HALF
ACKNOWLEDGED = Status.ACKNOWLEDGE | Status.DRIVER
RUNNING = ACKNOWLEDGED | Status.FEATURES_OK | Status.DRIVER_OK


class Toy(VirtioDevice):
    """Answers with what it was given, in upper case; ``hold`` makes it wait in the middle of that."""

    device_id: ClassVar[int] = 42
    name: ClassVar[str] = "toy"
    queue_sizes = (8, 4)
    features = MINE

    def __init__(self) -> None:
        super().__init__()
        self.worker = Worker("toy", self.failed)
        self.hold = threading.Event()
        self.hold.set()
        self.busy = threading.Event()
        self.started: list[int] = []
        self.settings = bytearray(b"\x01\x02\x03\x04toy!")

    def config(self) -> bytes:
        return bytes(self.settings)

    def write_config(self, offset: int, data: bytes) -> None:
        self.settings[offset : offset + len(data)] = data

    def start(self, queues: Sequence[Queue], features: int) -> None:
        self.started.append(features)
        for queue in queues:
            if queue.ready:
                self.worker.watch(queue, lambda queue=queue: queue.serve(self.answer))  # type: ignore[misc]
        self.worker.start(queues)

    def answer(self, chain: Chain) -> int:
        self.busy.set()
        self.hold.wait()
        try:
            return chain.write(0, chain.read(0, 4096).upper())
        except ChainFault:
            return 0

    def stop(self) -> None:
        self.worker.stop(patience=5)

    def pause(self) -> None:
        self.worker.pause(patience=5)

    def resume(self) -> None:
        self.worker.resume()

    def close(self) -> None:
        self.worker.close()


class Board:
    """A transport as a vCPU reaches it: what the native loop answers by itself is answered here."""

    def __init__(self, guest: Guest, device: VirtioDevice, *, private: bool = False) -> None:
        self.guest, self.device = guest, device
        self.transport = VirtioMmio(device, guest.native, private=private)
        self.windows = self.transport.windows()

    def _window(self, offset: int, size: int) -> int | None:
        """The kind of the window; None for an access that no window holds, which aborts in the guest."""
        for start, length, kind, _ in self.windows:
            if start <= offset and offset + size <= start + length:
                return kind
        return None

    def load(self, offset: int, size: int = 4) -> int:
        match self._window(offset, size):
            case lib.PV_KIND_COLD:
                value = self.transport.read(offset, size, 0)
                assert 0 <= value < 1 << 8 * size
                return value
            case lib.PV_KIND_VIRTIO if (offset, size) == (Register.INTERRUPT_STATUS, 4):
                return int(self.transport.interrupt.status)
        return 0

    def store(self, offset: int, value: int, size: int = 4) -> None:
        value &= (1 << 8 * size) - 1
        match self._window(offset, size):
            case lib.PV_KIND_COLD:
                self.transport.write(offset, size, value, 0)
            case lib.PV_KIND_DOORBELL if offset == Register.QUEUE_NOTIFY and value < len(self.transport.queues):
                os.eventfd_write(self.transport.queues[value].kick, 1)
            case lib.PV_KIND_VIRTIO if (offset, size) == (Register.INTERRUPT_ACK, 4):
                self.transport.interrupt.status &= ~value & 0xFFFF_FFFF

    # -- a driver that follows the rules

    @property
    def status(self) -> Status:
        return Status(self.load(Register.STATUS))

    def offered(self) -> int:
        features = 0
        for number in range(4):
            self.store(Register.DEVICE_FEATURES_SEL, number)
            features |= self.load(Register.DEVICE_FEATURES) << 32 * number
        return features

    def negotiate(self, features: int) -> bool:
        """Reset, ask for features; whether they were granted."""
        for status in (0, Status.ACKNOWLEDGE, ACKNOWLEDGED):
            self.store(Register.STATUS, status)
        for number in range(4):
            self.store(Register.DRIVER_FEATURES_SEL, number)
            self.store(Register.DRIVER_FEATURES, features >> 32 * number)
        self.store(Register.STATUS, ACKNOWLEDGED | Status.FEATURES_OK)
        return Status.FEATURES_OK in self.status

    def set_queue(self, number: int, size: int, descriptors: int, driver: int, device: int) -> bool:
        """Whether it is ready."""
        self.store(Register.QUEUE_SEL, number)
        self.store(Register.QUEUE_SIZE, size)
        for register, gpa in (
            (Register.QUEUE_DESC_LOW, descriptors),
            (Register.QUEUE_DRIVER_LOW, driver),
            (Register.QUEUE_DEVICE_LOW, device),
        ):
            self.store(register, gpa)
            self.store(register + 4, gpa >> 32)
        self.store(Register.QUEUE_READY, 1)
        return bool(self.load(Register.QUEUE_READY))

    def drive(self, *, packed: bool = False, event_idx: bool = False, more: int = 0) -> list[Driver]:
        """Do all of it; returns a driver for each queue."""
        features = Feature.VERSION_1 | Feature.INDIRECT_DESC | more
        features |= Feature.RING_PACKED * packed | Feature.EVENT_IDX * event_idx
        assert self.negotiate(features)
        drivers = []
        for number, size in enumerate(self.device.queue_sizes):
            at = BASE + number * 3 * PAGE
            size = min(size, 16)
            rings = Rings(size, at, at + PAGE, at + 2 * PAGE, packed, event_idx)
            for area in (rings.descriptors, rings.driver, rings.device):
                self.guest.write(area, bytes(PAGE))
            assert self.set_queue(number, size, rings.descriptors, rings.driver, rings.device)
            drivers.append(Driver(self.guest, rings, TABLES))
        self.store(Register.STATUS, RUNNING)
        return drivers

    def close(self) -> None:
        self.transport.close()


@pytest.fixture(scope="module")
def memory() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def guest(memory: Guest) -> Guest:
    memory.close_pages(())
    memory.load(bytes(SIZE))
    return memory


@pytest.fixture
def toy(guest: Guest) -> Iterator[Board]:
    board = Board(guest, Toy())
    yield board
    board.device.hold.set()  # type: ignore[attr-defined]
    board.close()


@pytest.fixture
def events() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    stream = io.StringIO()
    log.configure(0, json=True, stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    log.configure(0)


def eventually(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def ask(board: Board, driver: Driver, text: bytes, queue: int = 0) -> None:
    board.guest.write(DATA, text)
    assert driver.add([(DATA, len(text), False), (DATA + PAGE, 64, True)]) is not None
    board.store(Register.QUEUE_NOTIFY, queue)


def answer(board: Board, driver: Driver) -> bytes:
    done: list[tuple[int, int]] = []
    eventually(lambda: done.extend(driver.used()) or done)
    return board.guest.read(DATA + PAGE, done[0][1])


# ---- registers


def test_a_driver_finds_out_what_it_is(toy: Board) -> None:
    assert [toy.load(offset) for offset in (0, 4, 8)] == [0x7472_6976, 2, 42]
    wanted = MINE | Feature.VERSION_1 | Feature.RING_PACKED | Feature.INDIRECT_DESC | Feature.EVENT_IDX
    assert toy.offered() == wanted
    sizes = []
    for number in (0, 1, 2, 0xFFFF_FFFF):
        toy.store(Register.QUEUE_SEL, number)
        sizes.append(toy.load(Register.QUEUE_SIZE_MAX))
    assert sizes == [8, 4, 0, 0]
    assert toy.load(Register.SHM_LEN_LOW) == toy.load(Register.SHM_LEN_HIGH) == 0xFFFF_FFFF


@pytest.mark.parametrize("size", [1, 2, 8])
def test_registers_are_32_bits_wide_and_no_other_access_does_anything(toy: Board, size: int) -> None:
    toy.drive()
    before = [toy.load(offset) for offset in range(0, 0x100, 4)]
    for offset in range(0x100):
        assert toy.load(offset, size) == 0
        if offset != Register.QUEUE_NOTIFY:
            toy.store(offset, 0, size)
            toy.store(offset, 0xFFFF_FFFF_FFFF_FFFF, size)
    for offset in set(range(0x100)) - set(range(0, 0x100, 4)):
        assert toy.load(offset) == 0
        toy.store(offset, 0)
    assert [toy.load(offset) for offset in range(0, 0x100, 4)] == before


def test_configuration_space_takes_any_width_and_ends(toy: Board) -> None:
    assert [toy.load(0x100, size) for size in (1, 2, 4, 8)] == [1, 0x201, 0x0403_0201, 0x2179_6F74_0403_0201]
    assert toy.load(0x107, 8) == ord("!")
    assert toy.load(0x1F8, 8) == 0
    toy.store(0x101, 0xAABB, 2)
    toy.store(0x106, 0xFFFF_FFFF)
    assert toy.load(0x100, 8) == 0x2179_6F74_04AA_BB01


def test_a_changed_configuration_is_counted_and_told(toy: Board) -> None:
    toy.device.config_changed()
    assert toy.load(Register.INTERRUPT_STATUS) == 0
    generation = toy.load(Register.CONFIG_GENERATION)
    toy.drive()
    toy.device.config_changed()
    assert toy.load(Register.CONFIG_GENERATION) == generation + 1
    assert toy.load(Register.INTERRUPT_STATUS) == 2
    toy.store(Register.INTERRUPT_ACK, 2)
    assert toy.load(Register.INTERRUPT_STATUS) == 0


# ---- order


@pytest.mark.parametrize(
    "features",
    [
        0,
        MINE,
        Feature.VERSION_1 | 1,
        Feature.VERSION_1 | 1 << 40,
        Feature.VERSION_1 | Feature.ACCESS_PLATFORM,
        1 << 127,
    ],
)
def test_features_that_are_not_offered_are_refused_and_so_are_old_drivers(toy: Board, features: int) -> None:
    assert not toy.negotiate(features)
    toy.store(Register.STATUS, RUNNING)
    assert toy.status == ACKNOWLEDGED
    assert toy.device.started == []  # type: ignore[attr-defined]


def test_private_memory_needs_a_driver_that_shares(guest: Guest) -> None:
    board = Board(guest, Toy(), private=True)
    assert board.offered() & Feature.ACCESS_PLATFORM
    assert not board.negotiate(Feature.VERSION_1)
    assert board.negotiate(Feature.VERSION_1 | Feature.ACCESS_PLATFORM)
    board.close()


def test_features_stand_once_they_are_granted(toy: Board) -> None:
    assert toy.negotiate(Feature.VERSION_1 | MINE)
    for number in range(4):
        toy.store(Register.DRIVER_FEATURES_SEL, number)
        toy.store(Register.DRIVER_FEATURES, 0)
    toy.store(Register.STATUS, RUNNING)
    assert toy.device.started == [Feature.VERSION_1 | MINE]  # type: ignore[attr-defined]


@pytest.mark.parametrize("status", [Status.DRIVER, Status.DRIVER_OK, Status.FEATURES_OK, RUNNING ^ Status.DRIVER, 0x30])
def test_status_bits_out_of_order_are_not_set(toy: Board, status: int) -> None:
    toy.store(Register.STATUS, status)
    assert toy.status & ~Status.ACKNOWLEDGE == 0
    assert toy.device.started == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [0, 3, 16, 6, 65535, 0xFFFF_FFFF])
def test_queues_of_impossible_sizes_are_refused(toy: Board, events: Any, size: int) -> None:
    assert toy.negotiate(Feature.VERSION_1)
    assert not toy.set_queue(0, size, BASE, BASE + PAGE, BASE + 2 * PAGE)
    assert "possible" in events()[-1]["reason"]
    assert toy.set_queue(0, 8, BASE, BASE + PAGE, BASE + 2 * PAGE)


def test_a_packed_queue_may_have_any_number_of_entries(toy: Board) -> None:
    assert toy.negotiate(Feature.VERSION_1 | Feature.RING_PACKED)
    assert toy.set_queue(0, 3, BASE, BASE + PAGE, BASE + 2 * PAGE)


@pytest.mark.parametrize("areas", [(8, 0, 0), (0, 1, 0), (0, 0, 2), ((1 << 64) - 16, 0, 0), (0, 0, (1 << 64) - 4)])
def test_queues_that_are_not_aligned_or_run_over_the_end_are_refused(toy: Board, areas: tuple[int, int, int]) -> None:
    assert toy.negotiate(Feature.VERSION_1)
    assert not toy.set_queue(0, 8, *areas)


def test_queues_are_set_up_between_features_and_start_only(toy: Board) -> None:
    toy.store(Register.STATUS, ACKNOWLEDGED)
    assert not toy.set_queue(0, 8, BASE, BASE + PAGE, BASE + 2 * PAGE)
    toy.drive()
    toy.store(Register.QUEUE_SEL, 0)
    toy.store(Register.QUEUE_READY, 0)
    assert toy.load(Register.QUEUE_READY) == 1
    assert not toy.set_queue(2, 8, BASE, BASE + PAGE, BASE + 2 * PAGE)


def test_a_guest_that_errs_for_ever_fills_no_log(toy: Board, events: Any) -> None:
    for _ in range(1000):
        toy.store(Register.STATUS, RUNNING ^ Status.DRIVER)
    assert 1 <= len(events()) <= 10


# ---- requests


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
def test_requests_are_answered_with_an_interrupt(toy: Board, packed: bool, event_idx: bool) -> None:
    drivers = toy.drive(packed=packed, event_idx=event_idx)
    for number in range(20):
        for queue, driver in enumerate(drivers):
            driver.interrupts(on=True)
            text = f"request {number} {queue}".encode()
            ask(toy, driver, text, queue)
            eventually(lambda: toy.load(Register.INTERRUPT_STATUS) == 1)
            assert answer(toy, driver) == text.upper()
            toy.store(Register.INTERRUPT_ACK, 1)


def test_kicks_before_the_start_are_nothing_and_what_was_there_is_seen_then(toy: Board) -> None:
    assert toy.negotiate(Feature.VERSION_1)
    assert toy.set_queue(0, 8, BASE, BASE + PAGE, BASE + 2 * PAGE)
    driver = Driver(toy.guest, Rings(8, BASE, BASE + PAGE, BASE + 2 * PAGE), TABLES)
    ask(toy, driver, b"early")
    time.sleep(0.02)
    assert list(driver.used()) == []
    toy.store(Register.STATUS, RUNNING)
    assert answer(toy, driver) == b"EARLY"


def test_a_request_in_memory_that_is_none_fails_and_the_next_is_served(toy: Board) -> None:
    [driver, _] = toy.drive()
    driver.add([(BASE + SIZE, 4, False), (DATA, 4, True)])
    toy.store(Register.QUEUE_NOTIFY, 0)
    eventually(lambda: list(driver.used()) == [(0, 0)])
    ask(toy, driver, b"next")
    assert answer(toy, driver) == b"NEXT"


@pytest.mark.parametrize("where", [BASE + SIZE, 0x0A00_0000, BASE + SIZE - 8, "private"])
def test_a_queue_without_memory_breaks_and_a_reset_mends_it(toy: Board, events: Any, where: int | str) -> None:
    ring = BASE + 2 * PAGE if where == "private" else where
    assert toy.negotiate(Feature.VERSION_1)
    assert isinstance(ring, int)
    assert toy.set_queue(0, 8, BASE, BASE + PAGE, ring)
    driver = Driver(toy.guest, Rings(8, BASE, BASE + PAGE, BASE + 3 * PAGE), TABLES)
    if where == "private":
        toy.guest.close_pages([2])
    toy.store(Register.STATUS, RUNNING)
    ask(toy, driver, b"request")
    eventually(lambda: Status.NEEDS_RESET in toy.status)
    eventually(lambda: toy.load(Register.INTERRUPT_STATUS) & 2)
    assert "cannot be touched" in events()[-1]["reason"]
    toy.store(Register.STATUS, RUNNING)
    assert toy.status == RUNNING | Status.NEEDS_RESET
    toy.guest.close_pages(())
    [driver, _] = toy.drive()
    ask(toy, driver, b"better")
    assert answer(toy, driver) == b"BETTER"


def test_a_reset_waits_for_the_request_at_hand_and_leaves_nothing(toy: Board) -> None:
    device = toy.device
    assert isinstance(device, Toy)
    [driver, _] = toy.drive()
    device.hold.clear()
    ask(toy, driver, b"slow")
    assert device.busy.wait(20)
    reset = threading.Thread(target=toy.store, args=(Register.STATUS, 0))
    reset.start()
    reset.join(0.05)
    assert reset.is_alive()
    device.hold.set()
    reset.join(20)
    assert not reset.is_alive()
    assert toy.status == 0
    assert toy.load(Register.INTERRUPT_STATUS) == 0
    assert [queue.ready for queue in toy.transport.queues] == [False, False]
    assert driver.word(BASE + 2 * PAGE + 2) == 1, "the request at hand was finished"
    # What comes afterwards is none of the device's business.
    ask(toy, driver, b"late")
    time.sleep(0.02)
    assert driver.word(BASE + 2 * PAGE + 2) == 1


def test_a_device_that_does_not_let_go_is_told_in_bounded_time(toy: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    device = toy.device
    assert isinstance(device, Toy)
    [driver, _] = toy.drive()
    device.hold.clear()
    ask(toy, driver, b"stuck")
    assert device.busy.wait(20)
    monkeypatch.setattr(device, "stop", lambda: device.worker.stop(patience=0.05))
    with pytest.raises(Stuck, match="toy has not finished"):
        toy.store(Register.STATUS, 0)


def test_a_paused_device_stands_still_and_sees_what_came_when_it_resumes(toy: Board) -> None:
    [driver, _] = toy.drive()
    toy.transport.pause()
    ask(toy, driver, b"meanwhile")
    time.sleep(0.02)
    assert list(driver.used()) == []
    toy.transport.resume()
    assert answer(toy, driver) == b"MEANWHILE"


def test_descriptors_that_change_under_the_device_break_the_queue_or_the_request(toy: Board) -> None:
    """One vCPU rewrites a table over and over while another kicks: nothing but failed requests may come of it."""
    random = Random(1)
    ends = time.monotonic() + 0.5
    rounds = broken = 0
    while time.monotonic() < ends:
        [driver, _] = toy.drive(packed=bool(rounds & 1), event_idx=True)
        rounds += 1
        for _ in range(30):
            if driver.add([(DATA, 8, False), (DATA + PAGE, 64, True)], indirect=True) is None:
                list(driver.used())
            toy.store(Register.QUEUE_NOTIFY, 0)
            for place in (TABLES, BASE):
                descriptor = struct.pack("<QIHH", DATA, random.choice([8, 0, 1 << 31]), random.randrange(8), 1)
                toy.guest.write(place + 16 * random.randrange(2), descriptor)
            broken += Status.NEEDS_RESET in toy.status
    assert rounds > 1
    assert broken


# ---- entropy


def test_entropy_fills_what_it_is_given_up_to_its_bound(guest: Guest) -> None:
    board = Board(guest, Rng())
    [driver] = board.drive(packed=True)
    driver.add([(DATA, 64, True), (DATA + PAGE, 2 * PAGE, True)])
    board.store(Register.QUEUE_NOTIFY, 0)
    done: list[tuple[int, int]] = []
    eventually(lambda: done.extend(driver.used()) or done)
    assert done[0][1] == MOST
    assert guest.read(DATA, 64).count(0) < 16
    assert guest.read(DATA + PAGE + MOST - 64, 64) == bytes(64)
    board.close()


# ---- anything


OFFSETS = st.one_of(
    st.sampled_from([*Register]), st.integers(0, 0x1FF), st.sampled_from([0x54, 0x68, 0x9C, 0xC0, 0x100, 0x104])
)
VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 11, 15, 64, 128, 0xFFFF, 0xFFFF_FFFF, BASE, BASE + PAGE, BASE + SIZE - 16]),
    st.integers(0, (1 << 64) - 1),
)


class Anything(RuleBasedStateMachine):
    """A guest that does anything: no access may fail, and after a reset all is as it was at first."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = Guest()
        log.configure(-1)

    @initialize(private=st.booleans())
    def build(self, private: bool) -> None:
        self.private = private
        self.board = Board(self.guest, Toy(), private=private)
        self.drivers: list[Driver] = []

    @rule(offset=OFFSETS, size=st.sampled_from([4, 4, 4, 1, 2, 8]))
    def read(self, offset: int, size: int) -> None:
        self.board.load(offset, size)

    @rule(offset=OFFSETS, size=st.sampled_from([4, 4, 4, 1, 2, 8]), value=VALUES)
    def write(self, offset: int, size: int, value: int) -> None:
        self.board.store(offset, value, size)

    @rule(packed=st.booleans(), event_idx=st.booleans())
    def behave(self, packed: bool, event_idx: bool) -> None:
        more = Feature.ACCESS_PLATFORM if self.private else 0
        self.drivers = self.board.drive(packed=packed, event_idx=event_idx, more=more)

    @rule(queue=st.integers(0, 1), indirect=st.booleans(), count=st.integers(1, 4))
    def request(self, queue: int, indirect: bool, count: int) -> None:
        if self.drivers:
            segments = [(DATA + 64 * number, 64, number > 0) for number in range(count)]
            self.drivers[queue].add(segments, indirect=indirect)
            self.board.store(Register.QUEUE_NOTIFY, queue)

    @rule(area=st.integers(0, 5), offset=st.integers(0, 64), data=st.binary(min_size=1, max_size=16))
    def scribble(self, area: int, offset: int, data: bytes) -> None:
        self.guest.write(BASE + area * PAGE + offset, data)
        self.board.store(Register.QUEUE_NOTIFY, area // 3)

    @rule(gpa=st.sampled_from([DATA, BASE, BASE + SIZE, 0]), size=st.sampled_from([0, 16, 64, 0xFFFF_FFFF]),
          flags=st.integers(0, 7), following=st.integers(0, 8), place=st.integers(0, 7))  # fmt: skip
    def describe(self, gpa: int, size: int, flags: int, following: int, place: int) -> None:
        self.guest.write(BASE + 16 * place, struct.pack("<QIHH", gpa, size, flags, following))
        self.board.store(Register.QUEUE_NOTIFY, 0)

    @invariant()
    def stands(self) -> None:
        device = self.board.device
        assert isinstance(device, Toy)
        status = self.board.transport.status
        if Status.DRIVER_OK in status and Status.NEEDS_RESET not in status:
            # Whoever looks while it gives up sees it run, or the bit.
            eventually(lambda: device.worker.alive or Status.NEEDS_RESET in self.board.transport.status)

    def teardown(self) -> None:
        self.board.store(Register.STATUS, 0)
        assert self.board.status == 0
        assert self.board.load(Register.INTERRUPT_STATUS) == 0
        [driver, _] = self.board.drive(packed=True, more=Feature.ACCESS_PLATFORM if self.private else 0)
        ask(self.board, driver, b"after all")
        assert answer(self.board, driver) == b"AFTER ALL"
        self.board.close()
        self.guest.close()
        log.configure(0)


Anything.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestAnything = Anything.TestCase
