# SPDX-License-Identifier: Apache-2.0
"""Memory on demand without KVM: how it handles unclaimed accesses."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pyvmm._native import ffi, lib
from pyvmm.errors import GuestMemoryError, HostError, KvmError, PyvmmError, UsageError
from pyvmm.memory import on_demand
from pyvmm.memory.address import MIB
from pyvmm.memory.memory import Memory
from pyvmm.memory.on_demand import OnDemand
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from tests.memory_helper import BASE, NotedVm, build

START = 0x2000_0000
GRANULE = 2 * HOST_PAGE
EXIT_MMIO = 6


class Access:
    """A vCPU stopped at an access."""

    def __init__(self, gpa: int) -> None:
        self.run = ffi.new("uint32_t[]", 1024)
        self.run[2] = EXIT_MMIO
        self.native = ffi.new("struct pv_vcpu *", {"gpa": gpa, "size": 8, "run": self.run})

    @property
    def made_again(self) -> bool:
        return bool(self.run[2] == 0)


def contents(gpa: int, size: int) -> bytes:
    assert size % HOST_PAGE == 0
    return b"".join(page.to_bytes(8, "little") * (HOST_PAGE // 8) for page in range(gpa, gpa + size, HOST_PAGE))


def attached(
    protection: Protection = Protection.NONE,
    ranges: Sequence[tuple[int, int]] = ((START, 8 * GRANULE),),
    **options: Any,
) -> tuple[NotedVm, Memory, OnDemand]:
    vm, memory, _ = build(protection, most=64)
    lazy = OnDemand(ranges, **{"granule": GRANULE, "fill": contents, **options})
    lazy.attach(memory)
    memory.seal()
    return vm, memory, lazy


def test_an_access_adds_its_granule_and_is_repeated() -> None:
    vm, memory, lazy = attached()
    with memory:
        access = Access(START + 3 * GRANULE + HOST_PAGE + HOST_PAGE - 4)
        assert lazy(access.native)
        assert access.made_again
        assert vm.layout() == [(START + 3 * GRANULE, GRANULE), (BASE, MIB)]
        assert memory.read(START + 3 * GRANULE, GRANULE) == contents(START + 3 * GRANULE, GRANULE)
        assert (lazy.slots, lazy.late, lazy.refused) == (1, 0, 0)


def test_an_access_outside_the_ranges_is_not_handled() -> None:
    vm, memory, lazy = attached()
    with memory:
        for gpa in (0, START - 1, START + 8 * GRANULE, (1 << 64) - 1):
            access = Access(gpa)
            assert not lazy(access.native)
            assert not access.made_again
        assert len(vm.live) == 1


def test_an_access_to_memory_that_exists_meanwhile_is_only_repeated() -> None:
    _, memory, lazy = attached()
    with memory:
        lazy(Access(START).native)
        memory.write(START, b"changed")
        access = Access(START + 8)
        assert lazy(access.native)
        assert access.made_again
        assert memory.read(START, 7) == b"changed"
        assert (lazy.slots, lazy.late) == (1, 1)


def test_the_last_granule_ends_with_its_range() -> None:
    vm, memory, lazy = attached(ranges=[(START + 16 * MIB, HOST_PAGE), (START, GRANULE + HOST_PAGE)])
    with memory:
        lazy(Access(START + GRANULE + 1).native)
        lazy(Access(START + 16 * MIB).native)
        assert vm.layout()[:2] == [(START + GRANULE, HOST_PAGE), (START + 16 * MIB, HOST_PAGE)]


def test_memory_that_is_not_filled_is_zeros() -> None:
    for fill in (None, lambda _gpa, _size: None, lambda _gpa, _size: b"", lambda _gpa, _size: b"some"):
        _, memory, lazy = attached(fill=fill)
        with memory:
            lazy(Access(START).native)
            assert memory.read(START, GRANULE).lstrip(b"some") == bytes(GRANULE - (4 if fill and fill(0, 0) else 0))


@pytest.mark.parametrize("protection", list(Protection), ids=lambda p: p.value)
def test_contents_are_written_before_the_guest_gets_them_and_never_again(protection: Protection) -> None:
    _, memory, lazy = attached(protection)
    with memory:
        lazy(Access(START).native)
        slot = memory.slots[0]
        assert bytes(ffi.buffer(ffi.cast("uint8_t *", slot.hva), 8)) == START.to_bytes(8, "little")
        assert memory.ledger.entry(START) == memory.ledger.entry(BASE)
        if protection is Protection.EMULATED:
            with pytest.raises(GuestMemoryError, match="private to the guest"):
                memory.read(START, 8)


def test_a_guest_gets_no_more_slots_than_its_limit() -> None:
    vm, memory, lazy = attached(limit=3)
    with memory:
        assert [lazy(Access(START + index * GRANULE).native) for index in range(8)] == [True] * 3 + [False] * 5
        assert lazy(Access(START).native)
        assert (lazy.slots, lazy.late, lazy.refused) == (3, 1, 5)
        assert len(vm.live) == 4


def test_the_kernel_gets_no_request_if_it_has_no_slot_left() -> None:
    _, memory, lazy = attached()
    with memory:
        memory._table._most = 2
        assert lazy(Access(START).native)
        assert memory.free_slots == 0
        assert not lazy(Access(START + GRANULE).native)
        assert lazy.refused == 1


def test_a_removed_slot_comes_back_with_its_contents() -> None:
    _, memory, lazy = attached()
    with memory:
        lazy(Access(START).native)
        memory.write(START, b"changed")
        memory.remove(memory.slots[0])
        assert lazy(Access(START).native)
        assert memory.read(START, 7) == b"changed"


def test_vcpus_that_access_one_granule_at_once_get_one_slot() -> None:
    filled = []

    def fill(gpa: int, size: int) -> bytes:
        filled.append(gpa)
        time.sleep(0.01)
        return contents(gpa, size)

    vm, memory, lazy = attached(fill=fill)
    with memory, ThreadPoolExecutor(8) as pool:
        accesses = [Access(START + index % 4 * GRANULE) for index in range(32)]
        assert all(pool.map(lambda access: lazy(access.native), accesses))
        assert all(access.made_again for access in accesses)
        assert sorted(filled) == [START + index * GRANULE for index in range(4)]
        assert len(vm.live) == 5
        assert (lazy.slots, lazy.late) == (4, 28)


def test_an_exception_from_fill_reaches_the_caller_and_leaves_no_slot() -> None:
    vm, memory, lazy = attached(fill=lambda gpa, _size: {}[gpa])
    with memory:
        with pytest.raises(KeyError):
            lazy(Access(START).native)
        assert len(vm.live) == 1
    vm, memory, lazy = attached(fill=lambda _gpa, size: bytes(size + 1))
    with memory:
        with pytest.raises(UsageError, match=rf"{GRANULE + 1} bytes were given to fill .* of {GRANULE} bytes"):
            lazy(Access(START).native)
        assert len(vm.live) == 1


def test_a_refusal_of_kvm_reaches_the_caller_and_can_be_retried() -> None:
    vm, memory, lazy = attached()
    with memory:
        vm.refuse = len(vm.calls)
        with pytest.raises(KvmError):
            lazy(Access(START).native)
        assert lazy(Access(START).native)
        assert lazy.slots == 1


def test_memory_on_demand_uses_few_files_and_closes_them_with_the_memory() -> None:
    before = len(os.listdir("/proc/self/fd"))
    _, memory, lazy = attached(ranges=[(START, GRANULE), (1 << 38, 1 << 38)])
    with memory:
        for index in range(30):
            assert lazy(Access((1 << 38) + index * index * MIB).native)
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("ranges", "options", "words"),
    [
        ([(START, GRANULE)], {"granule": 100}, "a granule of 0x64 bytes"),
        ([(START, GRANULE)], {"granule": 0}, "a granule"),
        ([(START, GRANULE)], {"limit": 0}, "use at least 1"),
        ([(START + 1, GRANULE)], {}, "whole pages"),
        ([(START, 5)], {}, "whole pages"),
        ([(START, 0)], {}, "whole pages"),
        ([(-HOST_PAGE, HOST_PAGE)], {}, "whole pages"),
        ([(START, 2 * GRANULE), (START + GRANULE, GRANULE)], {}, "overlaps the range before"),
    ],
)
def test_invalid_ranges_are_refused(ranges: list[tuple[int, int]], options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        OnDemand(ranges, **options)


def test_ranges_that_overlap_memory_or_a_device_are_refused() -> None:
    _, memory, _ = build(ipa_bits=36)
    ranges = ffi.new("struct pv_range[]", [{"base": 0x900_0000, "size": 0x1000}])
    bus = ffi.new("struct pv_bus *", {"count": 1, "ranges": ranges})
    memory.native.bus = bus
    with memory:
        with pytest.raises(UsageError, match="overlaps the slot"):
            OnDemand([(BASE - HOST_PAGE, GRANULE)]).attach(memory)
        with pytest.raises(UsageError, match="36 bits"):
            OnDemand([((1 << 36) - HOST_PAGE, GRANULE)]).attach(memory)
        with pytest.raises(UsageError, match="hide the device at 0x900_0000"):
            OnDemand([(0x800_0000, 32 * MIB)]).attach(memory)
        OnDemand([(0x900_0000 + HOST_PAGE, MIB), (0x800_0000, 16 * MIB)]).attach(memory)


def test_a_protected_guests_memory_must_be_lockable_as_far_as_the_limit_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(on_demand, "require_memlock", asked.append)
    for limit, most in ((2, 2 * GRANULE), (1000, 8 * GRANULE)):
        _, memory, _ = attached(Protection.PKVM, limit=limit)
        memory.close()
        assert asked.pop() == MIB + most

    def refuse(_bytes: int) -> None:
        raise HostError("too little")

    monkeypatch.setattr(on_demand, "require_memlock", refuse)
    with pytest.raises(HostError, match="too little"):
        attached(Protection.PKVM)


def test_memory_on_demand_must_be_attached_once_before_its_first_call() -> None:
    lazy = OnDemand([(START, GRANULE)])
    with pytest.raises(PyvmmError, match="is not attached"):
        lazy(Access(START).native)
    _, memory, _ = build()
    with memory:
        lazy.attach(memory)
        with pytest.raises(UsageError, match="already serves another guest"):
            lazy.attach(memory)


def test_a_withheld_answer_changes_only_the_reason_of_the_exit() -> None:
    access = Access(START)
    access.run[3] = 77
    lib.pv_mmio_retry(access.native)
    assert list(access.run[0:4]) == [0, 0, 0, 77]
