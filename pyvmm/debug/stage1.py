# SPDX-License-Identifier: Apache-2.0
"""Walk the guest's page tables in software: VMSAv8-64 stage 1 of EL1&0.

Arm Architecture Reference Manual, D8: granules of 4, 16 and 64 KiB, 16 to 52 bits of input, block entries, both halves
of the address space, 52-bit output addresses. Permissions are ignored: a debugger may read more than the guest. Pure:
the caller reads the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pyvmm.errors import hex_

PAGE_BITS: Final = 12
_M: Final = 1 << 0
_TBI: Final = (1 << 37, 1 << 38)
_EPD: Final = (1 << 7, 1 << 23)
_DS: Final = 1 << 59
_IPS_52: Final = 6
_TG0: Final = {0b00: 12, 0b01: 16, 0b10: 14}
_TG1: Final = {0b01: 14, 0b10: 12, 0b11: 16}
_LAST: Final = 3


REGIME: Final = ("SCTLR_EL1", "TCR_EL1", "TTBR0_EL1", "TTBR1_EL1")
"""The registers of a :class:`Regime`, in its order."""


@dataclass(frozen=True, slots=True)
class Regime:
    """The registers that control a vCPU's translation."""

    sctlr: int
    tcr: int
    ttbr0: int
    ttbr1: int


@dataclass(frozen=True, slots=True)
class Translation:
    """A translated address: ``gpa``, and the ``size`` of its page or block in bytes."""

    gpa: int
    size: int


class Untranslated(Exception):
    """The address has no translation. The text has the reason."""


def translate(va: int, regime: Regime, read64: Callable[[int], int]) -> Translation:
    """Translate a virtual address (64 bits). ``read64`` reads a descriptor at a gpa, and may raise anything.

    Raises Untranslated if the guest would take a fault. With the MMU off, addresses are not changed.
    """
    if not regime.sctlr & _M:
        return Translation(va, 1 << PAGE_BITS)
    upper = va >> 55 & 1
    bits, granule = _range(va, regime.tcr, upper)
    stride = granule - 3
    levels = max(1, -(-(bits - granule) // stride))
    level = _LAST + 1 - levels
    if bits <= granule or level < -1:
        raise Untranslated(f"TCR_EL1 {hex_(regime.tcr)} sets addresses of {bits} bits, unsupported by this walk")
    wide = bool(regime.tcr & _DS) and granule != 16
    lpa = granule == 16 and regime.tcr >> 32 & 7 == _IPS_52
    shift = granule + stride * (levels - 1)
    table = _base(regime.ttbr1 if upper else regime.ttbr0, 8 << bits - shift, wide=wide or lpa)
    index = va >> shift & (1 << bits - shift) - 1
    while True:
        descriptor = read64(table + 8 * index)
        leaf = level == _LAST or not descriptor & 2
        if not descriptor & 1 or (level == _LAST and not descriptor & 2):
            raise Untranslated(
                f"{hex_(va)} is not mapped: entry {hex_(descriptor)} at level {level}, gpa {hex_(table + 8 * index)}"
            )
        if leaf and level < (1 if granule == PAGE_BITS else 2) - (wide or lpa):
            raise Untranslated(f"{hex_(va)} leads to a block at level {level}, which is invalid")
        table = _output(descriptor, shift if leaf else granule, wide=wide, lpa=lpa)
        if leaf:
            return Translation(table | va & (1 << shift) - 1, 1 << shift)
        level += 1
        shift -= stride
        index = va >> shift & (1 << stride) - 1


def _range(va: int, tcr: int, upper: int) -> tuple[int, int]:
    """Return the input's bits and the granule's, of the half of the address space that ``va`` is in."""
    if tcr & _EPD[upper]:
        raise Untranslated(f"{hex_(va)}: walks of TTBR{upper}_EL1 are off (TCR_EL1.EPD{upper})")
    granule = _TG1.get(tcr >> 30 & 3) if upper else _TG0.get(tcr >> 14 & 3)
    if granule is None:
        raise Untranslated(f"TCR_EL1 {hex_(tcr)} names an invalid granule")
    bits = 64 - (tcr >> 16 * upper & 0x3F)
    top = 56 if tcr & _TBI[upper] else 64
    above = va & (1 << top) - 1
    above >>= min(bits, top)
    if above != (((1 << top - min(bits, top)) - 1) if upper else 0):
        raise Untranslated(f"{hex_(va)} is outside the {bits} bits of TTBR{upper}_EL1's addresses")
    return bits, granule


def _base(ttbr: int, size: int, *, wide: bool) -> int:
    """Return the first table's gpa; it is aligned to its ``size`` in bytes, and to 64 where there are 52 bits."""
    base = ttbr & ((1 << 48) - 1) & -max(size, 64 if wide else 2)
    return base | (ttbr >> 2 & 0xF) << 48 if wide else base


def _output(descriptor: int, low: int, *, wide: bool, lpa: bool) -> int:
    """Return the output address of a descriptor from bit ``low`` on."""
    address = descriptor & ((1 << (50 if wide else 48)) - 1) & -(1 << low)
    if wide:
        return address | (descriptor >> 8 & 3) << 50
    return address | (descriptor >> 12 & 0xF) << 48 if lpa else address
