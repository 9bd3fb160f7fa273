# SPDX-License-Identifier: Apache-2.0
"""A disk in real guests that unshare pages while the disk reads into them or writes from them."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.devices.kinds.disk import Disk
from pyvmm.devices.virtio.blk import IOERR, OK, Request, VirtioBlk
from pyvmm.devices.virtio.registers import Register
from pyvmm.guest.puppet import Puppet
from pyvmm.protection import Protection
from tests.pkvm.harness import puppet
from tests.pkvm.test_virtio import RUNNING, Card, Ram, eventually, isolating

pytestmark = pytest.mark.pkvm

PAGE = 4096
DESCRIPTORS, DRIVER, DEVICE, HEADER = 0x8080_0000, 0x8080_1000, 0x8080_2000, 0x8080_3000
STATUS = HEADER + 64
DATA, PAGES = 0x8084_0000, 64
TURNS = 24
"""Segments of a request, all of them the same pages: so that it takes a while."""
ROUNDS = 5
BYTES = TURNS * PAGES * PAGE
SECRET = 0x5EC4_E75E_C4E7_5EC4
PUBLIC = 0x4141_4141_4141_4141
_NEXT, _WRITE = 1, 2


class DiskCard(Card):
    """A queue with one request, made again and again."""

    def set_up(self, kind: Request) -> None:
        """Lay the request out in shared pages, and start the device."""
        self.guest.fill(DESCRIPTORS, 4 * PAGE)
        self.guest.share(DESCRIPTORS, 4)
        assert self.negotiate(1 << 32 | 1 << 33)
        self.store(Register.QUEUE_SEL, 0)
        self.store(Register.QUEUE_SIZE, 32)
        self.store(Register.QUEUE_DESC_LOW, DESCRIPTORS)
        self.store(Register.QUEUE_DRIVER_LOW, DRIVER)
        self.store(Register.QUEUE_DEVICE_LOW, DEVICE)
        self.store(Register.QUEUE_READY, 1)
        self.store(Register.STATUS, RUNNING)
        ram = Ram(self.guest)
        ram.write(HEADER, struct.pack("<IIQ", kind, 0, 0))
        data = [(DATA, PAGES * PAGE, _WRITE if kind is Request.IN else 0)] * TURNS
        for number, (gpa, size, flags) in enumerate([(HEADER, 16, 0), *data, (STATUS, 1, _WRITE)]):
            more = _NEXT if number <= TURNS else 0
            ram.write(DESCRIPTORS + 16 * number, struct.pack("<QIHH", gpa, size, flags | more, number + 1))
        self.made = 0

    def begin(self) -> None:
        """Make the request once more."""
        self.guest.write8(STATUS, 0xEE)
        self.made += 1  # every entry of the ring is descriptor 0
        self.guest.write16(DRIVER + 2, self.made)
        self.store(Register.QUEUE_NOTIFY, 0)

    def end(self) -> int:
        """Wait for the request; returns its status."""
        eventually(lambda: self.guest.read16(DEVICE + 2) == self.made)
        return self.guest.read8(STATUS)


@contextlib.contextmanager
def disk(protection: Protection, path: Path, kind: Request) -> Iterator[tuple[VirtioBlk, DiskCard, Puppet]]:
    """Start a device for two vCPUs: one is its driver, the other unshares pages."""
    # There is no pool: its size would limit that of a request.
    with puppet(protection, cpus=2, devices=(Disk(str(path)),), swiotlb=0) as (machine, guest):
        guest.fill(DATA, PAGES * PAGE, PUBLIC)
        guest.share(DATA, PAGES)
        card = DiskCard(guest, protection)
        card.set_up(kind)
        device = next(transport.device for transport in machine.virtio)
        assert isinstance(device, VirtioBlk)
        yield device, card, guest.cpu_on(1)
        assert card.load(Register.STATUS) == RUNNING


def race(card: DiskCard, other: Puppet, turn: int) -> int:
    """Make a request while the guest unshares each of its pages in turn; returns its status."""
    taken = other.start_unshare(DATA, PAGES)
    time.sleep(0.003 * turn)
    card.begin()
    status = card.end()
    assert taken.result().pages == PAGES
    return status


@isolating
def test_pages_unshared_during_a_read_are_private_from_then_on(protection: Protection, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"\xdd" * BYTES)
    with disk(protection, path, Request.IN) as (device, card, other):
        for turn in range(ROUNDS):
            assert race(card, other, turn) in (OK, IOERR)
            other.fill(DATA, PAGES * PAGE, SECRET)
            card.begin()
            assert card.end() == IOERR
            assert other.sum(DATA, PAGES * PAGE) == PAGES * PAGE // 8 * SECRET % 2**64
            other.share(DATA, PAGES)
        counted = device.counters()
        assert counted["denied"] == counted["failed"] >= ROUNDS
        card.begin()
        assert card.end() == OK
        assert other.sum(DATA, PAGES * PAGE) == PAGES * PAGE // 8 * 0xDDDD_DDDD_DDDD_DDDD % 2**64


@isolating
def test_pages_unshared_during_a_write_do_not_reach_the_disk(protection: Protection, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(BYTES))
    with disk(protection, path, Request.OUT) as (_, card, other):
        for turn in range(ROUNDS):
            assert race(card, other, turn) in (OK, IOERR)
            other.fill(DATA, PAGES * PAGE, SECRET)
            card.begin()
            assert card.end() == IOERR
            assert SECRET.to_bytes(8, "little") not in path.read_bytes()
            other.fill(DATA, PAGES * PAGE, PUBLIC)
            other.share(DATA, PAGES)
        card.begin()
        assert card.end() == OK
    assert path.read_bytes() == PUBLIC.to_bytes(8, "little") * (BYTES // 8)


@isolating
def test_a_request_for_a_page_that_was_unshared_before_fails(protection: Protection, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"\xdd" * BYTES)
    with disk(protection, path, Request.IN) as (device, card, other):
        for page in (HEADER, DATA):
            other.unshare(page)
            card.made += 1
            other.write16(DRIVER + 2, card.made)
            card.store(Register.QUEUE_NOTIFY, 0)
            card.end()
            other.share(page)
        assert device.counters() | {"bytes_read": 0} == {
            "done": 0,
            "failed": 2,
            "denied": 1,
            "bytes_read": 0,
            "bytes_written": 0,
        }
        card.begin()
        assert card.end() == OK
