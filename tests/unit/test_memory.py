# SPDX-License-Identifier: Apache-2.0
"""Memory without KVM: a VM that records calls, real files, real mappings, real guarded copies."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pyvmm._native import ffi
from pyvmm.errors import GuestMemoryError, KvmError, UsageError, hex_
from pyvmm.memory.address import MIB
from pyvmm.memory.backing import Memfd
from pyvmm.memory.ledger import PageState
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from tests.memory_helper import BASE, assert_counters_agree, build, build_empty


def test_data_reads_back_as_written_at_any_alignment() -> None:
    _, memory, _ = build()
    with memory:
        data = bytes(range(256)) * 40
        memory.write(BASE + 4093, data)
        assert memory.read(BASE + 4093, len(data)) == data
        assert memory.read(BASE + 4090, 3) == bytes(3)


def test_an_access_runs_across_adjacent_slots() -> None:
    vm, memory, _ = build()
    with memory:
        memory.add(BASE + MIB, Memfd(MIB))
        memory.write(BASE + MIB - 3, b"across")
        assert memory.read(BASE + MIB - 3, 6) == b"across"
        assert len(vm.live) == 2


def test_the_error_for_an_access_beyond_memory_has_the_address_and_the_progress() -> None:
    _, memory, _ = build()
    with memory, pytest.raises(GuestMemoryError, match="in no memory slot") as caught:
        memory.write(BASE + MIB - 2, b"four")
    assert (caught.value.gpa, caught.value.done) == (BASE + MIB, 2)
    _, memory, _ = build()
    with memory, pytest.raises(GuestMemoryError, match=r"read of 8 bytes at gpa 0x1000: .* after 0 bytes"):
        memory.read(0x1000, 8)


def test_a_huge_length_does_not_allocate_beyond_memory() -> None:
    _, memory, _ = build()
    with memory, pytest.raises(GuestMemoryError) as caught:
        memory.read(BASE, 1 << 62)
    assert caught.value.done == MIB


@pytest.mark.parametrize(("gpa", "size"), [(-1, 4), (BASE, -1), ((1 << 64) - 2, 4)])
def test_an_invalid_range_is_refused(gpa: int, size: int) -> None:
    _, memory, _ = build()
    with memory, pytest.raises(UsageError, match="not a valid range"):
        memory.read(gpa, size)


def test_fill_sets_every_byte_and_no_other() -> None:
    _, memory, _ = build()
    with memory:
        memory.fill(BASE + 1, 200_000, 0xA5)
        assert memory.read(BASE, 200_002) == b"\0" + b"\xa5" * 200_000 + b"\0"


def test_the_seal_closes_private_pages_of_the_emulated_protection_to_the_host() -> None:
    _, memory, slot = build(Protection.EMULATED)
    with memory:
        memory.write(BASE, b"image")
        memory.seal()
        for access in (lambda: memory.read(BASE, 4), lambda: memory.write(BASE, b"x"), lambda: memory.fill(BASE, 9)):
            with pytest.raises(GuestMemoryError, match="private to the guest"):
                access()
        assert not memory.probe(BASE)
        # KVM uses another mapping, which is open.
        assert slot.hva != slot.view
        assert ffi.string(ffi.cast("char *", slot.hva)) == b"image"


def test_an_access_stops_at_the_first_private_page() -> None:
    _, memory, slot = build(Protection.EMULATED)
    with memory:
        slot.backing.hide(2 * HOST_PAGE, HOST_PAGE)
        with pytest.raises(GuestMemoryError) as caught:
            memory.read(BASE, 4 * HOST_PAGE)
        assert (caught.value.gpa, caught.value.done) == (BASE + 2 * HOST_PAGE, 2 * HOST_PAGE)


@pytest.mark.parametrize(
    ("protection", "state", "assumed"),
    [
        (Protection.NONE, PageState.HOST, False),
        (Protection.PKVM, PageState.PRIVATE, True),
        (Protection.EMULATED, PageState.PRIVATE, False),
    ],
)
def test_the_seal_enters_the_states_that_the_protection_implies(
    protection: Protection, state: PageState, assumed: bool
) -> None:
    _, memory, _ = build(protection)
    with memory:
        assert memory.ledger.state(BASE) is PageState.HOST
        memory.seal()
        memory.seal()
        assert memory.ledger.state(BASE) is state
        assert memory.ledger.assumed(BASE) is assumed
        assert memory.ledger.counts()[state] == MIB // HOST_PAGE
        # A slot added later starts the same way.
        memory.add(BASE + MIB, Memfd(MIB))
        assert memory.ledger.state(BASE + MIB) is state
        assert memory.ledger.assumed(BASE + MIB) is assumed
        assert_counters_agree(memory)


def test_memory_of_a_plain_or_pkvm_guest_has_one_mapping() -> None:
    for protection in (Protection.NONE, Protection.PKVM):
        _, memory, slot = build(protection)
        with memory:
            assert slot.hva == slot.view


@pytest.mark.parametrize(
    ("gpa", "options", "words"),
    [
        (BASE + 8 * MIB + 1, {}, f"its gpa 0x80800001 is not a multiple of {HOST_PAGE:#x}"),
        (-HOST_PAGE, {}, "its gpa"),
        (BASE + 8 * MIB, {"size": 100}, "its size 0x64"),
        (BASE + 8 * MIB, {"size": -HOST_PAGE}, "its size"),
        (BASE + 8 * MIB, {"offset": 100, "size": HOST_PAGE}, "its offset 0x64"),
        (BASE + 8 * MIB, {"offset": MIB}, "do not fit the backing's 0x100000 bytes"),
        (BASE + 8 * MIB, {"offset": HOST_PAGE, "size": MIB}, "do not fit"),
        (
            BASE + HOST_PAGE,
            {},
            rf"{re.escape(hex_(BASE + MIB + HOST_PAGE))}\), overlaps the slot \[0x8000_0000, 0x8010_0000\) on memfd",
        ),
        (BASE - HOST_PAGE, {"size": 2 * HOST_PAGE}, "overlaps"),
        ((1 << 36) - HOST_PAGE, {}, "36 bits of guest physical address space"),
    ],
)
def test_a_slot_that_kvm_would_refuse_is_refused_first_with_a_clear_error(
    gpa: int, options: dict[str, int], words: str
) -> None:
    vm, memory, _ = build(ipa_bits=36)
    with memory:
        calls = len(vm.calls)
        with pytest.raises(UsageError, match=words):
            memory.add(gpa, Memfd(MIB), **options)
        assert len(vm.calls) == calls
        assert len(memory.slots) == 1
        assert_counters_agree(memory)


def test_a_part_of_a_backing_can_have_only_one_address() -> None:
    _, memory, slot = build()
    with memory, pytest.raises(UsageError, match=r"already belong to the slot"):
        memory.add(BASE + MIB, slot.backing, offset=MIB // 2)


def test_slots_may_lie_over_parts_of_one_backing() -> None:
    _, memory = build_empty()
    with memory:
        backing = Memfd(MIB)
        memory.add(BASE, backing, offset=MIB // 2)
        memory.add(BASE + MIB, backing, size=HOST_PAGE)
        memory.write(BASE + MIB, b"low")
        memory.write(BASE, b"high")
        assert os.pread(backing.fd, 3, 0) == b"low"
        assert os.pread(backing.fd, 4, MIB // 2) == b"high"


def test_more_slots_than_the_kernel_allows_are_refused() -> None:
    vm, memory = build_empty()
    vm.most = 8
    with memory:
        backing = Memfd(MIB)
        for index in range(8):
            memory.add(BASE + 2 * index * HOST_PAGE, backing, offset=index * HOST_PAGE, size=HOST_PAGE)
        with pytest.raises(UsageError, match=r"accepts 8 slots per VM \(KVM_CAP_NR_MEMSLOTS\)"):
            memory.add(BASE + 100 * HOST_PAGE, backing, offset=9 * HOST_PAGE, size=HOST_PAGE)


def test_the_address_of_kvms_mapping_is_given_for_a_contiguous_range() -> None:
    _, memory, slot = build(Protection.EMULATED)
    with memory:
        memory.seal()
        assert memory.hva(BASE + HOST_PAGE, 2 * HOST_PAGE) == slot.hva + HOST_PAGE != slot.view + HOST_PAGE
        memory.add(BASE + MIB, Memfd(2 * MIB), offset=MIB)
        assert memory.hva(BASE + MIB) == memory.slots[1].backing.hva + MIB
        with pytest.raises(UsageError, match="spans 2 memory slots of KVM"):
            memory.hva(BASE + MIB - HOST_PAGE, 2 * HOST_PAGE)
        for gpa, size in [(BASE + 1, HOST_PAGE), (BASE, 4 * MIB), (0, HOST_PAGE)]:
            with pytest.raises(UsageError, match="cannot find the address of"):
                memory.hva(gpa, size)


def test_a_removed_slot_is_gone_everywhere_and_its_number_is_reused() -> None:
    vm, memory, slot = build()
    with memory:
        backing = slot.backing
        memory.write(BASE, b"kept")
        memory.remove(slot)
        assert vm.live == {}
        assert not memory.contains(BASE)
        assert memory.ledger.state(BASE) is PageState.ABSENT
        assert sum(memory.ledger.counts().values()) == 0
        with pytest.raises(GuestMemoryError, match="in no memory slot"):
            memory.read(BASE, 1)
        memory.add(BASE + MIB, backing)
        assert memory.read(BASE + MIB, 4) == b"kept"
        assert list(vm.live) == [0]
        with pytest.raises(UsageError, match="or was removed"):
            memory.remove(slot)
        assert_counters_agree(memory)


def test_a_slot_that_kvm_refuses_to_add_leaves_no_trace() -> None:
    vm, memory, _ = build()
    with memory:
        vm.refuse = len(vm.calls)
        with pytest.raises(KvmError):
            memory.add(BASE + MIB, Memfd(MIB))
        assert memory.slots[0].gpa == BASE
        assert len(memory.slots) == memory.native.map.count == 1
        assert_counters_agree(memory)
        memory.add(BASE + MIB, Memfd(MIB))
        assert sorted(vm.live) == [0, 1]


def test_a_slot_that_kvm_refuses_to_remove_is_unchanged() -> None:
    vm, memory, slot = build()
    with memory:
        memory.seal()
        vm.refuse = len(vm.calls)
        with pytest.raises(KvmError):
            memory.remove(slot)
        assert memory.contains(BASE, MIB)
        assert memory.ledger.counts()[PageState.HOST] == MIB // HOST_PAGE


def test_a_protected_guest_that_has_run_keeps_its_slots() -> None:
    _, memory, slot = build(Protection.PKVM)
    with memory:
        memory.seal()
        with pytest.raises(UsageError, match="EPERM"):
            memory.remove(slot)
        memory.add(BASE + MIB, Memfd(MIB))


def test_slots_of_a_protected_guest_can_be_removed_before_it_runs() -> None:
    vm, memory, slot = build(Protection.PKVM)
    with memory:
        memory.remove(slot)
        assert vm.live == {}


def test_a_hole_reads_as_zeros_and_the_access_fills_it() -> None:
    _, memory, _ = build()
    with memory:
        memory.seal()
        memory.fill(BASE, 4 * HOST_PAGE, 7)
        memory.punch(BASE + HOST_PAGE, 2 * HOST_PAGE)
        assert memory.ledger.counts()[PageState.HOLE] == 2
        assert memory.read(BASE + HOST_PAGE - 1, 3) == b"\7\0\0"
        assert memory.ledger.state(BASE + HOST_PAGE) is PageState.HOST
        assert memory.ledger.state(BASE + 2 * HOST_PAGE) is PageState.HOLE
        memory.write(BASE + 2 * HOST_PAGE, b"x")
        assert memory.ledger.counts()[PageState.HOLE] == 0
        assert memory.read(BASE + 3 * HOST_PAGE, 1) == b"\7"
        assert_counters_agree(memory)


def test_a_punch_frees_the_pages() -> None:
    _, memory, slot = build()
    with memory:
        memory.fill(BASE, MIB, 1)
        before = os.fstat(slot.backing.fd).st_blocks
        memory.punch(BASE, MIB // 2)
        assert os.fstat(slot.backing.fd).st_blocks == before // 2


def test_a_hole_under_a_protected_guest_needs_an_explicit_request() -> None:
    _, memory, _ = build(Protection.PKVM)
    with memory:
        memory.punch(BASE, HOST_PAGE)
        memory.seal()
        with pytest.raises(UsageError, match="keeps its donated pages"):
            memory.punch(BASE, HOST_PAGE)
        assert memory.ledger.state(BASE) is PageState.PRIVATE
        memory.punch(BASE, HOST_PAGE, unsafe=True)
        assert memory.ledger.state(BASE) is PageState.HOLE


@pytest.mark.parametrize("act", ["punch", "populate"])
def test_punching_and_populating_need_whole_pages_of_guest_memory(act: str) -> None:
    _, memory, _ = build()
    with memory:
        for gpa, size in [(BASE + 1, HOST_PAGE), (BASE, 5), (BASE, 2 * MIB), (0, HOST_PAGE), (BASE, 0)]:
            with pytest.raises(UsageError, match="cannot"):
                getattr(memory, act)(gpa, size)


def test_populating_allocates_pages_and_keeps_contents() -> None:
    _, memory, slot = build()
    with memory:
        memory.write(BASE, b"kept")
        memory.populate(BASE, MIB)
        assert os.fstat(slot.backing.fd).st_blocks * 512 == MIB
        assert memory.read(BASE, 4) == b"kept"


def test_an_access_that_contradicts_the_ledger_is_evidence() -> None:
    _, memory, slot = build(Protection.PKVM)
    seen: list[tuple[int, bool]] = []
    memory.on_evidence = lambda gpa, accessible: seen.append((gpa, accessible))
    with memory:
        memory.read(BASE, 1)
        assert seen == []  # nothing is private before the first run
        memory.seal()
        memory.read(BASE + 10, HOST_PAGE)
        assert seen == [(BASE, True), (BASE + HOST_PAGE, True)]
        seen.clear()
        memory.ledger.set(BASE, PageState.SHARED)
        memory.read(BASE, 8)
        assert seen == []  # shared and open: as expected
        slot.backing.separate_view()
        slot.backing.hide(0, MIB)
        memory._table.withdraw(slot)
        memory._table.publish(slot)
        with pytest.raises(GuestMemoryError, match="shared by the guest according to the ledger, but not accessible"):
            memory.read(BASE, 8)
        assert seen == [(BASE, False)]
        seen.clear()
        with pytest.raises(GuestMemoryError, match=r"private to the guest \(assumed"):
            memory.write(BASE + HOST_PAGE, b"x")
        assert not memory.probe(BASE)
        assert seen == [(BASE, False)]


def test_pages_past_the_end_of_a_file_stop_an_access_without_killing_pyvmm() -> None:
    _, memory, slot = build()
    with memory:
        backing = slot.backing
        ordinary = os.memfd_create("short", os.MFD_CLOEXEC)
        os.ftruncate(ordinary, HOST_PAGE)
        backing._close_file(backing.fd)
        backing.fd = ordinary
        from pyvmm.memory import mman

        mman.map_over(backing.view, MIB, ordinary, 0, 3)
        with pytest.raises(GuestMemoryError, match="but not accessible") as caught:
            memory.read(BASE, 2 * HOST_PAGE)
        assert caught.value.done == HOST_PAGE


def test_unmapped_memory_stops_an_access_without_killing_pyvmm() -> None:
    from pyvmm.memory import mman

    _, memory, slot = build()
    with memory:
        mman.unmap(slot.view + HOST_PAGE, HOST_PAGE)
        with pytest.raises(GuestMemoryError) as caught:
            memory.fill(BASE, 3 * HOST_PAGE, 1)
        assert (caught.value.gpa, caught.value.done) == (BASE + HOST_PAGE, HOST_PAGE)


def test_the_error_in_a_fork_says_that_the_memory_is_not_its_own() -> None:
    _, memory, slot = build()
    with memory:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            said = b""
            try:
                memory.read(BASE, 1)
            except UsageError as error:
                said = error.message.encode()
            memory.close()
            with open("/proc/self/maps") as maps:
                said += b"!" if f"{slot.hva:x}-" in maps.read() else b"."
            os.write(write, said)
            os._exit(0)
        os.close(write)
        with open(read, "rb") as pipe:
            said = pipe.read()
        assert os.waitpid(child, 0)[1] == 0
        assert b"a fork does not inherit it" in said
        assert said.endswith(b".")
        memory.write(BASE, b"still ours")


def test_closed_memory_says_so_and_can_be_closed_again() -> None:
    vm, memory, slot = build()
    memory.close()
    memory.close()
    assert vm.live == {}
    assert slot.backing.closed
    with pytest.raises(UsageError, match="closed"):
        memory.read(BASE, 1)


def test_a_closed_vm_is_not_called_again() -> None:
    vm, memory, _ = build()
    vm.closed = True
    calls = len(vm.calls)
    memory.close()
    assert len(vm.calls) == calls


@contextmanager
def nothing_leaks() -> Iterator[None]:
    def usage() -> tuple[int, list[Any]]:
        with open("/proc/self/maps") as maps:
            # The allocator's mappings come and go. pyvmm's files and reservations must not.
            lines = [line for line in maps if "pyvmm-guest" in line or "---p" in line]
        return len(os.listdir("/proc/self/fd")), lines

    before = usage()
    yield
    assert usage() == before


def test_nothing_leaks_at_whatever_step_building_fails() -> None:
    _, warm, _ = build(Protection.EMULATED)
    warm.close()
    with nothing_leaks():
        for refused in range(3):
            for protection in Protection:
                vm, memory = build_empty(protection)
                vm.refuse = refused
                with memory:
                    try:
                        for index in range(3):
                            memory.add(BASE + index * 4 * MIB, Memfd(4 * MIB))
                    except KvmError:
                        pass
                    memory.seal()
        with pytest.raises(UsageError):
            Memfd(5)


def test_slots_can_come_and_go_while_other_threads_read() -> None:
    _, memory, _ = build()
    stop = threading.Event()
    wrong: list[object] = []

    def reader() -> None:
        while not stop.is_set():
            try:
                if memory.read(BASE + MIB - 4, 4) != bytes(4):
                    wrong.append("bytes")
                memory.read(BASE + MIB, 4)
            except GuestMemoryError as error:
                if error.gpa != BASE + MIB:
                    wrong.append(error)

    with memory:
        threads = [threading.Thread(target=reader) for _ in range(2)]
        for thread in threads:
            thread.start()
        backing = Memfd(MIB)
        for _ in range(300):
            memory.remove(memory.add(BASE + MIB, backing))
        stop.set()
        for thread in threads:
            thread.join()
        assert wrong == []
