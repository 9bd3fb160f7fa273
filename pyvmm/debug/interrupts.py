# SPDX-License-Identifier: Apache-2.0
"""Mask the interrupts of a vCPU during a single step.

An interrupt is often pending when a guest is stepped: from a device, which runs on, or from the timer of a protected
guest, whose time goes on while it is stopped. A step would end at the interrupt's vector instead of behind the
instruction, and a breakpoint could never be stepped over. So a stepped vCPU takes no interrupts. On a GICv3 that is
ICC_IGRPEN1_EL1, as KVM keeps it, which is 0 during a step: group 1 is the one that operating systems use. On a GICv2 it
is the enable bits of both groups in GICC_CTLR. An instruction of the guest that reads that register during a step sees
so.
"""

from __future__ import annotations

from ctypes import c_uint32, c_uint64
from typing import TYPE_CHECKING, Final

from pyvmm.errors import PyvmmError
from pyvmm.log import get_logger
from pyvmm.uapi.kvm_arm64 import (
    ARM64_SYS_REG,
    KVM_DEV_ARM_VGIC_CPUID_SHIFT,
    KVM_DEV_ARM_VGIC_GRP_CPU_REGS,
    KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
    KVM_DEV_ARM_VGIC_SYSREG_INSTR_MASK,
    KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT,
)

if TYPE_CHECKING:
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.machine.gic import Gic

log = get_logger("gdb")

MPIDR_EL1: Final = ARM64_SYS_REG(3, 0, 0, 0, 5)
ICC_IGRPEN1_EL1: Final = ARM64_SYS_REG(3, 0, 12, 12, 7) & KVM_DEV_ARM_VGIC_SYSREG_INSTR_MASK
GICC_CTLR: Final = 0x0
"""Arm IHI 0048, 4.4.1: bit 0 enables interrupts of group 0, bit 1 those of group 1."""


class HeldInterrupts:
    """Masks and unmasks interrupts through ``gic``. KVM allows both only while no vCPU is in the guest."""

    def __init__(self, gic: Gic | None) -> None:
        self._gic = gic
        self._held: list[tuple[Vcpu, int]] = []

    def hold(self, vcpu: Vcpu) -> None:
        """Mask ``vcpu``'s interrupts until :meth:`give_back`. Does nothing if they are masked anyway."""
        if bits := self._change(vcpu):
            self._held.append((vcpu, bits))

    def give_back(self) -> None:
        """Let all of them take interrupts again. What the guest has enabled meanwhile stays enabled."""
        while self._held:
            vcpu, bits = self._held.pop()
            self._change(vcpu, bits)

    def _change(self, vcpu: Vcpu, enable: int = 0) -> int:
        """Set the bits ``enable`` where ``vcpu`` enables interrupts, clear all where it is 0; return what was set."""
        if self._gic is None:
            return 0
        try:
            group, attr, value, mask = _enable(self._gic, vcpu)
            self._gic.device.get_attr(group, attr, value)
            old = value.value
            value.value = old | enable if enable else old & ~mask
            if value.value != old:
                self._gic.device.set_attr(group, attr, value)
        except PyvmmError as error:
            log.warning("interrupts_not_held", vcpu=vcpu.index, why=error.message)
            return 0
        return old & mask


def _enable(gic: Gic, vcpu: Vcpu) -> tuple[int, int, c_uint32 | c_uint64, int]:
    """Return where ``vcpu`` enables interrupts: group, attribute, room for the value, and the bits in it."""
    if gic.version == 2:
        return KVM_DEV_ARM_VGIC_GRP_CPU_REGS, vcpu.index << KVM_DEV_ARM_VGIC_CPUID_SHIFT | GICC_CTLR, c_uint32(), 0b11
    mpidr = vcpu.get_reg(MPIDR_EL1)
    affinity = mpidr >> 32 << 24 & 0xFF00_0000 | mpidr & 0xFF_FFFF
    attr = affinity << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT | ICC_IGRPEN1_EL1
    return KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, attr, c_uint64(), 0b1
