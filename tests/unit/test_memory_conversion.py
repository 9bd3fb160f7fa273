# SPDX-License-Identifier: Apache-2.0
"""The copy policy: a page moves to another file, slots change around it, and no stale copy remains."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm._native import lib
from pyvmm.errors import GuestMemoryError, KvmError, UsageError
from pyvmm.machine.vm import NATIVE_POLICIES
from pyvmm.memory.address import MIB, Gpa
from pyvmm.memory.backing import Backing, Memfd
from pyvmm.memory.choices import ConversionPolicy
from pyvmm.memory.ledger import PageState
from pyvmm.memory.memory import Memory
from pyvmm.memory.slots import Piece, Slot, carve
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from tests.memory_helper import BASE, NotedVm, assert_counters_agree, build

PAGES = 16
SIZE = PAGES * HOST_PAGE


def emulated(most: int = 64) -> tuple[NotedVm, Memory, Slot]:
    vm, memory, slot = build(Protection.EMULATED, SIZE)
    memory._table._most = most
    for page in range(PAGES):
        memory.fill(BASE + page * HOST_PAGE, HOST_PAGE, page + 1)
    memory.seal()
    return vm, memory, slot


def page(number: int) -> int:
    return BASE + number * HOST_PAGE


def convert(memory: Memory, number: int, shared: bool) -> int:
    """Do what a guest's hypercall does: convert a page, and on success enter its state."""
    status = memory.convert(page(number), shared)
    if status == 0:
        memory.ledger.set(page(number), PageState.SHARED if shared else PageState.PRIVATE)
    return status


def test_each_policy_has_the_same_number_as_in_the_native_loop() -> None:
    assert [NATIVE_POLICIES[policy] for policy in ConversionPolicy] == [
        lib.PV_CONVERT_PRESERVE,
        lib.PV_CONVERT_ZERO,
        lib.PV_CONVERT_PUNCH,
        lib.PV_CONVERT_COLD,
    ]
    assert ConversionPolicy("copy") is ConversionPolicy.COPY


def test_a_shared_page_moves_with_its_contents_and_the_host_can_use_it() -> None:
    vm, memory, slot = emulated()
    with memory:
        assert convert(memory, 5, True) == 0
        assert vm.layout() == [(BASE, 5 * HOST_PAGE), (page(5), HOST_PAGE), (page(6), 10 * HOST_PAGE)]
        assert memory.read(page(5), HOST_PAGE) == bytes([6]) * HOST_PAGE
        memory.write(page(5), b"host was here")
        assert not memory.probe(page(4))
        assert not memory.probe(page(6))
        assert memory.slots == (slot,)
        assert_counters_agree(memory)


def test_an_unshared_page_keeps_what_the_host_wrote_and_the_slots_merge_again() -> None:
    vm, memory, slot = emulated()
    with memory:
        convert(memory, 5, True)
        memory.write(page(5), b"host was here")
        assert convert(memory, 5, False) == 0
        assert vm.layout() == [(BASE, SIZE)]
        assert os.pread(slot.backing.fd, 13, 5 * HOST_PAGE) == b"host was here"
        with pytest.raises(GuestMemoryError, match="private to the guest"):
            memory.read(page(5), 1)


def test_no_stale_copy_remains_on_the_side_that_a_page_left() -> None:
    _, memory, slot = emulated()
    with memory:
        convert(memory, 5, True)
        assert os.pread(slot.backing.fd, HOST_PAGE, 5 * HOST_PAGE) == bytes(HOST_PAGE)
        [shared] = [piece.backing for piece in slot.pieces if piece.backing is not slot.backing]
        convert(memory, 5, False)
        assert os.pread(shared.fd, HOST_PAGE, 5 * HOST_PAGE) == bytes(HOST_PAGE)
        assert os.fstat(shared.fd).st_blocks == 0


def test_adjacent_shared_pages_need_one_slot() -> None:
    vm, memory, _ = emulated()
    with memory:
        for number in (3, 5, 4):
            assert convert(memory, number, True) == 0
        assert vm.layout() == [(BASE, 3 * HOST_PAGE), (page(3), 3 * HOST_PAGE), (page(6), 10 * HOST_PAGE)]
        for number in range(PAGES):
            convert(memory, number, True)
        assert vm.layout() == [(BASE, SIZE)]
        assert memory.read(BASE, SIZE) == b"".join(bytes([n + 1]) * HOST_PAGE for n in range(PAGES))


@pytest.mark.parametrize("gpa", [BASE + 1, BASE - HOST_PAGE, BASE + SIZE, 0, 1 << 60])
def test_an_invalid_page_gets_the_same_smccc_error_as_from_el2(gpa: int) -> None:
    _, memory, _ = emulated()
    with memory:
        assert memory.convert(gpa, True) == memory.convert(gpa, False) == -3


def test_sharing_twice_and_unsharing_a_private_page_are_refused() -> None:
    vm, memory, _ = emulated()
    with memory:
        assert convert(memory, 1, False) == -3
        assert convert(memory, 1, True) == 0
        calls = len(vm.calls)
        assert convert(memory, 1, True) == -3
        assert len(vm.calls) == calls


