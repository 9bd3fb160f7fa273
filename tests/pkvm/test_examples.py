# SPDX-License-Identifier: Apache-2.0
"""The examples of pyvmm/examples: a guest throws the dice, and each script prints what it says it does."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from pyvmm.devices.base import Device, Trigger
from pyvmm.errors import UsageError
from pyvmm.examples.dice import Dice, DiceDevice
from pyvmm.experiment.environment import INSTRUCTIONS, counts
from pyvmm.experiment.experiment import Experiment
from pyvmm.labenv import in_lab
from pyvmm.machine import layout
from pyvmm.machine.machine import Machine
from pyvmm.machine.saving import save
from pyvmm.machine.snapshot import Snapshot
from pyvmm.protection import Protection
from tests.documents import ROOT
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


# ---- scripts


def printed(name: str) -> list[str]:
    """Run an example as its docstring says, and return the lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"pyvmm.examples.{name}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_hole_takes_a_plain_guests_page_and_not_a_protected_ones() -> None:
    assert printed("hole") == [
        "none  memfd    the guest reads  0, the host reads 0",
        "none  private  the guest reads  0, the host faults",
        "pkvm  memfd    the guest reads 42, the host reads 0",
    ]


def test_subscriber_prints_each_share_before_the_guest_goes_on() -> None:
    *events, last = [re.sub(r"0x[0-9a-f_]+ to 0x[0-9a-f_]+", "it", line) for line in printed("share_log")]
    assert events == [
        "1: the guest shares it (doorbell)",
        "2: the guest shares it (doorbell)",
        "3: the guest shares it (doorbell)",
        "the guest finds 1 2 3",
        "4: the guest unshares it (doorbell)",
    ]
    assert last == "the host reads None from the first page, 2 from the second"


def test_fault_latency_is_printed_with_its_unit_and_what_it_is_worth() -> None:
    cold, populated, *note = printed("fault_latency")
    unit = "instructions" if counts() == INSTRUCTIONS else "ns"
    for line, state in ((cold, "cold"), (populated, "populated")):
        found = re.fullmatch(rf"{state} +320 pages, median ([\d,]+) {unit} a first store", line)
        assert found, line
        assert int(found[1].replace(",", "")) > 0  # the guest's record has its times
    emulated = in_lab() and unit == "ns"
    assert [line.partition(":")[0] for line in note] == ["meaningless in time"] * emulated
