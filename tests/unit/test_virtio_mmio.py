# SPDX-License-Identifier: Apache-2.0
"""The transport's registers, used by correct drivers, by wrong ones, and by drivers that do anything.

Drivers that do anything meet each device in its own threads here. tests/fuzz tries one input after the other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pyvmm import log
from pyvmm.devices.virtio.device import Feature, VirtioDevice
from pyvmm.devices.virtio.registers import Register, Status
from pyvmm.errors import UsageError
from tests.fuzz.devices import Input
from tests.fuzz.hosts import HOSTS
from tests.memory_helper import BASE
from tests.twin_virtqueue import Driver
from tests.unit.test_hostile_drivers import HONEST
from tests.virtio_board import ACKNOWLEDGED, DATA, MINE, RUNNING, Board, Toy, answer, ask, eventually
from tests.virtqueue_rig import PAGE, SIZE, Guest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.devices.virtio.queue import Queue

# ---- registers


def test_a_driver_can_identify_the_device(toy: Board) -> None:
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
def test_registers_are_32_bits_wide_and_other_accesses_have_no_effect(toy: Board, size: int) -> None:
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


def test_the_configuration_space_allows_any_width_up_to_its_end(toy: Board) -> None:
    assert [toy.load(0x100, size) for size in (1, 2, 4, 8)] == [1, 0x201, 0x0403_0201, 0x2179_6F74_0403_0201]
    assert toy.load(0x107, 8) == ord("!")
    assert toy.load(0x1F8, 8) == 0
    toy.store(0x101, 0xAABB, 2)
    toy.store(0x106, 0xFFFF_FFFF)
    assert toy.load(0x100, 8) == 0x2179_6F74_04AA_BB01


def test_a_changed_configuration_raises_the_generation_and_an_interrupt(toy: Board) -> None:
    toy.device.config_changed()
    assert toy.load(Register.INTERRUPT_STATUS) == 0
    generation = toy.load(Register.CONFIG_GENERATION)
    toy.drive()
    toy.device.config_changed()
    assert toy.load(Register.CONFIG_GENERATION) == generation + 1
    assert toy.load(Register.INTERRUPT_STATUS) == 2
    toy.store(Register.INTERRUPT_ACK, 2)
    assert toy.load(Register.INTERRUPT_STATUS) == 0


def test_a_changed_configuration_can_be_read_once_it_is_announced(toy: Board) -> None:
    assert isinstance(toy.device, Toy)
    toy.device.settings[:] = b"\x09"
    toy.device.config_changed()
    assert toy.load(0x100, 8) == 9
    toy.store(0x100, 7, 1)
    toy.store(0x101, 7, 1)  # beyond the present end
    assert toy.load(0x100, 8) == 7


class Moody(Toy):
    """A device whose configuration changes after each step of its driver."""

    def negotiate(self, features: int) -> str | None:
        self.settings[0] = 21
        return super().negotiate(features)

    def start(self, queues: Sequence[Queue], features: int) -> None:
        super().start(queues, features)
        self.settings[0] = 22

    def stop(self) -> None:
        super().stop()
        self.settings[0] = 23


def test_a_driver_reads_the_configuration_that_features_start_or_reset_changed(guest: Guest) -> None:
    board = Board(guest, Moody())
    assert board.load(0x100, 1) == 1
    assert board.negotiate(Feature.VERSION_1)
    assert board.load(0x100, 1) == 21
    board.store(Register.STATUS, RUNNING)
    assert board.load(0x100, 1) == 22
    board.store(Register.STATUS, 0)
    assert board.load(0x100, 1) == 23
    board.close()


def test_a_configuration_that_is_too_long_is_refused(guest: Guest) -> None:
    device = Toy()
    device.settings = bytearray(257)
    with pytest.raises(UsageError, match="toy has 257 bytes of configuration space: 256 are possible"):
        Board(guest, device)
    device.settings = bytearray(range(256))
    board = Board(guest, device)
    assert board.load(0x1FC) == 0xFFFE_FDFC
    board.close()


def test_registers_are_correct_whatever_other_vcpus_select_meanwhile(toy: Board, events: Any) -> None:
    done = threading.Event()

    def select() -> None:
        while not done.is_set():
            for register in (Register.QUEUE_SEL, Register.DRIVER_FEATURES_SEL, Register.DEVICE_FEATURES_SEL):
                for number in (1, 0xFFFF_FFFF, 4, 0):
                    toy.store(register, number)

    other = threading.Thread(target=select)
    other.start()
    try:
        seen = {Register.QUEUE_SIZE_MAX: set[int](), Register.DEVICE_FEATURES: set[int]()}
        ends = time.monotonic() + 1
        while time.monotonic() < ends:
            for register, values in seen.items():
                values.add(toy.load(register))
            for register in (Register.DRIVER_FEATURES, Register.QUEUE_SIZE, Register.QUEUE_READY):
                toy.store(register, 1)
    finally:
        done.set()
        other.join()
    assert seen[Register.QUEUE_SIZE_MAX] <= {8, 4, 0}
    assert seen[Register.DEVICE_FEATURES] <= {toy.transport.offered >> 32 * word & 0xFFFF_FFFF for word in range(3)}
    assert events()


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
def test_features_that_are_not_offered_and_legacy_drivers_are_refused(toy: Board, features: int) -> None:
    assert not toy.negotiate(features)
    toy.store(Register.STATUS, RUNNING)
    assert toy.status == ACKNOWLEDGED
    assert toy.device.started == []  # type: ignore[attr-defined]


def test_private_memory_needs_a_driver_that_shares_pages(guest: Guest) -> None:
    board = Board(guest, Toy(), private=True)
    assert board.offered() & Feature.ACCESS_PLATFORM
    assert not board.negotiate(Feature.VERSION_1)
    assert board.negotiate(Feature.VERSION_1 | Feature.ACCESS_PLATFORM)
    board.close()


def test_features_cannot_change_once_they_are_granted(toy: Board) -> None:
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
def test_queues_that_are_unaligned_or_exceed_memory_are_refused(toy: Board, areas: tuple[int, int, int]) -> None:
    assert toy.negotiate(Feature.VERSION_1)
    assert not toy.set_queue(0, 8, *areas)


def test_queues_can_be_set_up_only_between_features_and_start(toy: Board) -> None:
    toy.store(Register.STATUS, ACKNOWLEDGED)
    assert not toy.set_queue(0, 8, BASE, BASE + PAGE, BASE + 2 * PAGE)
    toy.drive()
    toy.store(Register.QUEUE_SEL, 0)
    toy.store(Register.QUEUE_READY, 0)
    assert toy.load(Register.QUEUE_READY) == 1
    assert not toy.set_queue(2, 8, BASE, BASE + PAGE, BASE + 2 * PAGE)


def test_a_guest_that_errs_forever_does_not_fill_the_log(toy: Board, events: Any) -> None:
    for _ in range(1000):
        toy.store(Register.STATUS, RUNNING ^ Status.DRIVER)
    assert 1 <= len(events()) <= 10


def test_a_guest_that_starts_a_device_forever_does_not_fill_the_log(
    toy: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure(1)
    try:
        for _ in range(20):
            assert toy.negotiate(Feature.VERSION_1)
            toy.store(Register.STATUS, RUNNING)
    finally:
        log.configure(0)
    assert 1 <= capsys.readouterr().err.count("device_started") <= 10


def test_a_guest_that_errs_does_not_wait_for_an_unread_stderr(toy: Board) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * PAGE)
    os.set_blocking(writer, True)
    try:
        with open(writer, "w") as stream:
            log.configure(stream=stream)
            done = threading.Event()

            def guest() -> None:
                toy.store(Register.STATUS, RUNNING ^ Status.DRIVER)
                toy.load(Register.STATUS)
                done.set()

            with log.never_waiting():
                threading.Thread(target=guest, daemon=True).start()
                in_time = done.wait(20)
                os.read(reader, 1 << 20)
    finally:
        log.configure(0)
        os.close(reader)
    assert in_time


# ---- drivers that do anything


OFFSETS = st.one_of(
    st.sampled_from([value for value in vars(Register).values() if isinstance(value, int)]),
    st.integers(0, 0x1FF),
    st.sampled_from([0x54, 0x68, 0x9C, 0xC0, 0x100, 0x104]),
)
VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 11, 15, 64, 128, 0xFFFF, 0xFFFF_FFFF, BASE, BASE + PAGE, BASE + SIZE - 16]),
    st.integers(0, (1 << 64) - 1),
)


class Anything(RuleBasedStateMachine):
    """A guest that does anything: no access may fail, and after a reset the device is as new."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = Guest()
        log.configure(-1)

    def make(self, how: int) -> VirtioDevice:  # noqa: ARG002
        return Toy()

    @initialize(private=st.booleans(), how=st.integers(0, 255))
    def build(self, private: bool, how: int) -> None:
        self.private = private
        self.board = Board(self.guest, self.make(how), private=private)
        self.drivers: list[Driver] = []

    @rule(offset=OFFSETS, size=st.sampled_from([4, 4, 4, 1, 2, 8]))
    def read(self, offset: int, size: int) -> None:
        self.board.load(offset, size)

    @rule(offset=OFFSETS, size=st.sampled_from([4, 4, 4, 1, 2, 8]), value=VALUES)
    def write(self, offset: int, size: int, value: int) -> None:
        self.board.store(offset, value, size)

    @rule(packed=st.booleans(), event_idx=st.booleans(), own=st.booleans())
    def behave(self, packed: bool, event_idx: bool, own: bool) -> None:
        more = Feature.ACCESS_PLATFORM if self.private else 0
        more |= self.board.device.features if own else 0
        self.drivers = self.board.drive(packed=packed, event_idx=event_idx, more=more)

    @rule(queue=st.integers(0, 5), indirect=st.booleans(), count=st.integers(1, 4))
    def request(self, queue: int, indirect: bool, count: int) -> None:
        if queue < len(self.drivers):
            segments = [(DATA + 64 * number, 64, number > 0) for number in range(count)]
            self.drivers[queue].add(segments, indirect=indirect)
            self.board.store(Register.QUEUE_NOTIFY, queue)

    @rule(area=st.integers(0, 5), offset=st.integers(0, 64), data=st.binary(min_size=1, max_size=16))
    def scribble(self, area: int, offset: int, data: bytes) -> None:
        self.guest.write(BASE + area * PAGE + offset, data)
        self.board.store(Register.QUEUE_NOTIFY, area // 3)

    @rule(
        gpa=st.sampled_from([DATA, BASE, BASE + SIZE, 0]),
        size=st.sampled_from([0, 16, 64, 0xFFFF_FFFF]),
        flags=st.integers(0, 7),
        following=st.integers(0, 8),
        place=st.integers(0, 7),
    )
    def describe(self, gpa: int, size: int, flags: int, following: int, place: int) -> None:
        self.guest.write(BASE + 16 * place, struct.pack("<QIHH", gpa, size, flags, following))
        self.board.store(Register.QUEUE_NOTIFY, 0)

    @invariant()
    def stands(self) -> None:
        device = self.board.device
        status = self.board.transport.status
        if isinstance(device, Toy) and Status.DRIVER_OK in status and Status.NEEDS_RESET not in status:
            # While the device fails, a reader sees it running, or sees the needs-reset bit.
            eventually(lambda: device.worker.alive or Status.NEEDS_RESET in self.board.transport.status)

    def serve(self, drivers: list[Driver]) -> None:
        """Have the device serve a request."""
        ask(self.board, drivers[0], b"after all")
        assert answer(self.board, drivers[0]) == b"AFTER ALL"

    def teardown(self) -> None:
        self.board.store(Register.STATUS, 0)
        assert self.board.status == 0
        assert self.board.load(Register.INTERRUPT_STATUS) == 0
        self.serve(self.board.drive(packed=True, more=Feature.ACCESS_PLATFORM if self.private else 0))
        self.board.close()
        self.guest.close()
        log.configure(0)


Anything.TestCase.settings = settings(max_examples=40, stateful_step_count=40)
TestAnything = Anything.TestCase


class AnythingToDevice(Anything):
    """The same for the device ``kind``. Its driver makes requests too, and the host acts at the other end."""

    kind: ClassVar[str]

    def make(self, how: int) -> VirtioDevice:
        self.threads = threading.active_count()
        self.folder = Path(tempfile.mkdtemp())
        self.host = HOSTS[self.kind](self.folder, self.guest)
        return self.host.make(how)

    @rule(what=st.binary(max_size=16))
    def honest(self, what: bytes) -> None:
        queue, data, room = self.host.request(Input(what))
        if queue < len(self.drivers):
            self.guest.write(DATA, data)
            segments = [(DATA, len(data), False)] * bool(data) + [(DATA + 4 * PAGE, room, True)] * bool(room)
            if segments:
                self.drivers[queue].add(segments)
                self.board.store(Register.QUEUE_NOTIFY, queue)

    @rule(what=st.binary(max_size=6))
    def act(self, what: bytes) -> None:
        self.host.act(Input(what))

    @invariant()
    def keeps_its_bounds(self) -> None:
        self.host.check()

    def serve(self, drivers: list[Driver]) -> None:
        queue, data, room = HONEST[self.kind]
        self.guest.write(DATA, data)
        segments = [(DATA, len(data), False)] * bool(data) + [(DATA + PAGE, room, True)] * bool(room)
        assert drivers[queue].add(segments) is not None
        self.board.store(Register.QUEUE_NOTIFY, queue)

        def done() -> object:
            self.host.take()
            return drivers[queue].used()

        eventually(done)

    def teardown(self) -> None:
        super().teardown()
        self.host.end()
        self.host.close()
        shutil.rmtree(self.folder)
        assert threading.active_count() == self.threads


@pytest.mark.parametrize("kind", HOSTS)
def test_the_device_survives_whatever_its_driver_does(kind: str) -> None:
    machine = type("AnythingTo" + kind.capitalize(), (AnythingToDevice,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=20, stateful_step_count=40))
