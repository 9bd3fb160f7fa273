# SPDX-License-Identifier: Apache-2.0
"""A guest that is paused or halted by a debugger sees no time pass. Needs no KVM.

Its counters are set back before a vCPU runs again.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import pytest

from pyvmm.debug.monitor import answer
from pyvmm.debug.protocol import Go
from pyvmm.debug.target import GuestTarget
from pyvmm.kvm.stand_in import StandIn
from pyvmm.machine.clock import COUNTERS
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.memory.address import MIB
from pyvmm.protection import Protection
from pyvmm.session.requests import Requests
from pyvmm.vcpu.thread import VcpuThread

if TYPE_CHECKING:
    from pyvmm.kvm.causes import Value
    from pyvmm.kvm.fd import CData, Fd
    from pyvmm.uapi.ioctl import Ioctl


class Ticking(StandIn):
    """A fake kernel whose counters advance by 1000 at each read; ``heard`` records the accesses."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.refuses = 0
        self.heard: list[tuple[str, int, int]] = []

    def ioctl(self, fd: Fd, request: Ioctl, argument: int | CData, values: Mapping[str, Value]) -> tuple[int, int]:
        register = values.get("id")
        if register not in COUNTERS or isinstance(argument, int):
            return super().ioctl(fd, request, argument, values)
        if self.refuses:
            return -1, self.refuses
        room = ctypes.c_uint64.from_address(argument.addr)  # type: ignore[union-attr]
        if request.name == "KVM_GET_ONE_REG":
            self.now += 1000
            room.value = self.now
        self.heard.append((request.name.split("_")[1], COUNTERS.index(int(register or 0)), room.value))
        return 0, 0


@pytest.fixture
def kernel() -> Ticking:
    return Ticking()


@pytest.fixture(params=[Protection.NONE, Protection.EMULATED])
def machine(
    request: pytest.FixtureRequest, kernel: Ticking, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Machine, list[str]]]:
    """Make a machine whose vCPUs only pause and resume; returns it with the record of their actions."""
    done: list[str] = []
    monkeypatch.setattr(VcpuThread, "pause", lambda _self: done.append("pause"))
    monkeypatch.setattr(VcpuThread, "wait_paused", lambda _self, _timeout=None: done.append("stands"))
    monkeypatch.setattr(VcpuThread, "resume", lambda _self: done.append(f"resume {len(kernel.heard)}"))
    config = MachineConfig("payload:hello", request.param, memory=16 * MIB, cpus=2, serial_out=None)
    with Machine(config, kernel=kernel) as machine:
        yield machine, done


SAVED = [("GET", 0, 1000), ("GET", 1, 2000)]
PUT_BACK = [("SET", 0, 1000), ("SET", 1, 2000)]


def test_counters_are_set_back_before_the_first_vcpu_runs(machine: tuple[Machine, list[str]], kernel: Ticking) -> None:
    it, done = machine
    it.pause()
    assert (kernel.heard, done) == (SAVED, ["pause", "pause", "stands", "stands"])
    it.resume()
    assert kernel.heard == [*SAVED, *PUT_BACK]
    assert done[4:] == ["resume 4", "resume 4"]


def test_pauses_nest_and_each_outermost_pause_reads_the_counters_again(
    machine: tuple[Machine, list[str]], kernel: Ticking
) -> None:
    it, _ = machine
    it.pause()
    it.pause()
    it.resume()
    assert kernel.heard == SAVED
    it.resume()
    it.pause()
    it.resume()
    assert kernel.heard[4:] == [("GET", 0, 3000), ("GET", 1, 4000), ("SET", 0, 3000), ("SET", 1, 4000)]


def test_a_failed_pause_lets_time_go_on(machine: tuple[Machine, list[str]], kernel: Ticking) -> None:
    it, _ = machine

    def stuck() -> None:
        raise TimeoutError

    it.uart.pause = stuck  # type: ignore[method-assign]
    with pytest.raises(TimeoutError):
        it.pause()
    assert kernel.heard == [*SAVED, *PUT_BACK]
    assert not it.paused


def test_a_counter_that_the_kernel_does_not_report_is_not_changed(
    machine: tuple[Machine, list[str]], kernel: Ticking
) -> None:
    it, _ = machine
    kernel.refuses = errno.EPERM
    it.pause()
    assert "KVM_GET_ONE_REG" in (it.clock.goes_on or "")
    kernel.refuses = 0
    it.resume()
    assert kernel.heard == []


