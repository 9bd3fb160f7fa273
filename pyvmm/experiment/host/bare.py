# SPDX-License-Identifier: Apache-2.0
"""A minimal VM, whose descriptors and mappings can be released one by one, in any order.

Its guest stores a word to every page of its memory except the first, which holds its code, and powers itself off; or
it executes another program of a few instructions. A program needs no register but the pc, because EL2 may let the host
set only that and x0. A released descriptor or mapping is replaced, not closed, so that its number or address stays
occupied.
"""

from __future__ import annotations

import contextlib
import os
from errno import errorcode
from typing import Self

from pyvmm._native import ffi, lib
from pyvmm.kvm.system import System
from pyvmm.memory import mman
from pyvmm.memory.address import Gpa
from pyvmm.memory.backing import Memfd
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from pyvmm.uapi.kvm import KVM_RUN, KVM_VM_TYPE_ARM_PROTECTED
from pyvmm.uapi.kvm_arm64 import core_reg
from pyvmm.uapi.kvm_run import ExitReason
from pyvmm.uapi.psci import PSCI_0_2_FN_SYSTEM_OFF

BASE = Gpa(0x8000_0000)
WORD = 0x5EC2_E75E_C2E7
REPORT = Gpa(0x0930_0000)
"""An address without memory: a store there leaves KVM_RUN."""
HOLDERS = ("vm", "vcpu", "run", "memory", "memfd")
"""The references that can be released: two descriptors, two mappings (kvm_run, guest memory), and the memfd."""


Program = tuple[int, ...]
"""Instructions of A64."""


def move(register: int, value: int) -> Program:
    """Return the instructions that set x0 to x30 to 64 bits."""
    parts = [(value >> 16 * part & 0xFFFF) << 5 | part << 21 | register for part in range(4)]
    return 0xD280_0000 | parts[0], *(0xF280_0000 | part for part in parts[1:])  # movz, movk


def store(register: int, base: int) -> Program:
    """Return the instruction that stores one register at the address in another."""
    return (0xF900_0000 | base << 5 | register,)


def call(function: int, *arguments: int) -> Program:
    """Return the instructions that call the hypervisor."""
    words = [word for number, value in enumerate((function, *arguments)) for word in move(number, value)]
    return (*words, 0xD400_0002)  # hvc #0


def tell(register: int) -> Program:
    """Return the instructions that store a register, but x9, to REPORT."""
    return move(9, REPORT) + store(register, 9)


POWER_OFF = call(PSCI_0_2_FN_SYSTEM_OFF)


def stores(pages: int) -> Program:
    """Return the usual program of a VM with this number of pages."""
    begin = move(1, BASE + HOST_PAGE) + move(2, pages - 1) + move(3, WORD)
    # 1: STR X3, [X1]; ADD X1, X1, #HOST_PAGE; SUBS X2, X2, #1; B.NE 1b
    return begin + store(3, 1) + (0x9140_0021 | HOST_PAGE >> 12 << 10, 0xF100_0442, 0x54FF_FFA1) + POWER_OFF


class Bare:
    """A VM of ``cpus`` vCPUs and ``pages`` pages of a memfd. ``witness`` is a second mapping. A context manager.

    All vCPUs but the first are off. ``program`` is what it executes.
    """

    def __init__(self, protection: Protection, pages: int = 4, *, program: Program = (), cpus: int = 1) -> None:
        self.pages = pages
        self._program, self._cpus = program or stores(pages), cpus
        self._protected = protection is Protection.PKVM
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as half_built:
            push = half_built.enter_context
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            half_built.callback(os.close, null)
            size = self.pages * HOST_PAGE
            self.memfd = push(Memfd(size))
            self.witness = mman.map_shared(self.memfd.fd, size)
            half_built.callback(mman.unmap, self.witness, size)
            self.memfd.load(0, b"".join(word.to_bytes(4, "little") for word in self._program))
            self.system = push(System.open())
            self.vm = push(self.system.create_vm(KVM_VM_TYPE_ARM_PROTECTED if self._protected else 0))
            self.vm.set_memory(0, BASE, size, self.memfd.hva)
            self.vcpus = [push(self.vm.create_vcpu(index)) for index in range(self._cpus)]
            for vcpu in self.vcpus:
                vcpu.init(power_off=vcpu.index > 0)
            self.vcpu = self.vcpus[0]
            self.vcpu.set_reg(core_reg("pc"), BASE)
            self._null = null
            self._stack = half_built.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release everything. Idempotent."""
        self._stack.close()

    def run(self) -> str:
        """Run the first vCPU to its next exit: ``off``, the errno of KVM_RUN, or the number of another exit."""
        _, error = self.vcpu.attempt(KVM_RUN)
        if error:
            return errorcode.get(error, str(error))
        reason = self.vcpu.run.exit_reason
        return "off" if reason == ExitReason.KVM_EXIT_SYSTEM_EVENT else f"exit {reason}"

    def let_go(self, holder: str) -> None:
        """Drop one reference, a key of HOLDERS."""
        match holder:
            case "vm":
                os.dup2(self._null, self.vm.fileno(), inheritable=False)
            case "vcpu":
                os.dup2(self._null, self.vcpu.fileno(), inheritable=False)
            case "memfd":
                os.dup2(self._null, self.memfd.fd, inheritable=False)
            case "run":
                self._cover(self.vcpu.run_address, self.system.vcpu_mmap_size)
            case "memory":
                self._cover(self.memfd.hva, self.memfd.size)

    def clear_pages(self) -> int:
        """Count the pages that the guest stored to and that read as zeros through the witness."""
        data = [look(self.witness + page * HOST_PAGE) for page in range(1, self.pages)]
        return sum(page == bytes(HOST_PAGE) for page in data)

    def _cover(self, address: int, size: int) -> None:
        with contextlib.closing(Memfd(size)) as other:
            mman.map_over(address, size, other.fd, 0, mman.PROT_RW)


def look(address: int, size: int = HOST_PAGE) -> bytes | None:
    """Load bytes from an address of this process, guarded. None if that faults."""
    room = bytearray(size)
    done = lib.pv_copy(ffi.from_buffer("uint8_t[]", room), ffi.cast("void *", address), size)
    return bytes(room) if done == size else None


def store64(address: int, value: int) -> bool:
    """Store 64 bits to an address of this process, guarded. False if that faults."""
    return int(lib.pv_copy(ffi.cast("void *", address), value.to_bytes(8, "little"), 8)) == 8


def locked() -> tuple[int, int]:
    """Return VmLck and VmPin of this process, in kB."""
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status if ":" in line)
    return int(fields["VmLck"].split()[0]), int(fields["VmPin"].split()[0])
