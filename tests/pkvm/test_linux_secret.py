# SPDX-License-Identifier: Apache-2.0
"""What the host sees in all of a protected Linux's memory: pages that Linux shares, and pages it never touched."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from pyvmm._native import ffi, lib
from pyvmm.machine import layout
from pyvmm.machine.machine import Machine
from pyvmm.machine.swiotlb import MOST_SHARE
from pyvmm.memory.address import MIB
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from tests.pkvm.linux_guest import Linux, initrd

pytestmark = pytest.mark.pkvm

MEMORY = 64 * MIB
POOL = MEMORY // MOST_SHARE
SEED = "told to the guest, and to the host"
SECRET = hashlib.sha256(SEED.encode()).hexdigest()
"""What the guest computes of it: nothing that goes in or out has it."""
LINES = 5000
"""So often it is written: 80 pages of it."""
NO_LPIS = "irqchip.gicv3_nolpi=1"
"""Linux shares the tables of its ITS and of its LPIs too; without them the pool is all there is."""
TABLE = 64 << 10
"""Bytes, and their alignment, of each of those tables."""


class Seen:
    """What the host can read of a machine's memory, by guarded access: pages by their gpa."""

    def __init__(self, machine: Machine) -> None:
        size = machine.config.memory
        data = bytearray(size)
        self._view = memoryview(data)
        self.pages: list[int] = []
        into = ffi.from_buffer("uint8_t[]", data)
        at = 0
        while at < size:
            # Like Memory.read, but without an exception for each of thousands of private pages.
            done = lib.pv_read(machine.memory.native, layout.RAM_BASE + at, into + at, size - at, ffi.NULL)
            assert done % HOST_PAGE == 0
            self.pages += range(layout.RAM_BASE + at, layout.RAM_BASE + at + done, HOST_PAGE)
            at += done + HOST_PAGE

    def __getitem__(self, gpa: int) -> memoryview:
        at = gpa - layout.RAM_BASE
        return self._view[at : at + HOST_PAGE]

    def holding(self, text: str) -> set[int]:
        """Return the pages that hold ``text``."""
        return {gpa for gpa in self.pages if text.encode() in bytes(self[gpa])}


def unlike_loaded(seen: Seen, machine: Machine, shared: set[int]) -> set[int]:
    """Return the pages outside ``shared`` that changed since before the guest ran. Most pages were zeros then."""
    with Machine(machine.config) as unstarted:
        tree = next(part for part in unstarted.entry.plan if part.what == "the device tree")
        loaded = Seen(unstarted)
        # Each machine has other seeds for random numbers.
        beside = [gpa for gpa in seen.pages if gpa not in shared and not tree.gpa <= gpa < tree.end]
        return {gpa for gpa in beside if seen[gpa] != loaded[gpa]}


@pytest.mark.parametrize("lpis", [True, False], ids=["lpis", "no-lpis"])
def test_the_host_finds_a_guests_secret_only_in_pages_that_the_guest_shares(lpis: bool, tmp_path: Path) -> None:
    params = () if lpis else (NO_LPIS,)
    with Linux(Protection.PKVM, initrd(tmp_path / "initrd"), memory=MEMORY, params=params) as guest:
        said = guest.sh("dmesg | grep -e 'restricted DMA pool at' -e '@.*alloc' -e 'LPI .* table'")
        start = int(said.split("DMA pool at ")[1].split(",")[0], 16)
        tables = {int(gpa, 16) for gpa in re.findall(r"(?:table)? @(?:0x)?([0-9a-f]+)", said)}
        guest.sh(f"s=$(printf %s '{SEED}' | sha256sum | head -c 64); yes $s | head -n {LINES} >/tmp/secret")
        assert int(guest.sh("grep -c $s /tmp/secret")) == LINES
        seen = Seen(guest.machine)
        pool = {gpa for gpa in seen.pages if start <= gpa < start + POOL}
        assert len(pool) == POOL // HOST_PAGE
        assert not seen.holding(SECRET)
        # Outside the pool the host sees pages the guest never touched, and those tables.
        beside = {gpa // TABLE * TABLE for gpa in unlike_loaded(seen, guest.machine, pool)}
        if lpis:
            assert len(tables) == 4, said
            assert beside & tables
            assert len(beside - tables) <= 1, f"more than the queue of commands, which Linux says nothing of: {said}"
        else:
            assert not tables
            assert not beside
        # The search works: the console's data pass through the pool and are found.
        assert guest.sh("head -n 1 /tmp/secret").strip() == SECRET
        assert Seen(guest.machine).holding(SECRET) & pool
        guest.poweroff()
