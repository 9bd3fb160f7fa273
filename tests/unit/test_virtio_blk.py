# SPDX-License-Identifier: Apache-2.0
"""The block device, driven over plain memory: each request does exactly what it should."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import struct
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm._native import lib
from pyvmm.devices.virtio.blk import _CONFIG, IOERR, OK, UNSUPP, BlkFeature, Request, VirtioBlk
from pyvmm.devices.virtio.device import Feature
from pyvmm.devices.virtio.disk import SECTOR, DiskFile
from pyvmm.devices.virtio.registers import CONFIG, Register, Status
from pyvmm.errors import UsageError
from pyvmm.kvm import libc
from tests.unit.blk_driver import DATA, DEVICE_OFFSET, RINGS, Driver
from tests.unit.plain_guest import BASE, PAGE, SIZE, Segment
from tests.virtio_board import RUNNING, Board, eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.devices.virtio.device import Complaints
    from tests.virtqueue_rig import Guest

SECTORS = 64
CONTENTS = b"".join(bytes([n]) * SECTOR for n in range(1, SECTORS + 1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "disk"
    file.write_bytes(CONTENTS)
    return file


def blk(path: Path, *, read_only: bool = False, **more: Any) -> VirtioBlk:
    return VirtioBlk(DiskFile(str(path), read_only=read_only), **more)


def hear(device: VirtioBlk) -> list[dict[str, object]]:
    """Collect the device's warnings."""
    heard: list[dict[str, object]] = []

    class Ear:
        def warn(self, event: str, **values: object) -> None:
            heard.append({"event": event, **values})

    ear: Complaints = Ear()  # type: ignore[assignment]
    device.complaints = ear
    return heard


# ---- each request


def test_reads_and_writes_access_only_their_sectors(path: Path) -> None:
    with Driver(blk(path)) as driver:
        assert driver.request(Request.IN, 3, room=2 * SECTOR) == (OK, CONTENTS[3 * SECTOR : 5 * SECTOR], 2 * SECTOR + 1)
        assert driver.request(Request.OUT, 10, b"\xab" * SECTOR) == (OK, b"", 1)
        assert driver.request(Request.FLUSH, 0)[0] == OK
        assert driver.device.counters() == {
            "done": 3,
            "failed": 0,
            "denied": 0,
            "bytes_read": 2 * SECTOR,
            "bytes_written": SECTOR,
        }
    assert path.read_bytes() == CONTENTS[: 10 * SECTOR] + b"\xab" * SECTOR + CONTENTS[11 * SECTOR :]


@pytest.mark.parametrize(
    ("sector", "size"),
    [(SECTORS, SECTOR), (SECTORS - 1, 2 * SECTOR), (2**64 - 1, SECTOR), (2**55, SECTOR), (0, 511), (0, 513)],
)
def test_a_request_beyond_the_disk_or_of_odd_length_fails(path: Path, sector: int, size: int) -> None:
    with Driver(blk(path)) as driver:
        assert driver.request(Request.IN, sector, room=size)[::2] == (IOERR, 0)
        assert driver.request(Request.OUT, sector, bytes(size))[0] == IOERR
        assert driver.request(Request.IN, SECTORS - 1, room=SECTOR)[0] == OK
    assert path.read_bytes() == CONTENTS


def test_a_request_without_data_succeeds(path: Path) -> None:
    with Driver(blk(path)) as driver:
        assert driver.request(Request.IN, SECTORS)[0] == OK
        assert driver.request(Request.OUT, 0)[0] == OK


def test_a_request_beyond_the_announced_limit_fails_without_a_read(path: Path) -> None:
    os.truncate(path, 1 << 30)
    with Driver(blk(path)) as driver:
        driver.write(DATA, struct.pack("<IIQ", Request.IN, 0, 0))
        data = [Segment(BASE + (1 << 20), 3 << 20, True)] * 200
        driver.submit([Segment(DATA, 16), *data, Segment(DATA + 16, 1, True)])
        assert driver.wait() == [(0, 0)]
        assert driver.read(DATA + 16, 1)[0] == IOERR
        assert driver.device.counters()["bytes_read"] == 0


