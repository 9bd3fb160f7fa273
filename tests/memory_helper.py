# SPDX-License-Identifier: Apache-2.0
"""A VM that records calls instead of KVM, and memory built on it, for the tests of the memory package."""

from __future__ import annotations

from typing import Any, cast

from pyvmm._native import ffi, lib
from pyvmm.errors import KvmError
from pyvmm.kvm.vm import Vm
from pyvmm.memory.address import MIB
from pyvmm.memory.backing import Memfd
from pyvmm.memory.ledger import PageState
from pyvmm.memory.memory import Memory
from pyvmm.memory.slots import Slot
from pyvmm.protection import Protection

BASE = 0x8000_0000
NATIVE = {Protection.NONE: lib.PV_NONE, Protection.PKVM: lib.PV_PKVM, Protection.EMULATED: lib.PV_EMULATED}


class NotedVm:
    """Records the calls to KVM; ``refuse`` makes the call with that number (from 0) fail."""

    def __init__(self, most: int = 8) -> None:
        self.most = most
        self.calls: list[tuple[Any, ...]] = []
        self.live: dict[int, tuple[int, int, int]] = {}
        self.refuse: int | None = None
        self.closed = False

    def check(self, _cap: int) -> int:
        return self.most

    def set_memory(self, slot: int, gpa: int, size: int, hva: int, **_options: Any) -> None:
        self._count(("set", slot, gpa, size, hva))
        assert slot not in self.live
        assert all(gpa + size <= other or other + length <= gpa for other, length, _ in self.live.values())
        self.live[slot] = (gpa, size, hva)

    def delete_memory(self, slot: int) -> None:
        self._count(("delete", slot))
        del self.live[slot]

    def _count(self, call: tuple[int | str, ...]) -> None:
        if self.refuse == len(self.calls):
            self.refuse = None
            raise KvmError("KVM_SET_USER_MEMORY_REGION", "noted", 12)
        self.calls.append(call)

    def layout(self) -> list[tuple[int, int]]:
        return sorted((gpa, size) for gpa, size, _ in self.live.values())


def build(
    protection: Protection = Protection.NONE, size: int = MIB, most: int = 8, **options: int
) -> tuple[NotedVm, Memory, Slot]:
    """Return memory with one slot of ``size`` bytes at BASE, and the VM that records its calls."""
    vm, memory = build_empty(protection, most, **options)
    return vm, memory, memory.add(BASE, Memfd(size))


def build_empty(protection: Protection = Protection.NONE, most: int = 8, **options: int) -> tuple[NotedVm, Memory]:
    """Return memory without a slot, and the VM that records its calls."""
    vm = NotedVm(most)
    native = ffi.new("struct pv_vm *")
    native.fd = -1
    native.protection = NATIVE[protection]
    return vm, Memory(cast(Vm, vm), protection, native, **options)


def assert_counters_agree(memory: Memory) -> None:
    counts = memory.ledger.counts()
    assert {state: memory.native.pages[state] for state in PageState} == counts
