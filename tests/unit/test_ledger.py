# SPDX-License-Identifier: Apache-2.0
"""The ledger records the state of every page, in bytes that C writes too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from pyvmm._native import ffi, lib
from pyvmm.errors import UsageError
from pyvmm.kvm.vm import Vm
from pyvmm.memory.address import MIB
from pyvmm.memory.backing import Memfd
from pyvmm.memory.ledger import ASSUMED, PageState, describe
from pyvmm.memory.memory import Memory
from pyvmm.protection import Protection
from tests.memory_helper import BASE, NotedVm, assert_counters_agree

PAGE = 4096


@pytest.fixture
def memory() -> Iterator[Memory]:
    native = ffi.new("struct pv_vm *")
    with Memory(cast(Vm, NotedVm()), Protection.PKVM, native) as memory:
        memory.add(BASE, Memfd(MIB))
        yield memory


def test_the_states_are_those_of_the_native_loop() -> None:
    assert {state.name: state.value for state in PageState} == {
        name.removeprefix("PV_PAGE_"): getattr(lib, name)
        for name in dir(lib)
        if name.startswith("PV_PAGE_") and name not in ("PV_PAGE_STATES", "PV_PAGE_ASSUMED")
    }
    assert lib.PV_PAGE_ASSUMED == ASSUMED
    assert len(PageState) == lib.PV_PAGE_STATES


def test_python_and_c_see_each_others_entries(memory: Memory) -> None:
    assert memory.ledger.set(BASE + PAGE, PageState.SHARED) is PageState.HOST
    assert memory.native.map.regions[0].ledger[1] == lib.PV_PAGE_SHARED
    assert lib.pv_ledger_set(memory.native, BASE + 2 * PAGE, lib.PV_PAGE_POISONED) == lib.PV_PAGE_HOST
    assert memory.ledger.state(BASE + 2 * PAGE + 17) is PageState.POISONED
    assert_counters_agree(memory)


def test_the_ledger_distinguishes_assumed_from_known_states(memory: Memory) -> None:
    memory.ledger.set(BASE, PageState.PRIVATE, assumed=True)
    assert memory.ledger.assumed(BASE)
    assert memory.ledger.state(BASE) is PageState.PRIVATE
    assert memory.ledger.describe(BASE) == "private to the guest (assumed: the kernel does not tell)"
    memory.ledger.set(BASE, PageState.PRIVATE)
    assert not memory.ledger.assumed(BASE)
    assert memory.ledger.describe(BASE) == "private to the guest"


def test_every_entry_has_a_description() -> None:
    words = {describe(state | mark) for state in PageState for mark in (0, ASSUMED)}
    assert len(words) == 2 * len(PageState)


def test_a_page_outside_every_slot_is_absent_and_cannot_be_entered(memory: Memory) -> None:
    for gpa in (0, BASE - 1, BASE + MIB, (1 << 64) - 1):
        assert memory.ledger.state(gpa) is PageState.ABSENT
        with pytest.raises(UsageError, match="in no memory slot"):
            memory.ledger.set(gpa, PageState.SHARED)


def test_counts_and_snapshot_cover_every_slot(memory: Memory) -> None:
    memory.add(BASE + 4 * MIB, Memfd(2 * PAGE))
    memory.ledger.set(BASE + 4 * MIB + PAGE, PageState.SHARED, assumed=True)
    assert [(gpa, len(entries)) for gpa, entries in memory.ledger.snapshot()] == [(BASE, 256), (BASE + 4 * MIB, 2)]
    assert memory.ledger.snapshot()[1][1] == bytes([PageState.HOST, PageState.SHARED | ASSUMED])
    counts = memory.ledger.counts()
    assert (counts[PageState.HOST], counts[PageState.SHARED]) == (257, 1)
    assert_counters_agree(memory)


def test_a_snapshot_is_a_copy(memory: Memory) -> None:
    [(_, entries)] = memory.ledger.snapshot()
    memory.ledger.set(BASE, PageState.HOLE)
    assert entries[0] == PageState.HOST
