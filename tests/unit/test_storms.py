# SPDX-License-Identifier: Apache-2.0
"""A guest that does one thing without end holds up nothing but itself, and takes no more of the VMM's memory for it."""

from __future__ import annotations

import contextlib
import gc
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from pyvmm.devices.virtio.registers import Register
from tests.fuzz.devices import DATA
from tests.memory_helper import BASE
from tests.unit.test_hostile_drivers import HONEST, Driver, driven
from tests.virtio_board import RUNNING, eventually
from tests.virtqueue_rig import PAGE, Guest

MANY: Final = 1500
"""Requests: so many that 1 KiB kept of each is more than what memory may vary by."""
VARIES: Final = 1 << 20
"""Bytes of resident memory."""


@pytest.fixture(params=HONEST)
def driver(request: pytest.FixtureRequest, guest: Guest, tmp_path: Path) -> Iterator[Driver]:
    with driven(request.param, guest, tmp_path, packed=False) as driver:
        yield driver


@contextlib.contextmanager
def kicking(*kicks: int) -> Iterator[None]:
    """Write these eventfds all the time, as KVM does for a guest that stores to the notification register."""
    over = threading.Event()

    def kick(fd: int) -> None:
        while not over.is_set():
            os.eventfd_write(fd, 1)

    copies = [os.dup(fd) for fd in kicks]
    threads = [threading.Thread(target=kick, args=(fd,)) for fd in copies]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
        for fd in copies:
            os.close(fd)


def test_kicks_without_end_hold_up_neither_requests_nor_resets_nor_the_end(
    driver: Driver, events: Callable[[], list[dict[str, Any]]]
) -> None:
    with kicking(*(queue.kick for queue in driver.board.transport.queues)):
        for _ in range(3):
            driver.serve()
            driver.board.store(Register.STATUS, 0)
            assert driver.board.status == 0
        driver.serve()
        driver.board.close()
    assert len(events()) < 12


def resident() -> int:
    """Return the bytes of this process's memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_requests_without_end_take_no_more_memory(driver: Driver, events: Callable[[], list[dict[str, Any]]]) -> None:
    # A balloon gets and gives back the same page, the others do the same request.
    queues = (0, 1) if driver.data == HONEST["balloon"][1] else (driver.queue,)
    driver.restart()
    driver.guest.write(DATA, driver.data.ljust(64, b"\0"))
    segments = [(DATA, len(driver.data), 0)] * bool(driver.data) + [(DATA + PAGE, driver.room, 2)] * bool(driver.room)
    done = dict.fromkeys(queues, 0)

    def request(queue: int) -> None:
        driver.play.offer(queue, segments)
        driver.board.store(Register.QUEUE_NOTIFY, queue)
        done[queue] += 1
        used = struct.pack("<H", done[queue] & 0xFFFF)

        def is_used() -> bool:
            driver.play.host.take()
            return driver.guest.read(BASE + queue * PAGE + 0x802, 2) == used

        eventually(is_used)

    for _ in range(MANY // 5):
        for queue in queues:
            request(queue)
    before = resident()
    for _ in range(MANY):
        for queue in queues:
            request(queue)
    assert resident() - before < VARIES
    assert driver.board.status == RUNNING
    assert len(events()) < 12
