# SPDX-License-Identifier: Apache-2.0
"""A machine's life: pause and resume, slots that move, a stuck reader, and a failure while it is built."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

from pyvmm.devices.exit_targets import ExitTargets
from pyvmm.devices.mailbox import Mailboxes
from pyvmm.devices.pl011 import Pl011
from pyvmm.errors import PyvmmError
from pyvmm.guest.orders import Access
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.machine import Machine, boot
from pyvmm.memory.choices import ConversionPolicy
from pyvmm.memory.memory import Memory
from pyvmm.memory.slots import SlotTable
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import ALL, Footprint, config, puppet

pytestmark = pytest.mark.pkvm
PAGE = 0x8080_0000


def test_a_paused_guest_stands_still_and_continues_on_resume() -> None:
    with puppet(Protection.PKVM, cpus=2) as (machine, guest):
        guest.write64(PAGE, 0)
        guest.share(PAGE)
        order = guest.start_hammer(PAGE, 8, 1 << 40, Access.WRITE)
        time.sleep(0.2)
        machine.pause()
        first = machine.memory.read(PAGE, 8)
        counted = machine.counters.total
        time.sleep(0.2)
        assert machine.memory.read(PAGE, 8) == first
        assert machine.counters.total == counted
        machine.resume()
        deadline = time.monotonic() + 10
        while machine.memory.read(PAGE, 8) == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert machine.memory.read(PAGE, 8) != first
        assert not order.done()


def test_a_device_that_does_not_come_to_rest_leaves_no_vcpu_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    with puppet(Protection.PKVM, cpus=2) as (machine, guest):

        def stuck(_self: ExitTargets) -> None:
            raise PyvmmError("stuck on purpose")

        with monkeypatch.context() as patch:
            patch.setattr(ExitTargets, "pause", stuck)
            with pytest.raises(PyvmmError, match="on purpose"):
                machine.pause()
        assert not machine.paused
        guest.write64(PAGE, 1)
        machine.pause()
        machine.resume()
        assert guest.read64(PAGE) == 1


@pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)
def test_a_stuck_reader_does_not_delay_a_deadline(protection: Protection) -> None:
    before = Footprint.now()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while os.write(writer, b"x" * 4096):
            pass
    except BlockingIOError:
        pass
    params = ("way=flood", "bytes=100000000")
    with Machine(config("payload:crash", protection, serial_out=writer, params=params, deadline=3.0)) as machine:
        started = time.monotonic()
        outcome = machine.run()
        assert outcome.ending is Ending.DEADLINE
        assert time.monotonic() - started < 20
    os.close(reader)
    os.close(writer)
    assert Footprint.now() == before


def test_output_lost_after_the_guest_ended_is_still_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvmm.devices.pl011.LINGER", 5.0)  # all of it is written at the end
    with open("/dev/full", "wb") as full:
        settings = config("payload:hello", Protection.PKVM, serial_out=full.fileno())
        with Machine(settings) as machine:
            outcome = machine.run()
    assert (outcome.ending, outcome.status) == (Ending.FAILED, 1)
    assert "No space left" in outcome.reason


def test_vcpus_do_not_notice_that_the_slots_they_use_move() -> None:
    """The copy policy splits the slot around each shared page while another vCPU hammers the neighbouring page."""
    with puppet(Protection.EMULATED, cpus=2, conversion=ConversionPolicy.COPY) as (machine, guest):
        other = guest.cpu_on(1)
        hammering = other.start_hammer(PAGE + 4096, 4096, 1 << 40, Access.WRITE)
        for value in range(5):
            guest.write64(PAGE, value)
            guest.share(PAGE)
            assert machine.memory.read(PAGE, 8) == value.to_bytes(8, "little")
            guest.unshare(PAGE)
            assert guest.read64(PAGE) == value
        assert not hammering.done()
        assert {e.name: e.count for e in machine.counters.exits}["unclaimed"] == 0


def test_two_vcpus_convert_pages_at_once_without_waiting_for_each_other() -> None:
    with puppet(Protection.EMULATED, cpus=2, conversion=ConversionPolicy.COPY) as (_, guest):
        other = guest.cpu_on(1)
        for _ in range(5):
            orders = [guest.start_share(PAGE), other.start_share(PAGE + 8192)]
            assert [order.result(20).status for order in orders] == [0, 0]
            orders = [guest.start_unshare(PAGE), other.start_unshare(PAGE + 8192)]
            assert [order.result(20).status for order in orders] == [0, 0]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Vm, "create_vcpu"),
        (Vcpu, "init"),
        (Vcpu, "set_reg"),
        (SlotTable, "check_new"),
        (Pl011, "__init__"),
        (Mailboxes, "__init__"),
        (ExitTargets, "__init__"),
        (boot, "place"),
        (Vm, "set_memory"),
        (Memory, "seal"),
        (Pl011, "start"),
        (threading.Thread, "start"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.rpartition(".")[2],
)
def test_a_machine_that_fails_while_it_is_built_leaves_nothing(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Machine(config("payload:hello", Protection.PKVM)) as machine:
        machine.run()
    before = Footprint.now()

    def broken(*_: object, **__: object) -> None:
        raise PyvmmError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        with (
            pytest.raises(PyvmmError, match="on purpose"),
            Machine(config("payload:hello", Protection.PKVM, cpus=2)) as machine,
        ):
            machine.run()
    assert Footprint.now() == before
