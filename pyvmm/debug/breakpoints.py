# SPDX-License-Identifier: Apache-2.0
"""Convert a debugger's breakpoints and watchpoints to the CPU's debug registers. Pure.

All are hardware breakpoints, even software ones: patching a BRK into code needs write access, which the host of a
protected guest lacks, and cache maintenance. So the CPU's registers limit their number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from pyvmm.debug.errors import EINVAL, ENOSPC, Refused
from pyvmm.errors import hex_
from pyvmm.uapi.kvm_arm64_vcpu import KVM_ARM_MAX_DBG_REGS, kvm_guest_debug_arch

_ENABLE: Final = 1 << 0
_EL1_AND_EL0: Final = 0b11 << 1
_WHOLE_WORD: Final = 0b1111 << 5
_LOAD_STORE_SHIFT: Final = 3
_BYTES_SHIFT: Final = 5
_MASK_SHIFT: Final = 24
_DOUBLEWORD: Final = 8
_MOST_MASKED: Final = 1 << 31


class Kind(IntEnum):
    """The number after Z and z."""

    SOFTWARE = 0
    HARDWARE = 1
    WRITE = 2
    READ = 3
    ACCESS = 4


_LOAD_STORE: Final = {Kind.WRITE: 0b10, Kind.READ: 0b01, Kind.ACCESS: 0b11}
REASON: Final = {
    Kind.SOFTWARE: "swbreak", Kind.HARDWARE: "hwbreak", Kind.WRITE: "watch", Kind.READ: "rwatch",
    Kind.ACCESS: "awatch",
}  # fmt: skip
"""Its name in a stop reply."""


@dataclass(frozen=True, slots=True)
class _Watch:
    kind: Kind
    address: int
    length: int

    @property
    def masked(self) -> bool:
        """Whether one register's address mask covers it, instead of 8 bytes per register."""
        return self.length > _DOUBLEWORD and self.length & self.length - 1 == 0 == self.address % self.length

    def pairs(self) -> list[tuple[int, int]]:
        """Return DBGWVR and DBGWCR of each register that it needs."""
        control = _ENABLE | _EL1_AND_EL0 | _LOAD_STORE[self.kind] << _LOAD_STORE_SHIFT
        if self.masked:
            mask = self.length.bit_length() - 1
            return [(self.address, control | 0xFF << _BYTES_SHIFT | mask << _MASK_SHIFT)]
        pairs = []
        at, end = self.address, self.address + self.length
        while at < end:
            base = at & -_DOUBLEWORD
            stop = min(end, base + _DOUBLEWORD)
            pairs.append((base, control | ((1 << stop - at) - 1 << at - base) << _BYTES_SHIFT))
            at = stop
        return pairs

    def distance(self, address: int) -> int:
        """Return the distance in bytes between ``address`` and the watched range."""
        return max(self.address - address, address - (self.address + self.length - 1), 0)


@dataclass
class Breakpoints:
    """The current breakpoints, for ``breaks`` breakpoint and ``watches`` watchpoint registers."""

    breaks: int
    watches: int
    _breaks: dict[int, set[Kind]] = field(default_factory=dict)
    _watches: list[_Watch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.breaks = min(self.breaks, KVM_ARM_MAX_DBG_REGS)
        self.watches = min(self.watches, KVM_ARM_MAX_DBG_REGS)

    def __bool__(self) -> bool:
        return bool(self._breaks or self._watches)

    def insert(self, kind: Kind, address: int, length: int) -> None:
        """Set one. Idempotent. Raises Refused if the registers cannot hold it, or all are in use."""
        if kind not in _LOAD_STORE:
            if address % 4:
                raise Refused(EINVAL, f"a breakpoint at {hex_(address)}: instructions are at multiples of 4")
            if address not in self._breaks and len(self._breaks) >= self.breaks:
                raise Refused(ENOSPC, f"all {self.breaks} breakpoint registers of the CPU are in use")
            self._breaks.setdefault(address, set()).add(kind)
            return
        watch = _Watch(kind, address, length)
        if watch in self._watches:
            return
        if not 0 < length <= (_MOST_MASKED if watch.masked else _DOUBLEWORD * self.watches):
            raise Refused(
                EINVAL,
                f"{length} bytes at {hex_(address)} cannot be watched: where {self.watches} times "
                f"{_DOUBLEWORD} bytes are too few, it must be an aligned power of two",
            )
        if sum(len(each.pairs()) for each in [*self._watches, watch]) > self.watches:
            raise Refused(
                ENOSPC,
                f"{length} bytes at {hex_(address)}: the CPU has {self.watches} watchpoint registers, for 8 aligned "
                f"bytes each, and {len(self._watches)} watchpoints are set",
            )
        self._watches.append(watch)

    def remove(self, kind: Kind, address: int, length: int) -> None:
        """Remove one, if it is set."""
        if kind in _LOAD_STORE:
            self._watches = [each for each in self._watches if each != _Watch(kind, address, length)]
            return
        kinds = self._breaks.get(address, set())
        kinds.discard(kind)
        if not kinds:
            self._breaks.pop(address, None)

    def clear(self) -> None:
        """Remove all."""
        self._breaks.clear()
        self._watches.clear()

    def registers(self) -> kvm_guest_debug_arch:
        """Return the registers for KVM_SET_GUEST_DEBUG."""
        arch = kvm_guest_debug_arch()
        for number, address in enumerate(self._breaks):
            arch.dbg_bvr[number], arch.dbg_bcr[number] = address, _ENABLE | _EL1_AND_EL0 | _WHOLE_WORD
        pairs = [pair for watch in self._watches for pair in watch.pairs()]
        for number, (value, control) in enumerate(pairs):
            arch.dbg_wvr[number], arch.dbg_wcr[number] = value, control
        return arch

    def at(self, pc: int) -> Kind | None:
        """Return the kind of the breakpoint at ``pc``."""
        return min(self._breaks.get(pc, ()), default=None)

    def watching(self, address: int) -> tuple[Kind, int] | None:
        """Return the watchpoint that a reported access at ``address`` has hit: its kind, and a watched address.

        The CPU may report an access's start outside of the watched range.
        """
        if not self._watches:
            return None
        watch = min(self._watches, key=lambda each: each.distance(address))
        return watch.kind, address if not watch.distance(address) else watch.address
