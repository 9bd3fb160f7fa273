# SPDX-License-Identifier: Apache-2.0
"""What a disk and a card may move in a second: never more, without loss, and without holding up anything else."""

from __future__ import annotations

import argparse
import fcntl
import itertools
import os
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm._native import lib
from pyvmm.devices.kinds.disk import Disk
from pyvmm.devices.kinds.net import Net
from pyvmm.devices.virtio.blk import OK, Request, VirtioBlk
from pyvmm.devices.virtio.disk import SECTOR, DiskFile
from pyvmm.devices.virtio.limit import Limit
from pyvmm.devices.virtio.queue import Queue
from pyvmm.errors import OptionError
from pyvmm.options.devices import DEVICE_OPTIONS, device_specs
from pyvmm.options.table import Table
from tests.unit.blk_driver import DATA
from tests.unit.blk_driver import Driver as DiskDriver
from tests.unit.net_driver import Driver as CardDriver
from tests.unit.net_driver import eventually
from tests.unit.plain_guest import NEXT, PAGE, WRITE, Segment
from tests.unit.test_virtio_net import MAC, buffers, framed, receive, send

if TYPE_CHECKING:
    from pyvmm._native import pv_bucket

SECOND = 1_000_000_000
BURST = 1.0
"""Seconds of a rate that may be taken at once."""


