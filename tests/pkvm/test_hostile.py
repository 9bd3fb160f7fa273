# SPDX-License-Identifier: Apache-2.0
"""A guest attacks each device of a real VM and then uses it again. Its rings are in shared or unshared pages."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pyvmm.devices.kinds.console import Console
from pyvmm.devices.kinds.disk import Disk
from pyvmm.devices.kinds.net import Net
from pyvmm.devices.kinds.rng import Rng
from pyvmm.devices.kinds.vsock import Vsock
from pyvmm.devices.virtio.blk import Request
from pyvmm.devices.virtio.device import Feature
from pyvmm.devices.virtio.registers import SIZE, Register, Status
from pyvmm.devices.virtio.vsock_packet import CID_HOST, OP_RST, STREAM, Header
from pyvmm.guest.orders import Access
from pyvmm.guest.puppet import Puppet
from pyvmm.machine import layout
from pyvmm.protection import Protection
from tests.pkvm.harness import puppet
from tests.pkvm.test_virtio import RUNNING, Card, Ram, eventually, isolating

pytestmark = pytest.mark.pkvm

PAGE, ENTRIES, QUEUES = 4096, 16, 2
RINGS, DATA, PRIVATE = 0x8080_0000, 0x8080_2000, 0x8080_3000
ROOM = DATA + PAGE // 2
DRIVER, DEVICE = 0x400, 0x800
"""Where the other areas of a queue are in its page."""
PATTERN = 0x5EC4_E75E_C4E7_5EC4
CID = 3
_NEXT, _WRITE = 1, 2


class Usual(NamedTuple):
    """A request that a device answers after each kick: its queue, what the device reads, and what it may write.

    ``needs`` are the queues that the device cannot work without.
    """

    queue: int
    data: bytes
    room: int
    needs: tuple[int, ...]


USUAL = {
    "rng": Usual(0, b"", 64, (0,)),
    "disk": Usual(0, struct.pack("<IIQ", Request.FLUSH, 0, 0), 1, (0,)),
    "console": Usual(1, b"hello", 0, (1,)),
    "vsock": Usual(1, Header(CID, CID_HOST, 1, 1, 0, STREAM, OP_RST, 0, 0, 0).pack(), 0, (0, 1)),
    "card": Usual(1, bytes(12 + 60), 0, (1,)),
}


class Victim(Card):
    """The device ``number`` of the machine, and its driver."""

    def __init__(self, guest: Puppet, protection: Protection, number: int, usual: Usual) -> None:
        super().__init__(guest, protection)
        self.at, self.usual = layout.VIRTIO_MMIO.start + number * SIZE, usual
        self.ring = RINGS + usual.queue * PAGE
        self.made = 0

    def load(self, register: int) -> int:
        return self.guest.read32(self.at + register)

    def store(self, register: int, value: int) -> None:
        self.guest.write32(self.at + register, value & 0xFFFF_FFFF)

    def set_up(self, rings: int = RINGS) -> None:
        """Start the device with its queues in the pages at ``rings``. Each descriptor is the usual request."""
        assert self.negotiate(Feature.VERSION_1 | Feature.ACCESS_PLATFORM)
        _, data, room, needs = self.usual
        for number in needs:
            for area in (0, DRIVER, DEVICE):
                self.guest.fill(RINGS + number * PAGE + area, 128)
        ram = Ram(self.guest)
        ram.write(DATA, data)
        segments = [(DATA, len(data), 0)] * bool(data) + [(ROOM, room, _WRITE)] * bool(room)
        for place, (gpa, size, flags) in enumerate(segments):
            more = _NEXT * (place + 1 < len(segments))
            ram.write(self.ring + 16 * place, struct.pack("<QIHH", gpa, size, flags | more, place + 1))
        for number in needs:
            self.store(Register.QUEUE_SEL, number)
            self.store(Register.QUEUE_SIZE, ENTRIES)
            self.store(Register.QUEUE_DESC_LOW, rings + number * PAGE)
            self.store(Register.QUEUE_DRIVER_LOW, rings + number * PAGE + DRIVER)
            self.store(Register.QUEUE_DEVICE_LOW, rings + number * PAGE + DEVICE)
            self.store(Register.QUEUE_READY, 1)
        self.made = 0
        self.store(Register.STATUS, RUNNING)

    def request(self) -> None:
        """Make the request; every entry of the ring is the first descriptor."""
        self.made = self.made + 1 & 0xFFFF
        self.guest.write16(self.ring + DRIVER + 2, self.made)
        self.store(Register.QUEUE_NOTIFY, self.usual.queue)

    def broken(self) -> None:
        eventually(lambda: self.load(Register.STATUS) & Status.NEEDS_RESET)

    def serves(self) -> None:
        """Set the device up and check that it answers."""
        self.set_up()
        self.request()
        eventually(lambda: self.guest.read16(self.ring + DEVICE + 2) == self.made)
        assert self.load(Register.STATUS) == RUNNING


def keep_the_rings_private(victim: Victim, _other: Puppet) -> None:
    victim.set_up(PRIVATE)
    victim.request()
    victim.broken()


def take_back_meanwhile(victim: Victim, other: Puppet, gpa: int, pages: int) -> None:
    victim.serves()
    taking = other.start_unshare(gpa, pages)
    while not taking.done():
        victim.request()
    assert taking.result().pages == pages
    victim.request()


def take_the_rings_back_meanwhile(victim: Victim, other: Puppet) -> None:
    take_back_meanwhile(victim, other, RINGS, QUEUES)
    victim.broken()
    other.share(RINGS, QUEUES)


def take_the_data_back_meanwhile(victim: Victim, other: Puppet) -> None:
    take_back_meanwhile(victim, other, DATA, 1)
    other.share(DATA, 1)


def write_over_the_rings_meanwhile(victim: Victim, other: Puppet) -> None:
    victim.serves()
    writing = other.start_hammer(victim.ring, 64, 5000, Access.WRITE)
    while not writing.done():
        victim.request()
    writing.result()


def reset_meanwhile(victim: Victim, _other: Puppet) -> None:
    victim.serves()
    for _ in range(4):
        victim.request()
    victim.store(Register.STATUS, 0)
    assert victim.load(Register.STATUS) == 0


ATTACKS = (
    keep_the_rings_private,
    take_the_rings_back_meanwhile,
    take_the_data_back_meanwhile,
    write_over_the_rings_meanwhile,
    reset_meanwhile,
)


@contextlib.contextmanager
def victims(protection: Protection, folder: Path) -> Iterator[tuple[dict[str, Victim], Puppet, Puppet]]:
    """Start a machine with every device such a guest can have. Its first vCPU drives them, the second is free."""
    disk = folder / "disk"
    disk.write_bytes(bytes(1 << 20))
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(socket.socket(socket.AF_UNIX))
        peer.bind(str(folder / "peer"))
        peer.listen(1)
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        stack.callback(os.close, nowhere)
        devices = {
            "rng": Rng(),
            "disk": Disk(str(disk)),
            "console": Console(nowhere),
            "vsock": Vsock(str(folder / "v"), CID),
            "card": Net(socket=str(folder / "peer")),
        }
        _, guest = stack.enter_context(puppet(protection, cpus=2, devices=tuple(devices.values())))
        guest.fill(RINGS, (QUEUES + 1) * PAGE)
        guest.share(RINGS, QUEUES + 1)
        guest.fill(PRIVATE, QUEUES * PAGE, PATTERN)
        cards = {name: Victim(guest, protection, number, USUAL[name]) for number, name in enumerate(devices)}
        yield cards, guest, guest.cpu_on(1)


@isolating
def test_every_device_outlives_a_hostile_guest(protection: Protection, tmp_path: Path) -> None:
    with victims(protection, tmp_path) as (cards, guest, other):
        for name, victim in cards.items():
            for attack in ATTACKS:
                print(f"{name}: {attack.__name__}")  # pytest shows the last of these if the test fails
                attack(victim, other)
            victim.serves()
        assert guest.sum(PRIVATE, QUEUES * PAGE) == QUEUES * PAGE // 8 * PATTERN % 2**64