@pytest.mark.parametrize(
    ("features", "most", "status"),
    [
        (0, 510 << 20, OK),
        (BlkFeature.SIZE_MAX, 510 << 16, OK),
        (BlkFeature.SEG_MAX, 64 << 20, OK),
        (BlkFeature.SIZE_MAX | BlkFeature.SEG_MAX, 4 << 20, IOERR),
    ],
)
def test_only_drivers_that_support_a_limit_are_asked_to_respect_the_pools_share(
    path: Path, features: int, most: int, status: int
) -> None:
    os.truncate(path, 8 << 20)
    with Driver(blk(path, pool=16 << 20), features) as driver:
        assert driver.device.most == most
        driver.write(DATA, struct.pack("<IIQ", Request.IN, 0, 0))
        data = [Segment(BASE + (1 << 20), 5 << 19, True)] * 2
        driver.submit([Segment(DATA, 16), *data, Segment(DATA + 16, 1, True)])
        driver.wait()
        assert driver.read(DATA + 16, 1)[0] == status


def test_the_id_is_the_serial_padded_to_twenty_bytes(path: Path) -> None:
    with Driver(blk(path, serial="root")) as driver:
        assert driver.request(Request.GET_ID, 0, room=20) == (OK, b"root".ljust(20, b"\0"), 21)
        assert driver.request(Request.GET_ID, 0, room=2)[:2] == (OK, b"ro")


def test_an_unknown_request_is_answered_as_unsupported(path: Path) -> None:
    with Driver(blk(path)) as driver:
        assert driver.request(99, 0, room=512)[0] == UNSUPP
        assert driver.request(99, 0)[0] == UNSUPP


def segments(*ranges: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *one) for one in ranges)


def test_discard_and_write_zeroes_change_the_disk_as_specified(path: Path) -> None:
    with Driver(blk(path)) as driver:
        assert driver.request(Request.WRITE_ZEROES, 0, segments((2, 3, 0)))[0] == OK
        assert driver.request(Request.WRITE_ZEROES, 0, segments((8, 1, 1)))[0] == OK
        assert driver.request(Request.DISCARD, 0, segments((16, 8, 0), (32, 16, 0)))[0] == OK
    data = path.read_bytes()
    kept = [n for n in range(SECTORS) if data[n * SECTOR] == n + 1]
    assert kept == [n for n in range(SECTORS) if n not in {2, 3, 4, 8, *range(16, 24), *range(32, 48)}]
    assert len(data) == len(CONTENTS)


@pytest.mark.parametrize(
    ("ranges", "discard", "zeroes"),
    [
        (b"", IOERR, IOERR),
        (bytes(15), IOERR, IOERR),
        (segments((0, 1, 2)), UNSUPP, UNSUPP),
        (segments((0, 1, 1)), UNSUPP, OK),
        (segments((SECTORS, 1, 0)), IOERR, IOERR),
        (segments((SECTORS - 1, 2, 0)), IOERR, IOERR),
        (segments((2**64 - 1, 1, 0)), IOERR, IOERR),
        (segments((0, 2**32 - 1, 0)), IOERR, IOERR),
        (segments(*[(0, 0, 0)] * 65), IOERR, IOERR),
    ],
)
def test_a_request_with_an_invalid_range_is_refused_whole(path: Path, ranges: bytes, discard: int, zeroes: int) -> None:
    with Driver(blk(path)) as driver:
        assert driver.request(Request.DISCARD, 0, ranges)[0] == discard
        assert driver.request(Request.WRITE_ZEROES, 0, ranges)[0] == zeroes
    if zeroes != OK:
        assert path.read_bytes() == CONTENTS


