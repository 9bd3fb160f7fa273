# SPDX-License-Identifier: Apache-2.0
"""Each named attack of a hostile driver on each device: the driver only breaks its queue or loses its request.

The devices run in their own threads, as in a VM. After every attack the driver resets the device and is served again.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from pyvmm.devices.virtio.registers import Register, Status
from pyvmm.devices.virtio.vsock_packet import CID_HOST, OP_RST, STREAM, Header
from pyvmm.errors import HostError
from tests.fuzz.devices import DATA, ENTRIES, TABLES, Input, Play
from tests.fuzz.hosts import CID, HOSTS
from tests.memory_helper import BASE
from tests.twin_virtqueue import AVAILABLE, DESCRIPTOR, INDIRECT, NEXT, USED, WRITE
from tests.virtio_board import RUNNING, eventually
from tests.virtqueue_rig import HALF, PAGE, SIZE, Guest

#: The queue that a device reads after each kick, and a request there: bytes to read, room to write.
HONEST: Final[dict[str, tuple[int, bytes, int]]] = {
    "rng": (0, b"", 64),
    "balloon": (0, struct.pack("<I", (DATA + 9 * PAGE) // PAGE), 0),
    "console": (1, b"hello", 0),
    "disk": (0, struct.pack("<IIQ", 4, 0, 0), 1),
    "card": (1, bytes(12 + 60), 0),
    "vsock": (1, Header(CID, CID_HOST, 1, 1, 0, STREAM, OP_RST, 0, 0, 0).pack(), 0),
}
PACKED_EMPTY: Final = AVAILABLE | USED
#: A page that no request names.
UNNAMED: Final = BASE + 24 * PAGE


class Driver:
    """One queue's hostile driver."""

    def __init__(self, play: Play, kind: str) -> None:
        self.play, self.board, self.guest = play, play.board, play.guest
        self.queue, self.data, self.room = HONEST[kind]
        self.writes = not self.data
        self.rings = BASE + self.queue * PAGE

    @property
    def packed(self) -> bool:
        return self.play.packed

    def restart(self) -> None:
        assert self.play.drive(self.play.features)

    def offer(self, *segments: tuple[int, int], flags: int = 0) -> None:
        """Make a chain of (gpa, size) available, in the direction of the device's requests, and kick."""
        flags |= WRITE * self.writes
        self.play.offer(self.queue, [(gpa, size, flags) for gpa, size in segments])
        self.kick()

    def kick(self) -> None:
        self.board.store(Register.QUEUE_NOTIFY, self.queue)

    def used(self) -> int:
        """Return how many requests came back, at most one in a packed ring."""
        self.play.host.take()
        if not self.packed:
            return int.from_bytes(self.guest.read(self.rings + 0x802, 2), "little")
        flags = int.from_bytes(self.guest.read(self.rings + 14, 2), "little")
        return int(flags & PACKED_EMPTY == PACKED_EMPTY)

    def serve(self) -> None:
        """Make a correct request and check that it comes back."""
        self.restart()
        self.guest.write(DATA, self.data.ljust(64, b"\0"))
        segments = [(DATA, len(self.data), 0)] * bool(self.data)
        self.play.offer(self.queue, segments + [(DATA + PAGE, self.room, WRITE)] * bool(self.room))
        self.kick()
        eventually(self.used)
        assert self.board.status == RUNNING

    def breaks(self) -> None:
        eventually(lambda: Status.NEEDS_RESET in self.board.status)

    def fails(self) -> None:
        """Check that the request comes back, and that the device goes on."""
        eventually(self.used)
        assert self.board.status == RUNNING


# ---- attacks: each begins with a running device, and ends when the expected effect has happened


def loop(driver: Driver) -> None:
    if driver.packed:
        driver.offer(*[(DATA, 16)] * ENTRIES, flags=NEXT)
    else:
        flags = NEXT | WRITE * driver.writes
        driver.play.write(driver.rings, struct.pack("<QIHH", DATA, 16, flags, 1))
        driver.play.write(driver.rings + DESCRIPTOR, struct.pack("<QIHH", DATA, 16, flags, 0))
        driver.play.write(driver.rings + 0x402, struct.pack("<HH", 1, 0))
        driver.kick()
    driver.breaks()


