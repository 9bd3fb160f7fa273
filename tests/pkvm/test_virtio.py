# SPDX-License-Identifier: Apache-2.0
"""A virtio device in real guests: rings in pages that the guest shares, takes back, or never shared."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from pyvmm.devices.kinds.rng import Rng
from pyvmm.devices.virtio.device import Feature
from pyvmm.devices.virtio.registers import Register, Status
from pyvmm.guest.orders import Access
from pyvmm.guest.puppet import Puppet
from pyvmm.machine import layout
from pyvmm.protection import Protection
from tests.pkvm.harness import ALL, DEADLINE, puppet
from tests.twin_virtqueue import Driver, Rings

pytestmark = pytest.mark.pkvm
each_protection = pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)
isolating = pytest.mark.parametrize("protection", [Protection.EMULATED, Protection.PKVM], ids=lambda p: p.value)

RINGS, DATA, PRIVATE, TABLES = 0x8080_0000, 0x8080_3000, 0x8080_4000, 0x8090_0000
RUNNING = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
# Arm IHI 0069, 12.9: pending bits, and how each interrupt is triggered; number 64 is SPI 32.
PENDING = layout.GIC_DISTRIBUTOR.start + 0x200 + 4 * 2
TRIGGER = layout.GIC_DISTRIBUTOR.start + 0xC00 + 4 * 4
EDGE = 2


class Ram:
    """Guest memory as the guest itself reads and writes it."""

    def __init__(self, guest: Puppet) -> None:
        self.guest = guest

    @staticmethod
    def _parts(gpa: int, n: int) -> Iterator[tuple[int, int]]:
        done = 0
        while done < n:
            size = next(size for size in (8, 4, 2, 1) if (gpa + done) % size == 0 and size <= n - done)
            yield done, size
            done += size

    def read(self, gpa: int, n: int) -> bytes:
        parts = self._parts(gpa, n)
        return b"".join(getattr(self.guest, f"read{8 * s}")(gpa + at).to_bytes(s, "little") for at, s in parts)

    def write(self, gpa: int, data: bytes) -> None:
        for at, size in self._parts(gpa, len(data)):
            self.guest.write(gpa + at, int.from_bytes(data[at : at + size], "little"), size)


class Card:
    """The first device's registers, from inside the guest."""

    def __init__(self, guest: Puppet, protection: Protection) -> None:
        self.guest, self.protection = guest, protection

    def load(self, register: int) -> int:
        return self.guest.read32(layout.VIRTIO_MMIO.start + register)

    def store(self, register: int, value: int) -> None:
        self.guest.write32(layout.VIRTIO_MMIO.start + register, value & 0xFFFF_FFFF)

    def negotiate(self, features: int) -> bool:
        for status in (0, Status.ACKNOWLEDGE, Status.ACKNOWLEDGE | Status.DRIVER):
            self.store(Register.STATUS, status)
        for number in range(2):
            self.store(Register.DRIVER_FEATURES_SEL, number)
            self.store(Register.DRIVER_FEATURES, features >> 32 * number)
        self.store(Register.STATUS, RUNNING ^ Status.DRIVER_OK)
        return bool(self.load(Register.STATUS) & Status.FEATURES_OK)

    def drive(self, *, packed: bool) -> Driver:
        """Set up the queue, in pages that are shared already, and start."""
        features = Feature.VERSION_1 | Feature.RING_PACKED * packed
        assert self.negotiate(features | Feature.ACCESS_PLATFORM * self.protection.isolates)
        rings = Rings(4, RINGS, RINGS + 0x1000, RINGS + 0x2000, packed)
        for area in (rings.descriptors, rings.driver, rings.device):
            self.guest.fill(area, 128)
        self.store(Register.QUEUE_SEL, 0)
        self.store(Register.QUEUE_SIZE, rings.size)
        self.store(Register.QUEUE_DESC_LOW, rings.descriptors)
        self.store(Register.QUEUE_DRIVER_LOW, rings.driver)
        self.store(Register.QUEUE_DEVICE_LOW, rings.device)
        self.store(Register.QUEUE_READY, 1)
        assert self.load(Register.QUEUE_READY) == 1
        self.store(Register.STATUS, RUNNING)
        return Driver(Ram(self.guest), rings, TABLES)

    def ask(self, driver: Driver, gpa: int, size: int) -> int:
        """Have the device fill ``size`` bytes; returns the bytes it filled."""
        assert driver.add([(gpa, size, True)]) is not None
        self.store(Register.QUEUE_NOTIFY, 0)
        self.interrupted(1)
        [(_, written)] = driver.used()
        return written

    def interrupted(self, bit: int) -> None:
        eventually(lambda: self.load(Register.INTERRUPT_STATUS) & bit)
        self.store(Register.INTERRUPT_ACK, bit)


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end