def test_a_discard_that_nobody_waits_for_ends_after_the_current_range(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = blk(path)
    dropped: list[int] = []

    def discard(offset: int, _: int) -> None:
        dropped.append(offset)
        [server] = device._servers
        server.native.abandon = 1

    with Driver(device) as driver:
        monkeypatch.setattr(device.disk, "discard", discard)
        assert driver.request(Request.DISCARD, 0, segments((8, 8, 0), (16, 8, 0), (24, 8, 0)))[0] == IOERR
    assert dropped == [8 * SECTOR]


def test_good_ranges_are_done_despite_a_bad_one(path: Path) -> None:
    with Driver(blk(path)) as driver:
        assert driver.request(Request.DISCARD, 0, segments((0, 8, 0), (SECTORS, 1, 0)))[0] == IOERR
    assert path.read_bytes() == CONTENTS


def test_a_read_only_disk_is_announced_as_such_and_never_changes(path: Path) -> None:
    device = blk(path, read_only=True)
    assert device.features & BlkFeature.RO
    with Driver(device) as driver:
        assert driver.request(Request.OUT, 0, bytes(SECTOR))[0] == IOERR
        for kind in (Request.DISCARD, Request.WRITE_ZEROES):
            assert driver.request(kind, 0, segments((0, 1, 0)))[0] == UNSUPP
        assert driver.request(Request.IN, 0, room=SECTOR)[0] == OK
        assert driver.request(Request.FLUSH, 0)[0] == OK
    assert path.read_bytes() == CONTENTS


FULL = (1 << 64) - 2
"""Of an eventfd: whoever writes one more waits."""


@pytest.mark.parametrize(
    ("slow", "features", "done_when_told"),
    [(Request.FLUSH, None, 1), (Request.OUT, 0, 1), (Request.OUT, None, 2), (Request.IN, None, 2)],
)
def test_finished_requests_are_reported_before_a_wait_for_the_medium(
    path: Path, slow: Request, features: int | None, done_when_told: int
) -> None:
    with Driver(blk(path), features) as driver:
        os.eventfd_write(driver.interrupts, FULL)
        for at, kind in ((DATA, Request.IN), (DATA + PAGE, slow)):
            driver.write(at, struct.pack("<IIQ", kind, 0, 0))
        data = [] if slow is Request.FLUSH else [Segment(DATA + 2 * PAGE, SECTOR, slow is Request.IN)]
        driver.submit(
            [Segment(DATA, 16), Segment(DATA + SECTOR, SECTOR, True), Segment(DATA + 16, 1, True)],
            [Segment(DATA + PAGE, 16), *data, Segment(DATA + PAGE + 16, 1, True)],
        )
        eventually(lambda: driver.line.sent)
        assert driver.read(RINGS + DEVICE_OFFSET + 2, 2) == struct.pack("<H", done_when_told)
        os.eventfd_read(driver.interrupts)
        assert len(driver.wait(2)) == 2


# ---- how requests may be laid out


def test_the_header_may_be_split_anywhere_and_the_status_may_be_separate(path: Path) -> None:
    with Driver(blk(path)) as driver:
        driver.write(DATA, struct.pack("<IIQ", Request.IN, 0, 7))
        for cut in range(1, 16):
            chain = [Segment(DATA, cut), Segment(DATA + cut, 16 - cut), Segment(DATA + PAGE, SECTOR + 1, True)]
            driver.write(DATA + PAGE, b"\xee" * (SECTOR + 1))
            driver.submit(chain)
            assert driver.wait() == [(0, SECTOR + 1)]
            assert driver.read(DATA + PAGE, SECTOR + 1) == CONTENTS[7 * SECTOR : 8 * SECTOR] + b"\0"


@pytest.mark.parametrize(
    "chain",
    [
        [Segment(DATA, 16)],
        [Segment(DATA, 15), Segment(DATA + 64, 1, True)],
        [Segment(DATA + 64, 1, True)],
        [Segment(BASE + SIZE - 8, 16), Segment(DATA + 64, 1, True)],
        [Segment(0x1000, 16), Segment(DATA + 64, 1, True)],
        [Segment(DATA, 16), Segment(0x1000, 1, True)],
        [Segment(DATA, 16), Segment(0x1000, SECTOR, True), Segment(DATA + 64, 1, True)],
        [Segment(DATA, 16), Segment(BASE + SIZE - 100, SECTOR, True), Segment(DATA + 64, 1, True)],
    ],
)
def test_an_impossible_request_comes_back_and_the_next_one_works(path: Path, chain: list[Segment]) -> None:
    with Driver(blk(path)) as driver:
        driver.write(DATA, struct.pack("<IIQ", Request.IN, 0, 0))
        driver.write(DATA + 64, b"\xee")
        driver.submit(chain)
        driver.wait()
        assert driver.read(DATA + 64, 1)[0] in ((IOERR,) if chain[-1] == Segment(DATA + 64, 1, True) else (0xEE,))
        assert driver.request(Request.IN, 0, room=SECTOR)[0] == OK
        assert not driver.transport.reset_needed


def test_a_ring_that_disappears_ends_the_queue_and_not_the_device(path: Path) -> None:
    device = blk(path)
    with Driver(device) as driver:
        heard = hear(device)
        assert driver.request(Request.IN, 0, room=SECTOR)[0] == OK
        driver.hide(RINGS, DATA - RINGS)
        os.eventfd_write(driver.queue.kick, 1)
        for _ in range(2000):
            if driver.transport.reset_needed:
                break
            threading.Event().wait(0.005)
        assert driver.transport.reset_needed
        assert "not accessible" in str(heard[0]["reason"])
        driver.hide(RINGS, DATA - RINGS, hidden=False)


@pytest.mark.parametrize("bounce", [False, True])
def test_a_private_page_fails_only_its_request(path: Path, bounce: bool) -> None:
    device = blk(path)
    device.bounce = bounce
    with Driver(device) as driver:
        driver.hide(DATA + 2 * PAGE)
        for kind, writable in ((Request.IN, True), (Request.OUT, False)):
            driver.write(DATA, struct.pack("<IIQ", kind, 0, 0))
            driver.write(DATA + 16, b"\xee")
            driver.submit([Segment(DATA, 16), Segment(DATA + PAGE, 2 * PAGE, writable), Segment(DATA + 16, 1, True)])
            driver.wait()
            assert driver.read(DATA + 16, 1)[0] == IOERR
        assert device.counters()["denied"] == 2
        driver.hide(DATA + 2 * PAGE, hidden=False)
        assert driver.request(Request.IN, 0, room=3 * PAGE)[0] == OK


class Oracle:
    """A simple model of a disk with CONTENTS."""

    def __init__(self) -> None:
        self.data = bytearray(CONTENTS)

    def status(self, readable: bytes, room: int) -> tuple[int, bytes | None]:
        """Return (status, the data read); None if the model does not determine it."""
        if len(readable) < 16:
            return IOERR, None
        kind, _, sector = struct.unpack_from("<IIQ", readable)
        size = room if kind == Request.IN else len(readable) - 16
        if kind not in (Request.IN, Request.OUT):
            return (OK if kind == Request.FLUSH else UNSUPP), None
        if size % SECTOR or sector * SECTOR + size > len(self.data):
            return IOERR, None
        at = sector * SECTOR
        if kind == Request.IN:
            return OK, bytes(self.data[at : at + size])
        self.data[at : at + size] = readable[16:]
        return OK, None


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    points = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(points)]


