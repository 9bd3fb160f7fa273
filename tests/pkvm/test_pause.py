# SPDX-License-Identifier: Apache-2.0
"""A paused guest sees no time pass, if the kernel lets pyvmm set its counters back."""

from __future__ import annotations

import time

import pytest

from pyvmm.machine.clock import COUNTERS
from pyvmm.machine.machine import Machine
from pyvmm.protection import Protection
from tests.pkvm.harness import puppet

pytestmark = pytest.mark.pkvm


def counters(machine: Machine) -> list[int]:
    """Read each counter while no vCPU runs."""
    return [machine.vcpus[0].get_reg(counter) for counter in COUNTERS]


@pytest.mark.parametrize("protection", [Protection.NONE, Protection.EMULATED])
def test_a_paused_guest_sees_no_time_pass(protection: Protection) -> None:
    with puppet(protection) as (machine, guest):
        guest.ping()
        machine.pause()
        began, before = time.monotonic(), counters(machine)
        time.sleep(2)
        passed, end = time.monotonic() - began, counters(machine)
        machine.resume()
        guest.ping()
        machine.pause()
        after = counters(machine)
        machine.resume()
        for first, last, now in zip(before, end, after, strict=True):
            hertz = (last - first) / passed
            assert hertz > 1e6  # the host's view of the counters goes on
            assert 0 < now - first < hertz * passed / 2


def test_pyvmm_says_that_a_protected_guests_clock_goes_on() -> None:
    with puppet(Protection.PKVM) as (machine, guest):
        guest.ping()
        machine.pause()
        assert "protected guest" in (machine.clock.goes_on or "")
        machine.resume()
        guest.ping()
