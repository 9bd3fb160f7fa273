# SPDX-License-Identifier: Apache-2.0
"""A guest that is paused or halted by gdb sees no time pass, if the kernel lets pyvmm set its counters back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyvmm.machine.clock import COUNTERS
from pyvmm.machine.machine import Machine
from pyvmm.protection import Protection
from tests.pkvm.harness import puppet
from tests.pkvm.test_gdb import debugged

pytestmark = pytest.mark.pkvm


@dataclass(frozen=True)
class Reading:
    """What the counters said at a time of the host."""

    seconds: float
    counters: list[int]

    @classmethod
    def of(cls, machine: Machine) -> Reading:
        """Read each counter while no vCPU runs."""
        return cls(time.monotonic(), [machine.vcpus[0].get_reg(counter) for counter in COUNTERS])


def assert_time_stood(begin: Reading, end: Reading, after: Reading) -> None:
    """Check readings at a halt's begin and end, and at the begin of the next halt."""
    halted, between = end.seconds - begin.seconds, after.seconds - end.seconds
    for first, last, now in zip(begin.counters, end.counters, after.counters, strict=True):
        hertz = (last - first) / halted
        assert hertz > 1e6  # the host's view of the counters goes on
        assert 0 < now - first < hertz * (between + halted / 2)


@pytest.mark.parametrize("protection", [Protection.NONE, Protection.EMULATED])
def test_a_paused_guest_sees_no_time_pass(protection: Protection) -> None:
    with puppet(protection) as (machine, guest):
        guest.ping()
        machine.pause()
        begin = Reading.of(machine)
        time.sleep(2)
        end = Reading.of(machine)
        machine.resume()
        guest.ping()
        machine.pause()
        assert_time_stood(begin, end, Reading.of(machine))
        machine.resume()


@pytest.mark.parametrize("protection", [Protection.NONE, Protection.EMULATED])
def test_a_guest_that_gdb_halts_sees_no_time_pass(protection: Protection, tmp_path: Path) -> None:
    with debugged(protection, tmp_path, where=",nowait", cpus=2) as run:
        run.guest.ping()
        with run.client() as gdb:
            begin = Reading.of(run.machine)
            time.sleep(2)
            end = Reading.of(run.machine)
            gdb.send("vCont;c")
            run.guest.ping()
            gdb.interrupt()
            assert_time_stood(begin, end, Reading.of(run.machine))
            assert "time stands" in gdb.monitor("info")


def test_pyvmm_says_that_a_protected_guests_clock_goes_on() -> None:
    with puppet(Protection.PKVM) as (machine, guest):
        guest.ping()
        machine.pause()
        assert "protected guest" in (machine.clock.goes_on or "")
        machine.resume()
        guest.ping()