@contextmanager
def at_least(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun >= seconds


@contextmanager
def charged(bucket: pv_bucket, ns: int) -> Iterator[None]:
    """What a full bucket gives meanwhile takes ``ns`` nanoseconds to come again."""
    assert bucket.full_at <= time.monotonic_ns()
    before = time.monotonic_ns()
    yield
    assert before + ns <= bucket.full_at <= time.monotonic_ns() + ns


def disk(path: Path, queues: int = 1, **rates: int) -> VirtioBlk:
    if not path.exists():
        path.touch()
        os.truncate(path, 32 << 20)
    return VirtioBlk(DiskFile(str(path)), queues=queues, limit=Limit(**rates))


# ---- the bucket


def test_a_bucket_is_full_at_first_and_pays_back_what_was_overdrawn() -> None:
    limit = Limit(bytes=1 << 20)
    assert lib.pv_limit_wait(limit.native) == 0
    limit.take((1 << 20) - 1)
    assert lib.pv_limit_wait(limit.native) == 0
    limit.take(1000 << 20)
    assert 900 * SECOND < lib.pv_limit_wait(limit.native) <= 1000 * SECOND


def test_the_longer_wait_of_bytes_and_requests_counts() -> None:
    limit = Limit(bytes=1 << 20, ops=1)
    lib.pv_limit_take(limit.native, 10 << 20, 1000)
    assert 900 * SECOND < lib.pv_limit_wait(limit.native) <= 1000 * SECOND


def test_the_largest_request_at_the_lowest_rate_does_not_overflow() -> None:
    limit = Limit(bytes=1)
    limit.take(1 << 32)
    limit.take(1 << 32)
    assert lib.pv_limit_wait(limit.native) > (1 << 33) * SECOND - 100 * SECOND


def test_threads_that_take_at_once_lose_no_token() -> None:
    limit = Limit(ops=1000)

    def take() -> None:
        for _ in range(20_000):
            lib.pv_limit_take(limit.native, 0, 1)

    with charged(limit.native.ops, 80 * SECOND):
        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def test_without_a_limit_there_is_nothing_to_ask() -> None:
    assert not Limit().native


# ---- a disk


def test_a_disk_serves_no_more_requests_than_its_rate_and_a_burst(tmp_path: Path) -> None:
    with DiskDriver(disk(tmp_path / "d", ops=50)) as driver, at_least(99 / 50 - BURST):
        for _ in range(100):
            assert driver.request(Request.FLUSH, 0)[0] == OK


def test_a_disk_moves_no_more_bytes_than_its_rate_and_a_burst(tmp_path: Path) -> None:
    size = 64 << 10
    with DiskDriver(disk(tmp_path / "d", bytes=20 * size)) as driver, at_least(29 / 20 - BURST):
        for _ in range(15):
            assert driver.request(Request.OUT, 0, b"x" * size)[0] == OK
            assert driver.request(Request.IN, 0, room=size)[:2] == (OK, b"x" * size)


def overdraw(driver: DiskDriver) -> None:
    """Make a disk with a rate of 4 KiB a second wait for an hour. Its driver is told at once of what was done."""
    ranges = struct.pack("<QII", 0, (16 << 20) // SECTOR, 0)
    assert driver.request(Request.WRITE_ZEROES, 0, ranges)[0] == OK


def test_zeroes_are_counted_as_bytes_and_a_waiting_disk_stops_and_pauses_at_once(tmp_path: Path) -> None:
    with DiskDriver(disk(tmp_path / "d", bytes=4096)) as driver:
        overdraw(driver)
        assert lib.pv_limit_wait(driver.device.limit.native) > 3600 * SECOND
        driver.submit([Segment(DATA, 16), Segment(DATA + PAGE, 1, True)])
        driver.device.pause()
        driver.device.resume()
        assert driver.device.counters()["done"] == 1
        driver.device.stop()


def test_the_queues_of_a_disk_share_its_limit(tmp_path: Path) -> None:
    rings, buffer = DATA + 0x10_0000, DATA + 0x20_0000
    device = disk(tmp_path / "d", queues=2, ops=1)
    with DiskDriver(device) as driver:
        second = Queue(driver.vm, driver.line, 1, 16)
        second.setup(16, 0, rings, rings + 0x4000, rings + 0x8000)
        device.stop()
        device.start([driver.queue, second], device.features)
        driver.write(buffer, struct.pack("<IIQ", Request.FLUSH, 0, 0))
        driver.write(rings, struct.pack("<QIHHQIHH", buffer, 16, NEXT, 1, buffer + 16, 1, WRITE, 0))
        with charged(device.limit.native.ops, 2 * SECOND):
            assert driver.request(Request.FLUSH, 0)[0] == OK
            driver.write(rings + 0x4002, struct.pack("<HH", 1, 0))
            os.eventfd_write(second.kick, 1)
            eventually(lambda: driver.read(rings + 0x8002, 2) == b"\x01\x00", "the second queue waits")
        device.stop()
        second.close()


# ---- a card


def waiting(peer: socket.socket) -> int:
    """Return the number of bytes that ``peer`` can read now."""
    return int.from_bytes(fcntl.ioctl(peer, termios.FIONREAD, bytes(4)), sys.byteorder)


@contextmanager
def card(room: int = 0, **rates: int) -> Iterator[tuple[CardDriver, socket.socket]]:
    """Give a card and its peer; ``room`` bytes are between them, if it is not 0."""
    from pyvmm.devices.virtio.net import VirtioNet
    from pyvmm.devices.virtio.netbackend import Stream

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.settimeout(60)
    if room:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
    device = VirtioNet(Stream("peer", ours.detach()), MAC, sends=Limit(**rates), receives=Limit(**rates))
    with theirs, CardDriver(device) as driver:
        yield driver, theirs


def test_a_card_sends_no_more_frames_than_its_rate_and_a_burst() -> None:
    with card(ops=100) as (driver, peer), at_least(149 / 100 - BURST):
        for number in range(150):
            frame = struct.pack(">I", number) * 20
            send(driver, frame)
            assert receive(peer) == frame


def test_a_card_receives_no_more_bytes_than_its_rate_and_a_burst_and_loses_none() -> None:
    frame = bytes(range(250)) * 4
    with card(bytes=20 * len(frame)) as (driver, peer), at_least(29 / 20 - BURST):
        for _ in range(30):
            buffers(driver, 1, 2048)
            peer.sendall(framed(frame))
            driver.wait(driver.rx, 1)


def test_a_sent_frame_counts_without_its_header() -> None:
    with card(bytes=1, ops=1) as (driver, peer):
        limit = driver.device.native.send_limit
        with charged(limit.bytes, 600 * SECOND), charged(limit.ops, SECOND):
            send(driver, bytes(600))
            receive(peer)


@pytest.mark.parametrize("size", [4, 100_000])
def test_what_a_guest_sends_that_is_no_frame_counts_as_one_frame_without_bytes(size: int) -> None:
    with card(bytes=1, ops=1) as (driver, _):
        limit = driver.device.native.send_limit
        with charged(limit.ops, SECOND):
            driver.tx.give([(DATA, size, False)])
            driver.wait(driver.tx, 1)
        assert limit.bytes.full_at == 0
        assert driver.device.native.sent.dropped == 1


@pytest.mark.parametrize("size", [13, 5000])
def test_a_frame_from_the_peer_counts_once_even_if_it_comes_in_parts_or_is_dropped(size: int) -> None:
    with card(bytes=1, ops=1) as (driver, peer):
        limit = driver.device.native.receive_limit
        buffers(driver, 4, 2048)
        with charged(limit.bytes, size * SECOND), charged(limit.ops, SECOND):
            data = framed(bytes(size))
            for part in (data[:2], data[2:9], data[9:]):
                peer.sendall(part)
                time.sleep(0.02)  # most times the card reads each part alone
            eventually(lambda: limit.ops.full_at != 0, "the frame does not count")
        assert driver.device.native.received.frames + driver.device.native.received.dropped == 1


def test_a_waiting_card_pauses_resets_and_stops_at_once_and_keeps_its_frames() -> None:
    with card(bytes=4096) as (driver, peer):
        lib.pv_limit_take(driver.device.native.send_limit, 1 << 40, 0)
        lib.pv_limit_take(driver.device.native.receive_limit, 1 << 40, 0)
        buffers(driver, 4, 2048)
        peer.sendall(framed(bytes(100)))
        send(driver, bytes(100))
        driver.device.pause()
        driver.device.resume()
        driver.reset(packed=False)
        assert driver.device.native.sent.frames == driver.device.native.received.frames == 0


def test_the_rest_of_a_frame_is_sent_although_the_limit_allows_no_frame() -> None:
    frame = bytes(range(251)) * 200
    with card(bytes=1, room=4096) as (driver, peer):
        send(driver, frame)
        driver.wait(driver.tx, 1)
        assert lib.pv_limit_wait(driver.device.native.send_limit)
        assert waiting(peer) < len(frame)
        assert receive(peer) == frame


def test_a_waiting_card_uses_no_cpu_time_even_if_its_peer_hangs_up() -> None:
    with card(bytes=4096) as (driver, peer):
        buffers(driver, 2, 2048)
        peer.sendall(framed(bytes(1500)) + framed(bytes(1500)))
        driver.wait(driver.rx, 2)
        lib.pv_limit_take(driver.device.native.receive_limit, 1 << 20, 0)
        buffers(driver, 1, 2048)
        peer.sendall(framed(bytes(1500)))
        peer.close()
        before = time.process_time()
        time.sleep(1)
        assert time.process_time() - before < 0.5
        assert driver.device.link_up  # it has not looked yet


def test_what_a_card_sends_does_not_wait_for_what_it_receives() -> None:
    with card(bytes=4096) as (driver, peer):
        lib.pv_limit_take(driver.device.native.receive_limit, 1 << 30, 0)
        for number in itertools.repeat(7, 3):
            send(driver, bytes([number]) * 100)
            assert receive(peer) == bytes([number]) * 100


# ---- how they are asked for


def test_rates_are_asked_for_with_a_disk_and_a_card() -> None:
    parser = argparse.ArgumentParser()
    Table(DEVICE_OPTIONS, lambda _: None).add_to(parser)
    words = ["--console", "none", "-d", "a.img,bytes=10M,ops=100", "--net", "tap=t0,bytes=64K"]
    assert device_specs(parser.parse_args(words)) == (
        Disk("a.img", bytes=10 << 20, ops=100),
        Net(tap="t0", bytes=64 << 10),
    )


@pytest.mark.parametrize("rates", [{"bytes": 4095}, {"bytes": -1}, {"bytes": (1 << 40) + 1}, {"ops": -1}])
def test_a_rate_out_of_range_is_refused_with_the_range(rates: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=r"a second: the limit must be \d+ to 1099511627776"):
        Disk("a.img", **rates)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a network card may"):
        Net(tap="t0", **rates)  # type: ignore[arg-type]


def test_a_guest_that_resets_gets_no_new_burst(tmp_path: Path) -> None:
    """Each of its lives has new devices of the same specifications."""
    (tmp_path / "d").write_bytes(bytes(SECTOR))
    a_disk, a_card = Disk(str(tmp_path / "d"), bytes=4096, ops=7), Net(tap="t0", bytes=8192)
    context: Any = SimpleNamespace(planned=True, private=False, pool=0)
    with ExitStack() as stack:
        disks = [stack.enter_context(closing(a_disk.make(context))) for _ in range(2)]
        cards = [stack.enter_context(closing(a_card.make(context))) for _ in range(2)]
        first, second = (each.limit.native for each in disks)
        assert first == second
        assert (first.bytes.rate, first.ops.rate) == (4096, 7)
        ways = [(each.native.send_limit, each.native.receive_limit) for each in cards]
        assert ways[0] == ways[1]
        assert ways[0][0] != ways[0][1]
        assert [way.bytes.rate for way in ways[0]] == [8192, 8192]
