# SPDX-License-Identifier: Apache-2.0
"""A guest throws the dice of pyvmm/examples, in every protection."""

from __future__ import annotations

import os

import pytest

from pyvmm.devices.base import Device, Trigger
from pyvmm.errors import UsageError
from pyvmm.examples.dice import Dice, DiceDevice
from pyvmm.experiment.experiment import Experiment
from pyvmm.machine import layout
from pyvmm.machine.machine import Machine
from pyvmm.machine.saving import save
from pyvmm.machine.snapshot import Snapshot
from pyvmm.protection import Protection
from tests.pkvm.harness import ALL, config, puppet

pytestmark = pytest.mark.pkvm
each_protection = pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)

DICE = layout.OTHER_DEVICES.start


@each_protection
def test_guest_throws_a_dice_that_a_script_brings(protection: Protection) -> None:
    with Experiment(protection, devices=[DiceDevice()]) as experiment:
        experiment.start()
        guest = experiment.guest
        thrown = [guest.read32(DICE) for _ in range(200)]
        assert set(thrown) == {1, 2, 3, 4, 5, 6}
        guest.write32(DICE, 6)  # it cannot be told what to show
        assert guest.read64(DICE + 8) == 0


@each_protection
def test_guest_throws_a_dice_that_a_configuration_asks_for(protection: Protection) -> None:
    with puppet(protection, devices=(Dice(1), Dice(256))) as (_, guest):
        assert guest.read8(DICE) == 1
        assert len({guest.read16(DICE + 0x1_0000) for _ in range(40)}) > 10


class Alarm(Device):
    """Raises its line at a store of 1, and lets it go at one of 0."""

    name = "alarm"
    compatible = "test,alarm"
    trigger = Trigger.LEVEL

    def write(self, offset: int, size: int, value: int, vcpu: int) -> None:  # noqa: ARG002
        self.line.hold(bool(value))


@each_protection
def test_line_of_a_device_that_a_script_brings_reaches_the_guest(protection: Protection) -> None:
    alarm = Alarm()
    with Experiment(protection, devices=[alarm]) as experiment:
        experiment.start()
        # A guest tells its controller what the device tree says. Level-triggered (GICD_ICFGR), an interrupt is pending
        # (GICD_ISPENDR) for as long as its line is high.
        number = 32 + alarm.line.spi
        experiment.guest.write32(layout.GIC_DISTRIBUTOR.start + 0xC00 + 4 * (number // 16), 0)
        pending = layout.GIC_DISTRIBUTOR.start + 0x200 + 4 * (number // 32)
        told = []
        for level in (1, 0):
            experiment.guest.write32(DICE, level)
            told.append(experiment.guest.read32(pending) >> number % 32 & 1)
        assert told == [1, 0]


def test_snapshot_has_a_dice_and_names_a_device_that_cannot_be_saved(tmp_path: os.PathLike[str]) -> None:
    file = os.path.join(tmp_path, "snapshot")
    hello = config("payload:puppet", Protection.NONE)
    for device, said in ((DiceDevice(), None), (Alarm(), "the device alarm cannot be saved")):
        with Machine(hello, devices=[device]) as machine:
            machine.start()
            if said is None:
                save(machine, file)
                continue
            with pytest.raises(UsageError, match=said):
                save(machine, os.path.join(tmp_path, "other"))
    with Machine(hello, start=Snapshot(file), devices=[DiceDevice()]) as machine:
        assert [placed.device.name for placed in machine.bus.placed][-1] == "dice"
    with pytest.raises(UsageError, match="is of a machine with devices"), Machine(hello, start=Snapshot(file)):
        pass
