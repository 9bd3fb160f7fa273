# SPDX-License-Identifier: Apache-2.0
"""Kicks of a virtqueue that the kernel handles, and kicks that still reach the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.devices.kinds.rng import Rng
from pyvmm.devices.virtio.registers import Register, Status
from pyvmm.guest.puppet import Puppet
from pyvmm.kvm.fd import Kernel
from pyvmm.kvm.stand_in import Lacking
from pyvmm.machine.machine import Machine
from pyvmm.machine.saving import save
from pyvmm.machine.snapshot import Snapshot
from pyvmm.protection import Protection
from pyvmm.uapi.kvm_cap import KVM_CAP_IOEVENTFD
from tests.pkvm.harness import ALL, DEADLINE, config
from tests.pkvm.test_virtio import DATA, RINGS, Card, Ram, eventually

pytestmark = pytest.mark.pkvm
each_protection = pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)


@contextlib.contextmanager
def running(machine: Machine) -> Iterator[Puppet]:
    with machine:
        machine.start()
        try:
            yield Puppet(machine.mailboxes)
        finally:
            machine.stop("the test is over")
            machine.wait(DEADLINE)


@contextlib.contextmanager
def card(protection: Protection, kernel: Kernel | None = None) -> Iterator[tuple[Machine, Card]]:
    """Make a device whose rings and one data page are shared, in a guest that needs no pool."""
    made = Machine(config("payload:puppet", protection, devices=(Rng(),), swiotlb=0), kernel=kernel)
    with running(made) as guest:
        guest.fill(RINGS, 4 * 4096)
        guest.share(RINGS, 4)
        yield made, Card(guest, protection)


def exits(machine: Machine) -> int:
    """Count the exits to the loop's doorbells."""
    return sum(each.count for each in machine.counters.exits if each.name == "mmio-doorbell")


@each_protection
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_each_kick_arrives_without_an_exit(protection: Protection, packed: bool) -> None:
    with card(protection) as (machine, device):
        driver = device.drive(packed=packed)
        for number in range(1, 9):
            assert device.ask(driver, DATA, 64) == 64
            assert (machine.kicks, exits(machine)) == (number, 0)
        assert machine.counters.line().count("; 8 kicks without an exit") == 1


@each_protection
def test_kicks_of_other_widths_and_numbers_reach_the_loop(protection: Protection) -> None:
    with card(protection) as (machine, device):
        driver = device.drive(packed=False)
        [transport] = machine.virtio
        for number, size in enumerate((1, 2, 8), 1):
            driver.add([(DATA, 16, True)])
            device.guest.write(0x0A00_0000 + Register.QUEUE_NOTIFY, 0, size)
            device.interrupted(1)
            assert [written for _, written in driver.used()] == [16]
            assert exits(machine) == number
        device.store(Register.QUEUE_NOTIFY, 1)
        device.store(Register.QUEUE_NOTIFY, 0xFFFF_0000)
        device.guest.write8(0x0A00_0000 + Register.QUEUE_NOTIFY + 1, 0)
        assert (exits(machine), int(transport.native.bell.missed)) == (6, 3)


@each_protection
def test_kicks_of_an_unready_queue_are_ignored_and_the_next_driver_is_served(protection: Protection) -> None:
    with card(protection) as (machine, device):
        device.store(Register.QUEUE_NOTIFY, 0)
        assert exits(machine) == 1  # no queue has been ready yet
        assert device.ask(device.drive(packed=False), DATA, 64) == 64
        device.store(Register.STATUS, 0)
        for _ in range(100):
            device.store(Register.QUEUE_NOTIFY, 0)
        assert (exits(machine), device.load(Register.STATUS)) == (1, 0)
        assert device.ask(device.drive(packed=True), DATA, 64) == 64


@each_protection
def test_the_loop_handles_kicks_when_the_kernel_has_no_ioeventfd(protection: Protection) -> None:
    with card(protection, Lacking(KVM_CAP_IOEVENTFD)) as (machine, device):
        driver = device.drive(packed=False)
        for number in range(1, 6):
            assert device.ask(driver, DATA, 64) == 64
            assert (machine.kicks, exits(machine)) == (0, number)


@each_protection
def test_a_kick_during_a_pause_is_served_afterwards(protection: Protection) -> None:
    with card(protection) as (machine, device):
        driver = device.drive(packed=False)
        for _ in range(5):
            driver.add([(DATA, 64, True)])
            device.store(Register.QUEUE_NOTIFY, 0)
            machine.pause()
            machine.resume()
            device.interrupted(1)
            assert [written for _, written in driver.used()] == [64]
        eventually(lambda: machine.kicks == 5)


def test_a_restored_guest_kicks_without_an_exit(tmp_path: Path) -> None:
    path = str(tmp_path / "guest")
    with card(Protection.NONE) as (machine, device):
        driver = device.drive(packed=False)
        assert device.ask(driver, DATA, 64) == 64
        save(machine, path)
        ram, settings = driver.ram, machine.config
    again = Machine(settings, start=Snapshot(path))
    with running(again) as guest:
        assert isinstance(ram, Ram)
        ram.guest = device.guest = guest
        assert Status(device.load(Register.STATUS)) & Status.DRIVER_OK
        assert device.ask(driver, DATA, 64) == 64
        assert (again.kicks, exits(again)) == (1, 0)
