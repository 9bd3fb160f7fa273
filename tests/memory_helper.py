# SPDX-License-Identifier: Apache-2.0
"""A VM that takes notes in the place of KVM, and memory built on it, for the tests of the memory package."""

from __future__ import annotations

from typing import Any

from pyvmm._native import ffi, lib
from pyvmm.errors import KvmError
from pyvmm.memory.address import MIB
from pyvmm.memory.backing import Memfd
from pyvmm.memory.ledger import PageState
from pyvmm.memory.memory import Memory
from pyvmm.protection import Protection

BASE = 0x8000_0000
NATIVE = {Protection.NONE: lib.PV_NONE, Protection.PKVM: lib.PV_PKVM, Protection.EMULATED: lib.PV_EMULATED}


class NotedVm:
    """Records what reaches KVM; ``refuse`` makes the call with that number (from 0) fail."""

    def __init__(self, most: int = 8) -> None:
        self.most = most
        self.calls: list[tuple[Any, ...]] = []
        self.live: dict[int, tuple[int, int, int]] = {}
        self.refuse: int | None = None
        self.closed = False

    def check(self, _cap: int) -> int:
        return self.most

    def set_memory(self, slot, gpa, size, hva, **_options):
        self._count(("set", slot, gpa, size, hva))
        assert slot not in self.live
        assert all(gpa + size <= other or other + length <= gpa for other, length, _ in self.live.values())
        self.live[slot] = (gpa, size, hva)

    def delete_memory(self, slot):
        self._count(("delete", slot))
        del self.live[slot]

    def _count(self, call) -> None:
        if self.refuse == len(self.calls):
            self.refuse = None
            raise KvmError("KVM_SET_USER_MEMORY_REGION", "noted", 12)
        self.calls.append(call)

    def layout(self) -> list[tuple[int, int]]:
        return sorted((gpa, size) for gpa, size, _ in self.live.values())


def build(protection=Protection.NONE, size=MIB, most=8, **options):
    vm = NotedVm(most)
    native = ffi.new("struct pv_vm *")
    native.fd = -1
    native.protection = NATIVE[protection]
    memory = Memory(vm, protection, native, **options)
    slot = memory.add(BASE, Memfd(size)) if size else None
    return vm, memory, slot


def assert_counters_agree(memory: Memory) -> None:
    counts = memory.ledger.counts()
    assert {state: memory.native.pages[state] for state in PageState} == counts