requests = st.tuples(
    st.sampled_from([0, 0, 0, 1, 1, 1, 4, 99]),
    st.one_of(st.integers(0, SECTORS + 1), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 8).map(lambda n: n * SECTOR), st.integers(0, 2000)),
    st.lists(st.integers(0, 6000), max_size=12),
    st.integers(0, 18),
)


@settings(max_examples=150)
@given(st.lists(requests, min_size=1, max_size=8), st.booleans(), st.booleans())
def test_any_request_has_the_same_effect_as_on_a_simple_disk(
    given_: list[Any], bounce: bool, all_at_once: bool
) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(CONTENTS)
        file.flush()
        device = VirtioBlk(DiskFile(file.name))
        device.bounce = bounce
        oracle = Oracle()
        with Driver(device) as driver:
            chains, expected, at = [], [], DATA
            for number, (kind, sector, size, cuts, header) in enumerate(given_):
                head = struct.pack("<IIQ", kind, 0xFFFF_FFFF, sector)[:header]
                readable = head + (bytes([0x80 + number]) * size if kind == Request.OUT and header >= 16 else b"")
                room = size if kind == Request.IN else 0
                chain = []
                for part in cut(readable, cuts):
                    driver.write(at, part)
                    chain.append(Segment(at, len(part)))
                    at += len(part) + number
                where = at
                driver.write(at, b"\xee" * (room + 1))
                for part in cut(bytes(room + 1), cuts):
                    chain.append(Segment(at, len(part), True))
                    at += len(part)
                chains.append(chain)
                expected.append((where, room, *oracle.status(readable, room)))
                if not all_at_once:
                    driver.submit(chains.pop())
                    driver.wait()
            if chains:
                driver.submit(*chains)
                driver.wait(len(chains))
            for where, room, status, data in expected:
                assert driver.read(where + room, 1)[0] == status
                assert driver.read(where, room) == (b"\xee" * room if data is None else data)
        assert Path(file.name).read_bytes() == oracle.data


