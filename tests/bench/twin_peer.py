# SPDX-License-Identifier: Apache-2.0
"""The loop's pure-Python twin on a real vCPU, for pyvmm.bench.peers.loops: only the tests enter a guest from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from pyvmm._native import ffi, lib
from pyvmm.kvm import libc
from pyvmm.uapi.kvm import KVM_RUN
from tests import twin, twin_state

if TYPE_CHECKING:
    from pyvmm.kvm.vcpu import Vcpu

PAGE = 4096


class Kernel:
    """KVM_RUN and nothing else. The twin needs no more for MMIO."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._fd = vcpu.fileno()

    def enter(self) -> int:
        return libc.ioctl(self._fd, KVM_RUN.number, 0)[1]

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(name)


def run(vcpu: Vcpu, base: int) -> int:
    """Run until the guest is off, with a register file at ``base``. Return the number of MMIO exits."""
    vm = twin.Vm(lib.PV_NONE)
    vm.ranges = [twin.Range(base, PAGE, lib.PV_KIND_REGISTERS, bytearray(PAGE))]
    area = memoryview(ffi.buffer(ffi.cast("uint8_t *", vcpu.run_address), PAGE))
    loop = twin.Vcpu(vm, 0, area, cast("twin_state.Kernel", Kernel(vcpu)))
    stop = loop.run()
    if stop != lib.PV_STOP_SYSTEM:
        raise RuntimeError(f"the twin stopped with {stop}")
    return sum(loop.counts[: lib.PV_EXIT_MMIO_UNCLAIMED])
