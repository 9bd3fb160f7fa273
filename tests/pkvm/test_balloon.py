# SPDX-License-Identifier: Apache-2.0
"""Linux gives memory to a balloon, takes it back, and reports free pages. Each time the host gets the pages."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.devices.kinds.balloon import Balloon
from pyvmm.devices.roles import MemoryBalloon
from pyvmm.machine.machine import Machine
from pyvmm.memory.address import MIB
from pyvmm.memory.ledger import PageState
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.linux_guest import DEADLINE, Linux, initrd

pytestmark = pytest.mark.pkvm

FILE = 32 * MIB
FREE = "awk '/MemFree/ {print $2}' /proc/meminfo"
"""What prints how much the guest has free, in KiB."""


def resident(machine: Machine) -> int:
    """Return how many bytes of guest memory the host has pages for."""
    fds = {slot.backing.fd for slot in machine.memory.slots}
    return sum(os.fstat(fd).st_blocks * 512 for fd in fds)


def holes(machine: Machine) -> int:
    """Return how many bytes of guest memory the ledger counts as given back."""
    return machine.memory.ledger.counts()[PageState.HOLE] * 4096


def free(guest: Linux) -> int:
    """Return how many bytes are free in the guest."""
    return int(guest.sh(FREE)) << 10


def until(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.1)


def test_memory_goes_to_the_host_and_comes_back(tmp_path: Path) -> None:
    # Linux reports up to 32 blocks of 4 MiB at once and cannot use them until the host has taken all. It keeps only
    # 64 MiB for itself (mm/page_reporting.c). With less memory than this and a slow host, it runs out and kills.
    with Linux(Protection.NONE, initrd(tmp_path / "initrd"), Balloon(), memory=320 * MIB) as guest:
        machine = guest.machine
        [balloon] = machine.role(MemoryBalloon)
        guest.sh(f"mount -t tmpfs -o size=80% tmpfs /tmp && dd if=/dev/zero of=/tmp/a bs=1M count={FILE // MIB}")
        full = resident(machine)
        assert full > FILE

        # Deleted files free their memory. Linux reports the large blocks of it within seconds.
        guest.sh("rm /tmp/a")
        until(lambda: resident(machine) < full - FILE // 4, lambda: (full, resident(machine), balloon.hold()))
        until(lambda: holes(machine) > FILE // 2, lambda: holes(machine))

        asked = 64 * MIB
        before = balloon.hold(asked)
        until(lambda: balloon.hold()["actual"] == asked, balloon.hold)
        assert balloon.hold()["given_back"] >= before["given_back"] + asked
        less = free(guest)

        balloon.hold(0)
        until(lambda: balloon.hold()["actual"] == 0, balloon.hold)
        # While Linux reports free pages, it briefly counts them neither as free nor as used.
        enough = less + asked * 3 // 4 >> 10
        guest.sh(f"until [ $({FREE}) -gt {enough} ]; do sleep 0.2; done")
        # The returned memory works: the guest reads what it wrote.
        empty = resident(machine)
        guest.sh("dd if=/dev/urandom of=/tmp/b bs=1M count=8 && cp /tmp/b /tmp/c && cmp /tmp/b /tmp/c")
        assert resident(machine) > empty + 8 * MIB
        outcome = guest.poweroff()
    assert outcome.ending is Ending.POWEROFF
