# SPDX-License-Identifier: Apache-2.0
"""Requests through the transport: answered, paused, reset in the middle, saved, and corrupted by the guest."""

from __future__ import annotations

import functools
import json
import os
import struct
import threading
import time
from random import Random
from typing import Any

import pytest

from pyvmm._native import lib
from pyvmm.devices.virtio.device import Feature
from pyvmm.devices.virtio.registers import Register, Status
from pyvmm.devices.virtio.rng import MOST, VirtioRng
from pyvmm.devices.virtio.worker import Stuck
from pyvmm.errors import UsageError
from tests.memory_helper import BASE
from tests.twin_virtqueue import Driver, Rings
from tests.virtio_board import DATA, RUNNING, TABLES, Board, Toy, answer, ask, eventually
from tests.virtqueue_rig import PAGE, SIZE, Guest

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
    told = toy.transport.info()
    assert (told["device"], told["status"]) == ("toy", RUNNING)
    assert [(queue["size"], queue["chains"]) for queue in told["queues"]] == [(8, 20), (4, 20)]


def test_kicks_before_the_start_are_ignored_and_the_start_serves_pending_requests(toy: Board) -> None:
    assert toy.negotiate(Feature.VERSION_1)
    assert toy.set_queue(0, 8, BASE, BASE + PAGE, BASE + 2 * PAGE)
    driver = Driver(toy.guest, Rings(8, BASE, BASE + PAGE, BASE + 2 * PAGE), TABLES)
    ask(toy, driver, b"early")
    time.sleep(0.02)
    assert list(driver.used()) == []
    toy.store(Register.STATUS, RUNNING)
    assert answer(toy, driver) == b"EARLY"


def test_a_request_outside_memory_fails_and_the_next_is_served(toy: Board) -> None:
    [driver, _] = toy.drive()
    driver.add([(BASE + SIZE, 4, False), (DATA, 4, True)])
    toy.store(Register.QUEUE_NOTIFY, 0)
    eventually(lambda: list(driver.used()) == [(0, 0)])
    ask(toy, driver, b"next")
    assert answer(toy, driver) == b"NEXT"


@pytest.mark.parametrize("where", [BASE + SIZE, 0x0A00_0000, BASE + SIZE - 8, "private"])
def test_a_queue_outside_memory_breaks_and_a_reset_repairs_it(toy: Board, events: Any, where: int | str) -> None:
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
    assert "not accessible" in events()[-1]["reason"]
    toy.store(Register.STATUS, RUNNING)
    assert toy.status == RUNNING | Status.NEEDS_RESET
    toy.guest.close_pages(())
    [driver, _] = toy.drive()
    ask(toy, driver, b"better")
    assert answer(toy, driver) == b"BETTER"


def test_a_reset_waits_for_the_current_request_and_leaves_nothing(toy: Board) -> None:
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
    # The device must not serve later requests.
    ask(toy, driver, b"late")
    time.sleep(0.02)
    assert driver.word(BASE + 2 * PAGE + 2) == 1