@contextlib.contextmanager
def card(protection: Protection, cpus: int = 1) -> Iterator[tuple[Puppet, Card]]:
    """Make a device whose rings and one data page are shared; the next page is not. The guest needs no pool."""
    with puppet(protection, devices=(Rng(),), cpus=cpus, swiotlb=0) as (_, guest):
        guest.fill(RINGS, 5 * 4096)
        guest.share(RINGS, 4)
        yield guest, Card(guest, protection)


@each_protection
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_the_device_fills_the_guests_request_and_interrupts_it(protection: Protection, packed: bool) -> None:
    with card(protection) as (guest, device):
        guest.write32(TRIGGER, EDGE)
        driver = device.drive(packed=packed)
        assert not guest.read32(PENDING) & 1
        seen = set()
        for _ in range(6):
            assert device.ask(driver, DATA, 64) == 64
            seen |= set(guest.words(DATA, 8))
            assert guest.read64(DATA + 64) == 0
        assert len(seen) == 48
        assert guest.read32(PENDING) & 1


@isolating
def test_an_unshared_page_fails_only_its_request(protection: Protection) -> None:
    with card(protection) as (guest, device):
        guest.fill(PRIVATE, 64, 0x5EC4E7)
        driver = device.drive(packed=True)
        assert device.ask(driver, PRIVATE, 64) == 0
        assert guest.words(PRIVATE, 8) == (0x5EC4E7,) * 8
        assert device.ask(driver, DATA, 64) == 64
        guest.unshare(DATA)
        assert device.ask(driver, DATA, 64) == 0


@isolating
def test_unsharing_the_rings_breaks_the_device_until_its_reset(protection: Protection) -> None:
    with card(protection) as (guest, device):
        driver = device.drive(packed=False)
        assert device.ask(driver, DATA, 64) == 64
        guest.unshare(RINGS + 0x2000)
        driver.add([(DATA, 64, True)])
        device.store(Register.QUEUE_NOTIFY, 0)
        device.interrupted(2)
        assert device.load(Register.STATUS) == RUNNING | Status.NEEDS_RESET
        guest.share(RINGS + 0x2000)
        assert device.ask(device.drive(packed=False), DATA, 64) == 64


@isolating
def test_the_device_refuses_a_driver_that_does_not_share_memory(protection: Protection) -> None:
    with card(protection) as (_, device):
        assert not device.negotiate(Feature.VERSION_1)
        assert device.negotiate(Feature.VERSION_1 | Feature.ACCESS_PLATFORM)


def test_descriptors_overwritten_by_another_vcpu_do_no_harm() -> None:
    with card(Protection.PKVM, cpus=2) as (guest, device):
        other = guest.cpu_on(1)
        for packed in (False, True):
            driver = device.drive(packed=packed)
            writing = other.start_hammer(RINGS, 64, 5_000, Access.WRITE)
            while not writing.done():
                if driver.add([(DATA, 64, True)]) is None:
                    driver = device.drive(packed=packed)
                device.store(Register.QUEUE_NOTIFY, 0)
            writing.result()
            # The requests may fail. After a reset the device works again.
            assert device.ask(device.drive(packed=packed), DATA, 64) == 64
