# SPDX-License-Identifier: Apache-2.0
"""The smallest x86 guest: real-mode code in one slot, run from Python. Only for tests of the wrappers."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import addressof, c_char

from pyvmm.kvm.vm import Vm
from pyvmm.uapi.kvm import KVM_RUN
from pyvmm.uapi.kvm_run import ExitReason

PAGE = 4096


@contextmanager
def pages(count: int) -> Iterator[int]:
    """Map ``count`` pages and return their address."""
    memory = mmap.mmap(-1, count * PAGE)
    view = c_char.from_buffer(memory)
    try:
        yield addressof(view)
    finally:
        del view
        memory.close()


class RealMode:
    """A guest with ``code`` at 0x1000 in a slot of 16 KiB at 0. Addresses above are MMIO."""

    pages = 4

    def __init__(self, vm: Vm, code: bytes, *, flags: int = 0) -> None:
        self._memory = mmap.mmap(-1, self.pages * PAGE)
        self._memory[PAGE : PAGE + len(code)] = code
        self._view = c_char.from_buffer(self._memory)  # keeps the mapping until the guest is gone
        vm.set_memory(0, 0, self.pages * PAGE, addressof(self._view), flags=flags)
        self.vcpu = vm.create_vcpu(0)
        sregs = self.vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)
        regs = self.vcpu.get_regs()
        regs.rip, regs.rflags = PAGE, 2
        self.vcpu.set_regs(regs)

    def run(self) -> ExitReason:
        """Run until the next exit."""
        self.vcpu.call(KVM_RUN)
        return ExitReason(self.vcpu.run.exit_reason)