def test_a_clock_that_something_else_uses_is_not_changed(machine: tuple[Machine, list[str]], kernel: Ticking) -> None:
    it, _ = machine
    it.clock.goes_on = "the hypervisor is traced by it"
    it.pause()
    it.resume()
    assert kernel.heard == []


@pytest.mark.parametrize("protection", list(Protection))
def test_the_user_hears_that_time_goes_on_during_a_pause(
    protection: Protection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Requests, "state", "paused")
    monkeypatch.setattr(Machine, "pause", lambda _self: None)
    config = MachineConfig("payload:hello", protection, memory=16 * MIB, serial_out=None)
    with Machine(config, kernel=Ticking()) as machine:
        told = Requests(machine).pause()
    if protection is Protection.PKVM:
        assert told == {"state": "paused", "clock": "goes on: the hypervisor keeps a protected guest's counters"}
    else:
        assert told == {"state": "paused"}


def test_the_counters_of_a_protected_guest_are_not_changed(kernel: Ticking) -> None:
    config = MachineConfig("payload:hello", Protection.PKVM, memory=16 * MIB, serial_out=None)
    with Machine(config, kernel=kernel) as machine:
        machine.clock.stop()
        machine.clock.go()
    assert kernel.heard == []


def debugger_of(machine: Machine) -> GuestTarget:
    """Return a debugger's view of ``machine``."""
    return GuestTarget(machine, lambda: None)


AGAIN = [("GET", 0, 3000), ("GET", 1, 4000)]


def test_a_debuggers_halt_stops_time_until_the_first_vcpu_runs(
    machine: tuple[Machine, list[str]], kernel: Ticking
) -> None:
    it, done = machine
    debugger = debugger_of(it)
    debugger.halt()
    assert (kernel.heard, done) == (SAVED, ["pause", "pause", "stands", "stands"])
    debugger.halt()
    debugger.take_stop()
    assert kernel.heard == SAVED
    debugger.resume({1: Go.CONTINUE, 2: Go.CONTINUE})
    assert kernel.heard == [*SAVED, *PUT_BACK]
    assert done[4:] == ["resume 4", "resume 4"]


@pytest.mark.parametrize("go", list(Go))
def test_time_goes_on_while_a_debugger_runs_one_vcpu(
    go: Go, machine: tuple[Machine, list[str]], kernel: Ticking
) -> None:
    it, done = machine
    debugger = debugger_of(it)
    debugger.halt()
    debugger.resume({2: go})
    assert (kernel.heard, done[4:]) == ([*SAVED, *PUT_BACK], ["resume 4"])
    debugger.resume({1: Go.CONTINUE})
    assert kernel.heard == [*SAVED, *PUT_BACK]
    debugger.halt()
    assert kernel.heard == [*SAVED, *PUT_BACK, *AGAIN]


def test_a_guest_that_its_debugger_leaves_sees_no_time_pass(
    machine: tuple[Machine, list[str]], kernel: Ticking
) -> None:
    it, done = machine
    debugger = debugger_of(it)
    debugger.detach()
    assert kernel.heard == [*SAVED, *PUT_BACK]
    assert done[4:] == ["resume 4", "resume 4"]


@pytest.mark.parametrize("last", ["the debugger", "the pause"])
def test_time_stands_until_both_a_debugger_and_a_pause_let_it_go(
    last: str, machine: tuple[Machine, list[str]], kernel: Ticking
) -> None:
    it, _ = machine
    debugger = debugger_of(it)
    debugger.halt()
    it.pause()
    ends = [lambda: debugger.resume({1: Go.CONTINUE, 2: Go.CONTINUE}), it.resume]
    for end in ends if last == "the pause" else reversed(ends):
        assert kernel.heard == SAVED
        end()
    assert kernel.heard == [*SAVED, *PUT_BACK]


@pytest.mark.parametrize("protection", list(Protection))
def test_the_debugger_is_told_whether_time_stands(protection: Protection) -> None:
    config = MachineConfig("payload:hello", protection, memory=16 * MIB, serial_out=None)
    kernel = Ticking()
    with Machine(config, kernel=kernel) as machine:
        debugger = debugger_of(machine)
        debugger.halt()
        told = answer(debugger, 1, "info")
    if protection is Protection.PKVM:
        assert "time goes on while it is stopped: the hypervisor keeps a protected guest's counters\n" in told
        assert kernel.heard == []
    else:
        assert "the guest's time stands while all of its vCPUs are stopped\n" in told
