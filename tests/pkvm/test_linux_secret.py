"""What the host sees of a protected Linux's memory, all of it: the pool it shares, and what the guest never touched."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pyvmm.errors import GuestMemoryError
from pyvmm.machine import layout
from pyvmm.machine.machine import Machine
from pyvmm.memory.address import PAGE_SIZE, Gpa
from pyvmm.protection import Protection
from tests.pkvm.linux_guest import Linux, initrd

pytestmark = pytest.mark.pkvm

SEED = "told to the guest, and to the host"
SECRET = hashlib.sha256(SEED.encode()).hexdigest()
"""What the guest computes of it: nothing that goes in or out has it."""
NO_ITS = "irqchip.gicv3_nolpi=1"
"""Linux shares its ITS's tables too, and says of some only where they are; without it the pool is all there is."""


def readable(machine: Machine) -> dict[int, bytes]:
    """Return the contents of every page that the host can read, by gpa."""
    found = {}
    for gpa in range(layout.RAM_BASE, layout.RAM_BASE + machine.config.memory, PAGE_SIZE):
        try:
            found[gpa] = machine.memory.read(Gpa(gpa), PAGE_SIZE)
        except GuestMemoryError:
            continue
    return found


def holding(pages: dict[int, bytes]) -> set[int]:
    return {gpa for gpa, page in pages.items() if SECRET.encode() in page}


def test_the_host_finds_a_secret_of_the_guest_only_where_the_guest_shares_it(tmp_path: Path) -> None:
    with Linux(Protection.PKVM, initrd(tmp_path / "initrd"), params=(NO_ITS,)) as guest:
        pool = guest.sh("dmesg | grep -m1 'restricted DMA pool at'")
        start, size = int(pool.split(" at ")[1].split(",")[0], 16), 16 * layout.MIB
        guest.sh(f"s=$(printf %s '{SEED}' | sha256sum | head -c 64); yes $s | head -n 10000 >/tmp/secret")
        assert int(guest.sh("grep -c $s /tmp/secret")) == 10000
        seen = readable(guest.machine)
        shared = {gpa for gpa in seen if start <= gpa < start + size}
        assert len(shared) == size // PAGE_SIZE
        assert not holding(seen)
        # Beside the pool, only what the guest never touched: it is as it was loaded, most of it nothing.
        with Machine(guest.machine.config) as unstarted:
            tree = next(part for part in unstarted.entry.plan if part.what == "the device tree")
            for gpa, page in seen.items():
                if gpa not in shared and not tree.gpa <= gpa < tree.end:
                    assert page == unstarted.memory.read(Gpa(gpa), PAGE_SIZE), hex(gpa)
        # That a secret would be found: the console's data go through the pool.
        assert guest.sh("head -n 1 /tmp/secret").strip() == SECRET
        assert holding(readable(guest.machine)) & shared
        guest.poweroff()