def test_a_reset_of_a_stuck_device_returns_in_bounded_time(toy: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    device = toy.device
    assert isinstance(device, Toy)
    [driver, _] = toy.drive()
    device.hold.clear()
    ask(toy, driver, b"stuck")
    assert device.busy.wait(20)
    monkeypatch.setattr(device, "stop", lambda: device.worker.stop(patience=0.05))
    with pytest.raises(Stuck, match="toy has not finished"):
        toy.store(Register.STATUS, 0)


def test_a_stuck_device_raises_no_interrupt_once_it_is_closed(toy: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    device = toy.device
    assert isinstance(device, Toy)
    [driver, _] = toy.drive()
    driver.interrupts(on=True)
    device.hold.clear()
    ask(toy, driver, b"stuck")
    assert device.busy.wait(20)
    others = os.eventfd(0, os.EFD_NONBLOCK)  # a file that now has the eventfd's number
    toy.transport.interrupt.fd = others
    monkeypatch.setattr(device.worker, "stop", functools.partial(device.worker.stop, patience=0.05))
    with pytest.raises(Stuck, match="toy has not finished"):
        toy.transport.close()
    device.hold.set()
    lib.pv_interrupt(toy.transport.interrupt, lib.PV_INTERRUPT_USED)  # as a disk's thread does after waiting in C
    with pytest.raises(BlockingIOError):
        os.eventfd_read(others)
    os.close(others)


def test_a_device_without_a_thread_needs_a_reset_and_works_afterwards(
    toy: Board, events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        toy.drive()
    assert Status.NEEDS_RESET in toy.status
    assert "this host gives no thread more" in events()[0]["error"]
    toy.transport.pause()
    toy.transport.resume()
    [driver, _] = toy.drive()
    ask(toy, driver, b"better")
    assert answer(toy, driver) == b"BETTER"


def test_a_device_that_does_not_come_to_rest_continues_when_it_can(toy: Board) -> None:
    device = toy.device
    assert isinstance(device, Toy)
    [driver, _] = toy.drive()
    device.hold.clear()
    ask(toy, driver, b"slow")
    assert device.busy.wait(20)
    with pytest.raises(Stuck, match="toy has not finished"):
        device.worker.pause(patience=0.05)
    device.hold.set()
    assert answer(toy, driver) == b"SLOW"
    ask(toy, driver, b"next")
    assert answer(toy, driver) == b"NEXT"


def test_a_paused_device_stands_still_and_serves_new_requests_on_resume(toy: Board) -> None:
    [driver, _] = toy.drive()
    toy.transport.pause()
    ask(toy, driver, b"meanwhile")
    time.sleep(0.02)
    assert list(driver.used()) == []
    toy.transport.resume()
    assert answer(toy, driver) == b"MEANWHILE"


@pytest.mark.parametrize("packed", [False, True])
def test_another_device_continues_from_the_saved_state(toy: Board, packed: bool) -> None:
    [driver, _] = toy.drive(packed=packed, event_idx=True)
    for number in range(11):
        ask(toy, driver, b"first %d" % number)
        assert answer(toy, driver) == b"FIRST %d" % number
    toy.transport.pause()
    ask(toy, driver, b"second")
    saved = json.loads(json.dumps(toy.transport.save()))
    other = Board(toy.guest, Toy())
    try:
        other.transport.load(saved)
        assert other.status == RUNNING
        assert answer(other, driver) == b"SECOND"
        ask(other, driver, b"third")
        assert answer(other, driver) == b"THIRD"
    finally:
        other.close()
    third = Board(toy.guest, VirtioRng())
    with pytest.raises(UsageError, match="rng was a toy"):
        third.transport.load(saved)
    third.close()


def test_an_impossible_state_is_not_loaded(toy: Board) -> None:
    toy.drive()
    toy.transport.pause()
    saved = toy.transport.save()
    for change in (
        {"features": Feature.VERSION_1 | 1},
        {"queues": saved["queues"][:1]},
        {"queues": [{**saved["queues"][0], "size": 3}, saved["queues"][1]]},
        {"queues": [{**saved["queues"][0], "at": {**saved["queues"][0]["at"], "next": 1 << 16}}, saved["queues"][1]]},
        {"queues": [{**saved["queues"][0], "device": -4096}, saved["queues"][1]]},
        {"select": 1},
        {"interrupt": 1 << 32},
    ):
        other = Board(toy.guest, Toy())
        with pytest.raises(UsageError, match="cannot be what was saved"):
            other.transport.load(json.loads(json.dumps(saved | change)))
        other.close()


def test_descriptors_that_change_under_the_device_break_the_queue_or_the_request(toy: Board) -> None:
    """One vCPU keeps rewriting a table while another kicks. Only failed requests may result."""
    random = Random(1)
    begun = time.monotonic()
    rounds = broken = 0
    # On a busy machine the device's thread may not run for many rounds.
    while (took := time.monotonic() - begun) < 0.5 or (not broken and took < 60):
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


def test_entropy_fills_the_request_up_to_its_limit(guest: Guest) -> None:
    board = Board(guest, VirtioRng())
    [driver] = board.drive(packed=True)
    driver.add([(DATA, 64, True), (DATA + PAGE, 2 * PAGE, True)])
    board.store(Register.QUEUE_NOTIFY, 0)
    done: list[tuple[int, int]] = []

    def used() -> bool:
        done.extend(driver.used())
        return bool(done)

    eventually(used)
    assert done[0][1] == MOST
    assert guest.read(DATA, 64).count(0) < 16
    assert guest.read(DATA + PAGE + MOST - 64, 64) == bytes(64)
    board.close()