# ---- a medium that fails


def test_a_truncated_file_fails_requests_to_the_lost_part_and_is_not_extended(path: Path) -> None:
    device = blk(path)
    heard = hear(device)
    with Driver(device) as driver:
        os.truncate(path, 32 * SECTOR)
        assert driver.request(Request.IN, 31, room=SECTOR)[0] == OK
        assert driver.request(Request.IN, 31, room=2 * SECTOR)[::2] == (IOERR, SECTOR)
        assert driver.request(Request.OUT, 40, bytes(SECTOR))[0] == IOERR
        assert driver.request(Request.WRITE_ZEROES, 0, segments((40, 1, 0)))[0] == IOERR
        assert path.stat().st_size == 32 * SECTOR
    assert [(one["event"], one["errno"]) for one in heard] == [("disk_failed", "ENODATA")] * 3
    assert f"truncated below its {SECTORS * SECTOR} bytes" in str(heard[0]["reason"])


def test_a_full_medium_is_reported_to_guest_and_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = blk(path)
    heard = hear(device)
    with Driver(device) as driver:
        monkeypatch.setattr(libc, "fallocate", lambda *_: errno.ENOSPC)
        assert driver.request(Request.WRITE_ZEROES, 0, segments((0, 1, 0)))[0] == IOERR
    assert heard[0]["errno"] == "ENOSPC"
    assert "make room" in str(heard[0]["hint"])


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="no /dev/full here")
def test_a_write_without_space_fails_and_is_reported(path: Path) -> None:
    device = blk(path)
    heard = hear(device)
    full = os.open("/dev/full", os.O_RDWR)
    try:
        os.dup2(full, device.disk.fd)
        device.disk.regular = False
        with Driver(device) as driver:
            assert driver.request(Request.OUT, 0, bytes(SECTOR))[0] == IOERR
    finally:
        os.close(full)
    assert (heard[0]["errno"], heard[0]["request"]) == ("ENOSPC", "OUT")


# ---- reset, pause and restore


def test_a_reset_abandons_the_current_request_and_the_device_starts_again(path: Path) -> None:
    os.truncate(path, 1 << 30)
    device = blk(path)
    with Driver(device) as driver:
        driver.write(DATA, struct.pack("<IIQ", Request.IN, 0, 0))
        data = [Segment(BASE + (1 << 20), 2 << 20, True)] * 240  # takes some tenths of a second
        for _ in range(10):
            driver.submit([Segment(DATA, 16), *data, Segment(DATA + 16, 1, True)])
            threading.Event().wait(0.003)
            device.stop()
            device.stop()
            driver.restart()
        assert driver.request(Request.IN, 0, room=SECTOR)[0] == OK


def test_a_paused_device_takes_no_request_and_continues_where_it_was(path: Path) -> None:
    device = blk(path)
    with Driver(device) as driver:
        device.pause()
        driver.write(DATA, struct.pack("<IIQ", Request.IN, 0, 0))
        driver.submit([Segment(DATA, 16), Segment(DATA + PAGE, SECTOR + 1, True)])
        with pytest.raises(AssertionError, match="0 of 1"):
            driver.wait(timeout=0.2)
        saved = device.save()
        device.resume()
        driver.wait()
        device.load(saved)
        with pytest.raises(UsageError, match="64 sectors, but had 65"):
            device.load({**saved, "sectors": 65})


def test_queues_are_served_in_parallel_and_stop_together(path: Path) -> None:
    before = threading.active_count()
    device = blk(path, queues=4)
    assert struct.unpack_from("<H", device.config(), 34) == (4,)
    with Driver(device):
        pass
    assert threading.active_count() == before


