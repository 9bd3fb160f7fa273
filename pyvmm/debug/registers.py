# SPDX-License-Identifier: Apache-2.0
"""GDB's registers of a 64-bit Arm CPU: their order, their sizes, and the target description.

Two features are GDB's own, org.gnu.gdb.aarch64.core and .fpu (GDB's manual, "AArch64 Features"). The third shows system
registers (``info registers system``). Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyvmm.uapi.kvm_arm64 import ARM64_SYS_REG, core_reg


@dataclass(frozen=True, slots=True)
class Register:
    """One register; ``size`` in bytes."""

    name: str
    size: int


CORE: Final = (*(Register(f"x{n}", 8) for n in range(31)), Register("sp", 8), Register("pc", 8), Register("cpsr", 4))
FPU: Final = (*(Register(f"v{n}", 16) for n in range(32)), Register("fpsr", 4), Register("fpcr", 4))
SYSTEM: Final = {
    "SP_EL0": core_reg("sp"),
    "SP_EL1": core_reg("sp_el1"),
    "ELR_EL1": core_reg("elr_el1"),
    "SPSR_EL1": core_reg("spsr_el1"),
    "ESR_EL1": ARM64_SYS_REG(3, 0, 5, 2, 0),
    "FAR_EL1": ARM64_SYS_REG(3, 0, 6, 0, 0),
    "VBAR_EL1": ARM64_SYS_REG(3, 0, 12, 0, 0),
    "SCTLR_EL1": ARM64_SYS_REG(3, 0, 1, 0, 0),
    "CPACR_EL1": ARM64_SYS_REG(3, 0, 1, 0, 2),
    "TCR_EL1": ARM64_SYS_REG(3, 0, 2, 0, 2),
    "TTBR0_EL1": ARM64_SYS_REG(3, 0, 2, 0, 0),
    "TTBR1_EL1": ARM64_SYS_REG(3, 0, 2, 0, 1),
    "MAIR_EL1": ARM64_SYS_REG(3, 0, 10, 2, 0),
    "CONTEXTIDR_EL1": ARM64_SYS_REG(3, 0, 13, 0, 1),
    "TPIDR_EL1": ARM64_SYS_REG(3, 0, 13, 0, 4),
    "TPIDR_EL0": ARM64_SYS_REG(3, 3, 13, 0, 2),
}
"""ONE_REG ids of system registers for exceptions and translation, by name."""

REGISTERS: Final = CORE + FPU + tuple(Register(name, 8) for name in SYSTEM)
"""By GDB's number."""

NUMBER: Final = {register.name: number for number, register in enumerate(REGISTERS)}
EXPEDITED: Final = tuple(NUMBER[name] for name in ("x29", "sp", "pc"))
"""Registers that a debugger reads after every stop, so the stop reply includes them."""

_FLAGS: Final = {
    "SP": 0, "F": 6, "I": 7, "A": 8, "D": 9, "IL": 20, "SS": 21, "PAN": 22, "UAO": 23, "V": 28, "C": 29, "Z": 30,
    "N": 31,
}  # fmt: skip
_TYPES: Final = {"sp": "data_ptr", "pc": "code_ptr", "cpsr": "cpsr_flags"}
_LANES: Final = (("d", "ieee_double", 2), ("q", "uint64", 2), ("s", "ieee_single", 4), ("w", "uint32", 4),
                 ("h", "uint16", 8), ("b", "uint8", 16))  # fmt: skip


def description() -> bytes:
    """Write the target description (target.xml)."""
    lines = [
        '<?xml version="1.0"?>',
        '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
        '<target version="1.0">',
        "<architecture>aarch64</architecture>",
        '<feature name="org.gnu.gdb.aarch64.core">',
        '<flags id="cpsr_flags" size="4">',
        *(f'<field name="{name}" start="{bit}" end="{bit}"/>' for name, bit in _FLAGS.items()),
        '<field name="EL" start="2" end="3"/>',
        "</flags>",
        *(_register(register, _TYPES.get(register.name, "int")) for register in CORE),
        "</feature>",
        '<feature name="org.gnu.gdb.aarch64.fpu">',
        *(f'<vector id="lanes_{name}" type="{kind}" count="{count}"/>' for name, kind, count in _LANES),
        '<union id="vector">',
        *(f'<field name="{name}" type="lanes_{name}"/>' for name, _, _ in _LANES),
        "</union>",
        *(_register(register, "vector" if register.size == 16 else "int") for register in FPU),
        "</feature>",
        '<feature name="org.pyvmm.aarch64.system">',
        *(f'<reg name="{name}" bitsize="64" type="uint64" group="system"/>' for name in SYSTEM),
        "</feature>",
        "</target>",
    ]
    return "\n".join(lines).encode()


def _register(register: Register, kind: str) -> str:
    return f'<reg name="{register.name}" bitsize="{8 * register.size}" type="{kind}"/>'
