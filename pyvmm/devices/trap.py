# SPDX-License-Identifier: Apache-2.0
"""A payload's trap, as its vectors reported it, and an order's answer. Data only.

Names and codes are those of the Arm Architecture Reference Manual, DDI 0487, ESR_EL1.
"""

from __future__ import annotations

from pyvmm.errors import hex_
from pyvmm.typed import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

_SOURCES: Final = ("current EL with SP0", "current EL", "lower EL, AArch64", "lower EL, AArch32")
_KINDS: Final = ("synchronous exception", "IRQ", "FIQ", "SError")

_CLASSES: Final = {
    0x00: "undefined instruction (unknown reason)", 0x01: "trapped WFI or WFE", 0x07: "floating point is off",
    0x0D: "branch target", 0x0E: "illegal execution state", 0x15: "SVC", 0x16: "HVC", 0x17: "SMC",
    0x18: "trapped system register", 0x19: "SVE is off", 0x1C: "pointer authentication failed",
    0x20: "instruction abort from a lower EL",
    0x21: "instruction abort", 0x22: "misaligned program counter", 0x24: "data abort from a lower EL",
    0x25: "data abort", 0x26: "misaligned stack pointer", 0x2F: "SError", 0x30: "breakpoint from a lower EL",
    0x31: "breakpoint", 0x32: "software step from a lower EL", 0x33: "software step",
    0x34: "watchpoint from a lower EL", 0x35: "watchpoint", 0x3C: "BRK instruction",
}  # fmt: skip
_INSTRUCTION_ABORTS: Final = (0x20, 0x21)
_DATA_ABORTS: Final = (0x24, 0x25)
_FAR_IS_VALID: Final = (0x20, 0x21, 0x22, 0x24, 0x25, 0x34, 0x35)

#: DFSC and IFSC, bits 5:2 of a fault whose bits 1:0 are a level.
_LEVELLED: Final = {
    0b0000: "address size fault",
    0b0001: "translation fault",
    0b0010: "access flag fault",
    0b0011: "permission fault",
    0b0101: "external abort on a translation table walk",
    0b0111: "parity error on a translation table walk",
}
_STATUS: Final = {
    0b010000: "external abort",
    0b010001: "synchronous tag check fault",
    0b010011: "external abort on a table walk",
    0b011000: "parity error",
    0b100001: "alignment fault",
    0b110000: "TLB conflict abort",
    0b110001: "unsupported atomic update",
    0b110100: "lockdown fault",
    0b110101: "unsupported exclusive access",
}


def fault_status(code: int) -> str:
    """Describe a DFSC or IFSC (6 bits), with the table level if it has one."""
    if code in _STATUS:
        return _STATUS[code]
    if name := _LEVELLED.get(code >> 2):
        return f"{name}, level {code & 3}"
    return f"fault status {code:#04x}"


class Trap(NamedTuple):
    """The registers at an exception: ``vector`` is 0..15 in the order of the vector table, the rest 64-bit values."""

    vector: int
    esr: int
    far: int
    elr: int
    spsr: int
    sp: int
    lr: int
    vcpu: int

    @classmethod
    def from_words(cls, words: Sequence[int]) -> Trap:
        """Take the eight TRAP registers of the mailbox, in their order."""
        vector, esr, far, elr, spsr, sp, lr, vcpu = words
        return cls(vector, esr, far, elr, spsr, sp, lr, vcpu)

    @property
    def exception_class(self) -> int:
        """ESR_EL1.EC."""
        return self.esr >> 26 & 0x3F

    @property
    def is_abort(self) -> bool:
        """Whether an access or a fetch failed, so that ``far`` and the status code are valid."""
        return self.is_synchronous and self.exception_class in (*_INSTRUCTION_ABORTS, *_DATA_ABORTS)

    @property
    def is_synchronous(self) -> bool:
        """Whether the instruction at ``elr`` caused it. Otherwise (an interrupt) ESR is not valid."""
        return self.vector % 4 == 0

    @property
    def is_write(self) -> bool:
        """Whether the failed data access was a store (ESR_EL1.WnR)."""
        return self.is_synchronous and self.exception_class in _DATA_ABORTS and bool(self.esr >> 6 & 1)

    @property
    def is_external(self) -> bool:
        """Whether it is an external abort, which KVM injects for addresses without slot and device."""
        return self.is_abort and self.esr & 0x3F == 0b010000

    def what(self) -> str:
        """Describe the exception briefly, with its address if it has one."""
        if not self.is_synchronous:
            return f"{_KINDS[self.vector % 4]}"
        name = _CLASSES.get(self.exception_class, f"exception class {self.exception_class:#04x}")
        # FAR_EL1 is not valid for some external aborts: ISS bit 10 (FnV).
        known = self.exception_class in _FAR_IS_VALID and not (self.is_external and self.esr >> 10 & 1)
        if self.is_abort:
            access = "fetch from" if self.exception_class in _INSTRUCTION_ABORTS else "load from"
            access = "store to" if self.is_write else access
            where = hex_(self.far) if known else "an unknown address"
            return f"{name}: {access} {where}, {fault_status(self.esr & 0x3F)}"
        return f"{name}: {hex_(self.far)}" if known else name

    def describe(self) -> str:
        """Describe the exception in one line, with its location and all reported registers."""
        source = "" if self.vector // 4 == 1 else f", taken from {_SOURCES[self.vector // 4 & 3]}"
        registers = ("ELR", self.elr), ("ESR", self.esr), ("FAR", self.far), ("LR", self.lr), ("SP", self.sp)
        values = " ".join(f"{name} {hex_(value)}" for name, value in (*registers, ("SPSR", self.spsr)))
        return f"{self.what()}{source}; vCPU {self.vcpu}, {values}"


class MailboxAnswer(NamedTuple):
    """The answer to an order: ``status`` is abi.STATUS_*, ``results`` the seven words, ``trap`` the trap or None."""

    status: int
    results: tuple[int, ...]
    trap: Trap | None = None