def test_a_disk_that_cannot_serve_all_its_queues_serves_none_and_leaks_nothing(
    path: Path, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eventfd(*_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    board = Board(guest, blk(path, queues=2))
    before, threads = os.listdir("/proc/self/fd"), threading.active_count()
    making, left = os.eventfd, [1]
    monkeypatch.setattr(os, "eventfd", lambda *how: making(*how) if left and left.pop() else eventfd())
    board.drive()
    assert Status.NEEDS_RESET in board.status
    board.store(Register.STATUS, 0)
    assert set(os.listdir("/proc/self/fd")) <= set(before)
    assert threading.active_count() == threads
    board.close()


def test_the_configuration_space_has_the_specified_layout(path: Path) -> None:
    device = blk(path)
    config = device.config()
    assert len(config) == _CONFIG.size == 72
    assert struct.unpack_from("<Q", config, 0) == (SECTORS,)
    assert struct.unpack_from("<I", config, 12) == (lib.PV_BLK_SEGMENTS - 2,)
    assert struct.unpack_from("<I", config, 20) == (SECTOR,)
    assert struct.unpack_from("<BBH", config, 24) == (3, 0, 8)
    assert config[32] == 1
    assert struct.unpack_from("<5IB", config, 36)[1:3] == (64, 8)
    device.close()


@pytest.mark.parametrize("mib", [1, 2, 4, 16, 64, 1024])
def test_a_request_through_a_pool_uses_at_most_its_share(path: Path, mib: int) -> None:
    device = blk(path, pool=mib << 20)
    size, count = struct.unpack_from("<II", device.config(), 8)
    assert 0 < size * count <= mib << 18
    assert 16 <= count <= lib.PV_BLK_SEGMENTS - 2
    # Linux accepts no smaller segment limit than a page of the guest, which may have 64 KiB.
    assert size == min(mib << 14, 64 << 10)
    device.close()


def test_zeroes_are_on_the_medium_if_no_flush_follows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    for more, expected in (({}, 0), ({"features": int(BlkFeature.WRITE_ZEROES)}, 1)):
        with Driver(blk(path), **more) as driver:
            assert driver.request(Request.WRITE_ZEROES, 0, segments((0, 1, 0)))[0] == OK
            assert synced == [driver.device.disk.fd] * expected


def test_writes_of_a_driver_without_flush_or_cache_go_through_to_the_medium(path: Path) -> None:
    through: Callable[[VirtioBlk], bool] = lambda device: bool(device.flags & lib.PV_BLK_THROUGH)  # noqa: E731
    device = blk(path)
    with Driver(device, features=0) as driver:
        assert through(device)
        assert driver.request(Request.OUT, 0, bytes(SECTOR))[0] == OK
    device = blk(path)
    with Driver(device) as driver:
        assert not through(device)
        device.write_config(32, b"\0")
        assert through(device)
        assert device.config()[32] == 0
        assert driver.request(Request.OUT, 0, bytes(SECTOR))[0] == OK


WRITEBACK = CONFIG + 32


def test_the_drivers_choice_of_write_through_applies_from_the_start_and_is_restored(path: Path, guest: Guest) -> None:
    board = Board(guest, blk(path))
    assert board.negotiate(Feature.VERSION_1 | BlkFeature.CONFIG_WCE | BlkFeature.FLUSH)
    assert board.load(WRITEBACK, 1) == 1
    board.store(WRITEBACK, 0, 1)
    board.store(Register.STATUS, RUNNING)
    assert board.load(WRITEBACK, 1) == 0
    board.transport.pause()
    saved = board.transport.save()
    board.close()
    other = Board(guest, blk(path))
    other.transport.load(saved)
    assert other.load(WRITEBACK, 1) == 0
    other.close()


def test_a_driver_that_cannot_flush_gets_write_through_and_the_next_starts_anew(path: Path, guest: Guest) -> None:
    board = Board(guest, blk(path))
    assert board.negotiate(Feature.VERSION_1 | BlkFeature.CONFIG_WCE)
    assert board.load(WRITEBACK, 1) == 0
    assert board.negotiate(Feature.VERSION_1 | BlkFeature.CONFIG_WCE | BlkFeature.FLUSH)
    assert board.load(WRITEBACK, 1) == 1
    board.close()


def test_the_driver_is_told_the_blocks_and_a_restored_one_finds_the_same(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 20)
    large, usual = (VirtioBlk(DiskFile(str(path), lock=False, block=block)) for block in (4096, 0))
    with contextlib.closing(large), contextlib.closing(usual):
        assert [int.from_bytes(each.config()[20:24], "little") for each in (large, usual)] == [4096, 512]
        large.load(large.save())
        with pytest.raises(UsageError, match="has blocks of 512 bytes, but had 4096 when it was saved"):
            usual.load(large.save())
