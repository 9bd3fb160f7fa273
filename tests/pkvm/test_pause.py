# SPDX-License-Identifier: Apache-2.0
"""A guest that is paused or halted by gdb sees no time pass, if the kernel lets pyvmm set its counters back.

That is why Linux reports no soft lockup afterwards.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyvmm.machine.clock import COUNTERS
from pyvmm.machine.machine import Machine
from pyvmm.protection import Protection
from tests.pkvm.harness import DEADLINE, config, puppet
from tests.pkvm.required import kernel_directory
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
        # A halt puts the counters back to its begin, and ``first`` was read after that: it may be above ``now``.
        assert abs(now - first) < hertz * (between + halted / 2)


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


WATCHDOG = 5
"""Seconds; Linux reports a CPU that does nothing else for twice as long."""
BUSY = (
    f"echo {WATCHDOG} >/proc/sys/kernel/watchdog_thresh; while :; do echo tick; for i in $(seq 9999); do :; done; done"
)
LOCKUP = b"BUG: soft lockup"


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for a condition on a Linux guest. Raises AssertionError if it never becomes true."""
    deadline = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_busy_linux_reports_no_soft_lockup_after_a_pause_unless_its_time_goes_on() -> None:
    files, out = kernel_directory("debian:"), os.memfd_create("console")
    params = ("console=ttyAMA0", "quiet", "audit=0", "lsm=", "mitigations=off", "panic=-1", "--", BUSY)
    more = {"memory": 256 << 20, "initrd": str(files / "shell.cpio"), "serial_out": out, "deadline": 600.0}
    try:
        with Machine(config(str(files / "Image"), Protection.NONE, params=params, **more)) as machine:
            machine.start()

            def said() -> bytes:
                return os.pread(out, 1 << 20, 0)

            def pause_and_run_on() -> None:
                before = said().count(b"tick")
                machine.pause()
                time.sleep(3 * WATCHDOG)
                machine.resume()
                # The detector's timer runs every 2 seconds at most.
                end = time.monotonic() + WATCHDOG
                wait_until(lambda: time.monotonic() > end and said().count(b"tick") > before + 1)

            wait_until(lambda: b"tick" in said())
            pause_and_run_on()
            assert LOCKUP not in said(), said()
            machine.clock.goes_on = "the test wants it so"
            pause_and_run_on()
            wait_until(lambda: LOCKUP in said())
            machine.stop("the test is over")
            machine.wait(DEADLINE)
    finally:
        os.close(out)


def test_pyvmm_says_that_a_protected_guests_clock_goes_on() -> None:
    with puppet(Protection.PKVM) as (machine, guest):
        guest.ping()
        machine.pause()
        assert "protected guest" in (machine.clock.goes_on or "")
        machine.resume()
        guest.ping()
