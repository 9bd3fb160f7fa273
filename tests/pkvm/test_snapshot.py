# SPDX-License-Identifier: Apache-2.0
"""A saved machine continues in another one: registers, memory, state of interrupts, the clock."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pyvmm import abi
from pyvmm.errors import UsageError
from pyvmm.guest.orders import Access
from pyvmm.guest.puppet import Puppet
from pyvmm.machine import Machine
from pyvmm.machine.saving import save
from pyvmm.machine.snapshot import Snapshot
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import DEADLINE, Footprint, config, puppet

pytestmark = pytest.mark.pkvm
PAGE, OTHER = 0x8080_0000, 0x8090_0000


@pytest.mark.parametrize("backing", ["memfd", "anonymous", "guest_memfd"])
def test_a_restored_guest_continues_where_it_was_saved(tmp_path: Path, backing: str) -> None:
    path = str(tmp_path / "guest.snapshot")
    before = Footprint.now()
    with puppet(Protection.NONE, cpus=2, backing=backing) as (machine, guest):
        guest.write64(PAGE, 42)
        guest.cpu_on(1).write64(OTHER, 43)
        written = save(machine, path)
        # The saved guest continues too. What it does then is not in the file.
        guest.write64(PAGE, 1)
        settings = machine.config
    about = os.stat(path)
    assert written["bytes"] == about.st_size > settings.memory
    assert about.st_blocks * 512 < about.st_size // 4
    with Snapshot(path) as snapshot, Machine(settings, start=snapshot) as machine:
        machine.start()
        guest = Puppet(machine.mailboxes)
        assert guest.read64(PAGE) == 42
        assert Puppet(machine.mailboxes, 1).read64(OTHER) == 43
        guest.off()
        assert machine.wait(DEADLINE).ending is Ending.POWEROFF
        lazily = sum(each._server.served for each in snapshot.served)
        assert lazily < 1000 if backing == "guest_memfd" else 0 < lazily < settings.memory // 4096 // 4
    assert Footprint.now() == before


def test_a_restored_loop_continues_at_the_same_store_and_can_be_saved_again(tmp_path: Path) -> None:
    path, again = str(tmp_path / "one"), str(tmp_path / "two")
    with puppet(Protection.NONE) as (machine, guest):
        guest.write64(PAGE, 0)
        guest.start_hammer(PAGE, 8, 1 << 40, Access.WRITE)
        time.sleep(0.2)
        machine.pause()
        stood = count(machine)
        save(machine, path)
        settings = machine.config
    assert stood > 0
    with Machine(settings, start=Snapshot(path)) as machine:
        assert count(machine) == stood
        machine.start()
        first = advanced(machine, stood)
        save(machine, again)
        machine.stop()
        machine.wait(DEADLINE)
    with Machine(settings, start=Snapshot(again)) as machine:
        assert count(machine) >= first
        machine.start()
        advanced(machine, count(machine))
        machine.stop()
        machine.wait(DEADLINE)


def count(machine: Machine) -> int:
    return int.from_bytes(machine.memory.read(PAGE, 8), "little")


def advanced(machine: Machine, stood: int) -> int:
    deadline = time.monotonic() + DEADLINE
    while (now := count(machine)) == stood and time.monotonic() < deadline:
        time.sleep(0.01)
    assert now > stood
    return now


def test_the_guests_clock_stands_still_between_save_and_restore(tmp_path: Path) -> None:
    path = str(tmp_path / "clock")
    with puppet(Protection.NONE) as (machine, _):
        save(machine, path)
        settings = machine.config
    with open(path, "rb") as file:
        file.seek(4096)
        text = file.read(1 << 20).split(b"\0", 1)[0]
    saved = int(json.loads(text)["vcpus"][0]["registers"][hex(VIRTUAL)], 16)
    time.sleep(1)
    began = time.monotonic()
    with Machine(settings, start=Snapshot(path)) as machine:
        now, spent = machine.vcpus[0].get_reg(VIRTUAL), time.monotonic() - began
        time.sleep(0.2)
        later = machine.vcpus[0].get_reg(VIRTUAL)
        hertz = (later - now) / (time.monotonic() - began - spent)
        assert 0 <= now - saved < hertz * (spent + 0.2)


VIRTUAL = 0x6030_0000_0013_DF1A
"""KVM_REG_ARM_TIMER_CNT."""


def test_pyvmm_refuses_to_restore_an_unsuitable_snapshot_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "small"
    for protection in (Protection.PKVM, Protection.EMULATED):
        with puppet(protection) as (machine, _), pytest.raises(UsageError, match="cannot be saved"):
            save(machine, str(path))
    assert list(tmp_path.iterdir()) == []
    with puppet(Protection.NONE) as (machine, _):
        save(machine, str(path))
        settings = machine.config
    for other in (settings._replace(cpus=2), settings._replace(memory=settings.memory * 2)):
        with pytest.raises(UsageError, match="is of a machine with"), Machine(other, start=Snapshot(str(path))):
            pass


def test_a_flipped_bit_ends_the_run_when_the_guest_reaches_it_and_verify_finds_it_before(tmp_path: Path) -> None:
    path = tmp_path / "flipped"
    with puppet(Protection.NONE) as (machine, guest):
        guest.write64(PAGE, 42)
        guest.write64(OTHER, 43)
        save(machine, str(path))
        settings = machine.config
    with Snapshot(str(path)) as snapshot:
        snapshot.verify()
        at = snapshot.description["memory"][0]["offset"] + OTHER - 0x8000_0000
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"\x2a", at)  # 42 in place of 43
    with (
        Snapshot(str(path)) as snapshot,
        pytest.raises(UsageError, match="gpa 0x8090_0000 does not match its checksum"),
    ):
        snapshot.verify()
    with Machine(settings, start=Snapshot(str(path))) as machine:
        machine.start()
        guest = Puppet(machine.mailboxes)
        assert guest.read64(PAGE) == 42
        guest.start(abi.OP_READ, OTHER, 8)
        outcome = machine.wait(DEADLINE)
        assert outcome.ending is Ending.FAILED
        assert "gpa 0x8090_0000" in outcome.reason
        assert "does not match its checksum" in outcome.reason


def test_truncating_the_snapshot_file_while_its_guest_runs_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    with puppet(Protection.NONE) as (machine, guest):
        guest.write64(PAGE, 42)
        save(machine, str(path))
        settings = config("payload:puppet", Protection.NONE, memory=machine.config.memory)
    with Machine(settings, start=Snapshot(str(path))) as machine:
        os.truncate(path, 4096)
        machine.start()
        outcome = machine.wait(DEADLINE)
        assert outcome.ending is Ending.FAILED
        assert "a page of the snapshot cannot be read" in outcome.reason