def test_a_guest_that_uses_up_the_slots_is_refused_and_the_rest_goes_on() -> None:
    _, memory, _ = emulated(most=5)
    with memory:
        assert [convert(memory, number, True) for number in (1, 3, 5)] == [0, 0, -1]
        assert convert(memory, 2, True) == 0
        assert convert(memory, 5, True) == 0
        assert not memory.probe(page(7))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("call", range(4))
def test_a_conversion_that_kvm_refuses_is_undone(call: int, shared: bool) -> None:
    vm, memory, slot = emulated()
    with memory:
        if not shared:
            convert(memory, 5, True)
        layout, pieces, accessible = vm.layout(), slot.pieces, memory.probe(page(5))
        vm.refuse = len(vm.calls) + call
        with pytest.raises(KvmError):
            memory.convert(page(5), shared)
        assert (vm.layout(), slot.pieces, memory.probe(page(5))) == (layout, pieces, accessible)
        vm.refuse = None
        assert convert(memory, 5, shared) == 0
        assert memory.probe(page(5)) is shared


def test_other_vcpus_stay_outside_the_guest_while_slots_move() -> None:
    vm, memory, _ = emulated()
    held: list[str] = []

    class Quiet:
        def __enter__(self) -> None:
            held.append(f"after {len(vm.calls)}")

        def __exit__(self, *_: object) -> None:
            held.append(f"after {len(vm.calls)}")

    memory.quiesce = Quiet
    with memory:
        convert(memory, 5, True)
        assert held == ["after 1", "after 5"]


def test_only_the_emulated_protection_moves_pages() -> None:
    for protection in (Protection.NONE, Protection.PKVM):
        _, memory, _ = build(protection)
        with memory, pytest.raises(UsageError, match="only the emulated"):
            memory.convert(BASE, True)


def test_a_slot_with_moved_pages_is_removed_whole_and_its_backing_can_be_reused() -> None:
    vm, memory, slot = emulated()
    with memory:
        backing = slot.backing
        convert(memory, 5, True)
        convert(memory, 9, True)
        memory.remove(slot)
        assert vm.live == {}
        memory.add(BASE, backing)
        assert vm.layout() == [(BASE, SIZE)]
        assert not memory.probe(page(5))
        assert convert(memory, 4, True) == 0
        assert memory.read(page(4), 1) == b"\5"


def test_a_hole_punched_in_moved_pages_reaches_the_file_they_are_in() -> None:
    _, memory, _ = emulated()
    with memory:
        convert(memory, 5, True)
        memory.punch(page(4), 3 * HOST_PAGE)
        assert memory.read(page(5), HOST_PAGE) == bytes(HOST_PAGE)
        assert memory.ledger.state(page(5)) is PageState.SHARED
        assert memory.ledger.state(page(4)) is PageState.HOLE


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, PAGES - 1), st.booleans()), max_size=24))
def test_any_sequence_of_conversions_keeps_every_page_and_its_side(orders: list[tuple[int, bool]]) -> None:
    vm, memory, slot = emulated()
    with memory:
        shared: set[int] = set()
        for number, to_shared in orders:
            status = convert(memory, number, to_shared)
            assert status == (-3 if (number in shared) == to_shared else 0)
            (shared.add if to_shared else shared.discard)(number)
        for number in range(PAGES):
            assert memory.probe(page(number)) == (number in shared)
            [(_, piece)] = memory._table.pieces(page(number), HOST_PAGE)
            assert os.pread(piece.backing.fd, HOST_PAGE, piece.offset) == bytes([number + 1]) * HOST_PAGE
        assert vm.layout() == [(piece.gpa, piece.size) for piece in slot.pieces]
        for before, after in pairwise(slot.pieces):
            assert before.end == after.gpa
            assert before.backing is not after.backing


@given(st.data())
def test_splitting_covers_the_same_range_without_gap_overlap_or_needless_seam(data: st.DataObject) -> None:
    files = [cast(Backing, name) for name in ("private", "shared")]
    pieces = [Piece(Gpa(BASE), SIZE, files[0], 0)]
    for _ in range(data.draw(st.integers(1, 8))):
        start = data.draw(st.integers(0, PAGES - 1))
        count = data.draw(st.integers(1, PAGES - start))
        which = data.draw(st.sampled_from(files))
        offset = start * HOST_PAGE
        pieces = carve(pieces, Piece(Gpa(BASE + offset), count * HOST_PAGE, which, offset))
        assert pieces[0].gpa == BASE
        assert pieces[-1].end == BASE + SIZE
        for before, after in pairwise(pieces):
            assert before.end == after.gpa
            assert not after.continues(before)
        inside = [piece for piece in pieces if piece.overlap(BASE + offset, 1)]
        assert inside[0].backing is which


def test_moved_pages_leak_nothing() -> None:
    def usage() -> tuple[int, list[Any]]:
        with open("/proc/self/maps") as maps:
            lines = [line for line in maps if "pyvmm-guest" in line or "---p" in line]
        return len(os.listdir("/proc/self/fd")), lines

    before = usage()
    _, memory, _ = emulated()
    with memory:
        memory.add(BASE + MIB, Memfd(MIB))
        for number in range(0, PAGES, 2):
            convert(memory, number, True)
    assert usage() == before