def chain_out_of_memory(driver: Driver) -> None:
    driver.offer((BASE + SIZE, 64))
    driver.fails()


def at_the_end_of_ram(driver: Driver) -> None:
    driver.offer((BASE + SIZE - 8, 64))
    driver.fails()


def across_slots(driver: Driver) -> None:
    driver.offer((BASE + HALF - 8, 64))
    driver.fails()


def in_mmio(driver: Driver) -> None:
    driver.offer((0x0A00_0000, 64))
    driver.fails()


def private_data(driver: Driver) -> None:
    driver.guest.close_pages({(DATA - BASE) // PAGE})
    driver.offer((DATA, 64))
    driver.fails()


def length_beyond_the_last_address(driver: Driver) -> None:
    driver.offer(((1 << 64) - 8, 64))
    driver.breaks()


def lengths_that_overflow_together(driver: Driver) -> None:
    driver.offer((DATA, 0xFFFF_FFFF), (DATA, 0xFFFF_FFFF))
    driver.breaks()


def no_length(driver: Driver) -> None:
    driver.offer((DATA, 0))
    driver.breaks()


def table_of_odd_size(driver: Driver) -> None:
    driver.offer((TABLES, 24), flags=INDIRECT)
    driver.breaks()


def table_in_a_table(driver: Driver) -> None:
    flags = (0, INDIRECT) if driver.packed else (INDIRECT, 0)
    driver.play.write(TABLES, struct.pack("<QIHH", TABLES, 16, *flags))
    driver.offer((TABLES, 16), flags=INDIRECT)
    driver.breaks()


def table_out_of_memory(driver: Driver) -> None:
    driver.offer((BASE + SIZE, 64), flags=INDIRECT)
    driver.breaks()


def more_than_there_are(driver: Driver) -> None:
    if driver.packed:
        loop(driver)
        return
    driver.play.write(driver.rings + 0x402, struct.pack("<H", ENTRIES + 1))
    driver.kick()
    driver.breaks()


def rings_taken_back(driver: Driver) -> None:
    driver.offer((DATA, 16))
    driver.fails()
    driver.guest.close_pages({driver.queue})
    driver.kick()
    driver.breaks()


def rings_that_are_nowhere(driver: Driver) -> None:
    assert driver.board.negotiate(driver.play.features)
    for number in range(len(driver.board.transport.queues)):
        assert driver.board.set_queue(number, ENTRIES, BASE + SIZE, BASE + SIZE + PAGE, 0x0A00_0000)
    driver.board.store(Register.STATUS, RUNNING)
    driver.kick()
    driver.breaks()


def rings_moved(driver: Driver) -> None:
    board = driver.board
    board.set_queue(driver.queue, 4, BASE + SIZE, BASE + SIZE, BASE + SIZE)
    board.store(Register.QUEUE_READY, 0)
    driver.offer((DATA, 16))
    driver.fails()


def queue_sizes(driver: Driver) -> None:
    assert driver.board.negotiate(driver.play.features)
    for size in (0, 3, 65535, 0xFFFF_FFFF):
        ready = driver.board.set_queue(driver.queue, size, BASE, BASE + PAGE, BASE + 2 * PAGE)
        assert ready == (size == 3 and driver.packed)
        driver.board.store(Register.QUEUE_READY, 0)
    driver.board.store(Register.STATUS, RUNNING)
    driver.kick()
    driver.board.transport.pause()  # once it has handled the kick
    driver.board.transport.resume()
    assert driver.board.status == RUNNING


def features_never_offered(driver: Driver) -> None:
    offered = driver.board.offered()
    for bit in range(128):
        if not offered >> bit & 1:
            assert not driver.board.negotiate(driver.play.features | 1 << bit)
            driver.board.store(Register.STATUS, RUNNING)
            assert Status.DRIVER_OK not in driver.board.status


def every_width_at_every_offset(driver: Driver) -> None:
    for size in (1, 2, 4, 8):
        for offset in range(0x200 - size + 1):
            driver.board.load(offset, size)
            driver.board.store(offset, 0xFFFF_FFFF_FFFF_FFFF, size)
            driver.board.store(offset, 0, size)


def kicks_before_the_driver_is_there(driver: Driver) -> None:
    assert driver.board.negotiate(driver.play.features)
    assert driver.board.set_queue(driver.queue, ENTRIES, BASE + SIZE, BASE + SIZE, BASE + SIZE)
    for number in range(8):
        driver.board.store(Register.QUEUE_NOTIFY, number)
    assert driver.board.status == RUNNING & ~Status.DRIVER_OK


def resets_in_the_middle(driver: Driver) -> None:
    for _ in range(10):
        for _ in range(2):
            driver.offer((DATA, 2048), (DATA, 2048))
        driver.board.store(Register.STATUS, 0)
        before = driver.guest.contents
        assert driver.guest.contents == before, "the device still wrote to memory after its reset"
        driver.restart()


def rewrites_while_another_kicks(driver: Driver) -> None:
    over = threading.Event()

    def rewrite() -> None:
        while not over.is_set():
            for word in (0, 0xFF, (1 << 64) - 1):
                for at in range(0, DESCRIPTOR * ENTRIES, 8):
                    driver.play.write(driver.rings + at, struct.pack("<Q", word))

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(40):
            driver.offer((DATA, 64), (DATA + 64, 64))
            if Status.NEEDS_RESET in driver.board.status:
                driver.restart()
    finally:
        over.set()
        writer.join()


ATTACKS: Final[tuple[Callable[[Driver], None], ...]] = (
    loop, chain_out_of_memory, at_the_end_of_ram, across_slots, in_mmio, private_data, length_beyond_the_last_address,
    lengths_that_overflow_together, no_length, table_of_odd_size, table_in_a_table, table_out_of_memory,
    more_than_there_are, rings_taken_back, rings_that_are_nowhere, rings_moved, queue_sizes, features_never_offered,
    every_width_at_every_offset, kicks_before_the_driver_is_there, resets_in_the_middle, rewrites_while_another_kicks,
)  # fmt: skip


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@contextlib.contextmanager
def driven(kind: str, guest: Guest, folder: Path, *, packed: bool) -> Iterator[Driver]:
    """Give the driver of a device, whose threads must be gone in the end."""
    host = HOSTS[kind](folder, guest)
    threads = threading.active_count()
    # There is no event index, so that every kick counts.
    play = Play(guest, host, Input(bytes([0, packed | 4])))
    yield Driver(play, kind)
    host.leave()
    play.board.close()
    host.end()
    host.close()
    assert threading.active_count() == threads


@pytest.fixture(params=HONEST)
def driver(request: pytest.FixtureRequest, packed: bool, guest: Guest, tmp_path: Path) -> Iterator[Driver]:
    with driven(request.param, guest, tmp_path, packed=packed) as driver:
        yield driver


def test_a_driver_that_repeats_the_same_fault_does_not_fill_the_log(
    guest: Guest, tmp_path: Path, events: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise HostError("its tap has gone")

    host = HOSTS["card"](tmp_path, guest)
    play = Play(guest, host, Input(bytes([0, 4])))
    monkeypatch.setattr(play.board.device.backend, "use", fail)  # type: ignore[attr-defined]
    for _ in range(50):
        assert play.drive(play.features)
        assert Status.NEEDS_RESET in play.board.status
    play.board.close()
    host.end()
    said = [event["event"] for event in events()]
    assert 1 <= said.count("device_failed") <= 6
    assert len(said) <= 12


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_an_attack_costs_its_driver_only_a_request_or_a_reset(
    driver: Driver, attack: Callable[[Driver], None], events: Callable[[], list[dict[str, Any]]]
) -> None:
    driver.guest.write(UNNAMED, b"\xc5" * PAGE)
    attack(driver)
    driver.guest.close_pages(())
    assert driver.guest.read(UNNAMED, PAGE) == b"\xc5" * PAGE
    driver.serve()
    assert len(events()) < 12
