# SPDX-License-Identifier: Apache-2.0
"""Inject an exception that the debugger has intercepted into the guest: emulate the entry into EL1.

Arm Architecture Reference Manual, AArch64.TakeException; like arch/arm64/kvm/hyp/exception.c in KVM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyvmm.debug.registers import SYSTEM
from pyvmm.uapi.kvm_arm64 import PSR_MODE_EL1h, core_reg

if TYPE_CHECKING:
    from pyvmm.kvm.vcpu import Vcpu

_NZCV: Final = 0xF000_0000
_DIT: Final = 1 << 24
_PAN: Final = 1 << 22
_SSBS: Final = 1 << 12
_DAIF: Final = 0x3C0
_AARCH32: Final = 1 << 4
_SCTLR_SPAN: Final = 1 << 23
_SCTLR_DSSBS: Final = 1 << 44


def vector(pstate: int) -> int:
    """Return the offset from VBAR_EL1 of the vector for a synchronous exception taken at ``pstate``."""
    if pstate & _AARCH32:
        return 0x600
    if not pstate & 0b1100:
        return 0x400
    return 0x200 if pstate & 1 else 0


def handler_state(pstate: int, sctlr: int) -> int:
    """Return the PSTATE that a handler at EL1 starts with."""
    state = pstate & (_NZCV | _DIT | _PAN) | _DAIF | PSR_MODE_EL1h
    state |= 0 if sctlr & _SCTLR_SPAN else _PAN
    return state | (_SSBS if sctlr & _SCTLR_DSSBS else 0)


def enter_el1(vcpu: Vcpu, syndrome: int) -> None:
    """Have ``vcpu`` take a synchronous exception with this ESR, at its current instruction."""
    pstate, pc = vcpu.get_reg(core_reg("pstate")), vcpu.pc
    vcpu.set_reg(SYSTEM["ESR_EL1"], syndrome)
    vcpu.set_reg(core_reg("spsr_el1"), pstate)
    vcpu.set_reg(core_reg("elr_el1"), pc)
    vcpu.set_reg(core_reg("pc"), vcpu.get_reg(SYSTEM["VBAR_EL1"]) + vector(pstate))
    vcpu.set_reg(core_reg("pstate"), handler_state(pstate, vcpu.get_reg(SYSTEM["SCTLR_EL1"])))
