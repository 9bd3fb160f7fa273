# SPDX-License-Identifier: Apache-2.0
"""Interrupts of vCPUs that are being stepped: held back for that one instruction.

While a guest stands still its timer goes on, so an interrupt is nearly always pending when it is stepped, and a step
would end at the interrupt's vector instead of behind the instruction; a breakpoint could never be stepped over. So a
stepped vCPU takes no interrupts of group 1, the one that operating systems use: ICC_IGRPEN1_EL1, as KVM keeps it, is 0
during a step. The instruction that looks at that register itself sees so.
"""

from __future__ import annotations

from ctypes import c_uint64
from typing import TYPE_CHECKING, Final

from pyvmm.errors import PyvmmError
from pyvmm.log import get_logger
from pyvmm.uapi.kvm_arm64 import (
    ARM64_SYS_REG,
    KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
    KVM_DEV_ARM_VGIC_SYSREG_INSTR_MASK,
    KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT,
)

if TYPE_CHECKING:
    from pyvmm.kvm.device import KvmDevice
    from pyvmm.kvm.vcpu import Vcpu

log = get_logger("gdb")

MPIDR_EL1: Final = ARM64_SYS_REG(3, 0, 0, 0, 5)
ICC_IGRPEN1_EL1: Final = ARM64_SYS_REG(3, 0, 12, 12, 7) & KVM_DEV_ARM_VGIC_SYSREG_INSTR_MASK


class HeldInterrupts:
    """Holds interrupts back through ``gic``, and gives them back. KVM allows either while no vCPU is in the guest."""

    def __init__(self, gic: KvmDevice | None) -> None:
        self._gic = gic
        self._held: list[Vcpu] = []

    def hold(self, vcpu: Vcpu) -> None:
        """Have ``vcpu`` take no interrupts until :meth:`give_back`; nothing where it takes none anyway."""
        if self._gic is not None and self._swap(self._gic, vcpu, 1, 0):
            self._held.append(vcpu)

    def give_back(self) -> None:
        """Let all of them take interrupts again, unless the guest has said otherwise meanwhile."""
        while self._held:
            vcpu = self._held.pop()
            if self._gic is not None:
                self._swap(self._gic, vcpu, 0, 1)

    @staticmethod
    def _swap(gic: KvmDevice, vcpu: Vcpu, old: int, new: int) -> bool:
        """Put ``new`` in the place of ``old``; whether that was there."""
        try:
            mpidr = vcpu.get_reg(MPIDR_EL1)
            affinity = mpidr >> 32 << 24 & 0xFF00_0000 | mpidr & 0xFF_FFFF
            attr = affinity << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT | ICC_IGRPEN1_EL1
            enabled = c_uint64()
            gic.get_attr(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, attr, enabled)
            if enabled.value & 1 != old:
                return False
            gic.set_attr(KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, attr, c_uint64(new))
        except PyvmmError as error:
            log.warning("interrupts_not_held", vcpu=vcpu.index, why=error.message)
            return False
        return True
