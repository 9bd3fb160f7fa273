# SPDX-License-Identifier: Apache-2.0
"""FIFOs, the trace ring and the histogram's buckets."""

from __future__ import annotations

import itertools
import os
import select
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm._native import ffi, lib
from tests.fake_kvm import Rig, store
from tests.twin import bucket_of

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE = 0x0930_0000


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


@given(ns=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 41).map(lambda n: 2**n), st.integers(0, 4096)))
def test_the_bucket_equals_that_of_the_twin(ns: int) -> None:
    assert lib.pv_bucket_of(ns) == bucket_of(ns)


def test_buckets_start_at_their_floor_and_grow() -> None:
    floors = [lib.pv_bucket_floor(n) for n in range(321)]
    assert floors == sorted(set(floors))
    for bucket, floor in enumerate(floors[:320]):
        assert lib.pv_bucket_of(floor) == bucket
        assert lib.pv_bucket_of(floors[bucket + 1] - 1) == bucket
    assert floors[319] > 2**40
    assert lib.pv_bucket_floor(10_000) == floors[320]


def test_a_bucket_is_at_most_an_eighth_wide() -> None:
    floors = [lib.pv_bucket_floor(n) for n in range(321)]
    assert all((high - low) * 8 <= low for low, high in itertools.pairwise(floors[8:]))


def uart_of(rig: Rig, tx: int) -> Any:
    uart = rig.pl011(tx=tx)
    rig.bus((DEVICE, 0x1000, "PL011", uart))
    return uart


def take(rig: Rig, fifo: Any, n: int) -> bytes:
    to = rig.new("uint8_t[]", max(n, 1))
    return bytes(to)[:0] if not (got := rig.lib.pv_fifo_read(fifo, to, n)) else bytes(to)[:got]


@settings(max_examples=60)
@given(
    steps=st.lists(st.one_of(st.binary(max_size=12), st.integers(0, 12)), max_size=30),
    start=st.integers(0, 2**32 - 1),
)
def test_a_fifo_keeps_order_and_never_overfills(steps: list[bytes | int], start: int) -> None:
    uart = ffi.new("struct pv_pl011 *", {"vm_fd": -1})
    data = ffi.new("uint8_t[]", 8)
    rx = uart.rx
    rx.size, rx.wake_fd, rx.data, rx.head, rx.tail = 8, -1, data, start, start
    to, model = ffi.new("uint8_t[]", 16), b""
    for step in steps:
        if isinstance(step, bytes):
            taken = lib.pv_pl011_feed(uart, step, len(step))
            assert taken == min(len(step), 8 - len(model))
            model += step[:taken]
        else:
            got = lib.pv_fifo_read(ffi.addressof(uart, "rx"), to, step)
            assert bytes(to)[:got] == model[:step]
            model = model[got:]


def test_an_armed_fifo_wakes_its_consumer_once(rig: Rig) -> None:
    uart = uart_of(rig, 16)
    uart.tx.wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
    tx = rig.ffi.addressof(uart, "tx")
    assert rig.lib.pv_fifo_arm(tx) == 1
    rig.script(*[store(DEVICE, c, 1) for c in b"abc"])
    rig.run()
    assert os.eventfd_read(uart.tx.wake_fd) == 1
    rig.script(*[store(DEVICE, c, 1) for c in b"def"])
    rig.run()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(uart.tx.wake_fd)
    assert rig.lib.pv_fifo_arm(tx) == 0
    assert uart.tx.armed == 0
    assert take(rig, tx, 16) == b"abcdef"
    os.close(uart.tx.wake_fd)


def test_a_sleeping_consumer_loses_no_byte(rig: Rig) -> None:
    uart = uart_of(rig, 4)
    uart.tx.wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
    tx = rig.ffi.addressof(uart, "tx")
    text = bytes(n % 251 for n in range(4_000))
    got, over = bytearray(), threading.Event()

    def consume() -> None:
        while not over.is_set() or uart.tx.head != uart.tx.tail:
            if rig.lib.pv_fifo_arm(tx) and not over.is_set():
                # A missed wake-up would wait here until the test's end and fail it.
                assert select.select([uart.tx.wake_fd], [], [], 20)[0]
                os.eventfd_read(uart.tx.wake_fd)
            got.extend(take(rig, tx, 4))

    thread = threading.Thread(target=consume)
    thread.start()
    rig.script(*[store(DEVICE, c, 1) for c in text])
    while rig.run() == "FIFO":
        pass
    over.set()
    os.eventfd_write(uart.tx.wake_fd, 1)
    thread.join()
    assert bytes(got) == text
    os.close(uart.tx.wake_fd)


def test_the_ring_keeps_the_oldest_records_counts_the_rest_and_can_start_again(rig: Rig) -> None:
    rig.bus((DEVICE, 8, "COUNTER", rig.new("uint64_t *")))
    native = rig.vcpus[0].native
    native.ring.exits, native.ring.size = 1, 4
    native.ring.head = native.ring.tail = 2**40 + 3
    rig.script(*[store(DEVICE, 1, size) for size in (1, 2, 4, 8, 1, 2)])
    rig.run()
    assert [(r.size & 0xFF, r.lost) for r in rig.records()] == [(1, 0), (2, 0), (4, 0), (8, 0)]
    assert native.ring.dropped == 3
    rig.script(store(DEVICE, 1, 2))
    rig.run()
    assert [(r.size & 0xFF, r.lost) for r in rig.records()] == [(2, 1), (0, 0)]


def test_a_ring_without_room_is_allowed(rig: Rig) -> None:
    native = rig.vcpus[0].native
    native.ring.size, native.ring.exits = 0, 1
    rig.run()
    assert (native.ring.dropped, native.ring.head) == (1, 0)
