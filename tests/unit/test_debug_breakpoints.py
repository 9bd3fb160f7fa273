# SPDX-License-Identifier: Apache-2.0
"""Breakpoints and watchpoints as debug registers (DBGBCR and DBGWCR), and exceptions forwarded to the guest."""

from __future__ import annotations

import pytest

from pyvmm.debug.breakpoints import Breakpoints, Kind
from pyvmm.debug.errors import Refused
from pyvmm.debug.exception import handler_state, vector


def test_a_breakpoint_is_on_a_whole_instruction_at_el0_and_el1() -> None:
    points = Breakpoints(6, 4)
    points.insert(Kind.HARDWARE, 0xFFFF_8000_8000_1234, 4)
    registers = points.registers()
    assert (registers.dbg_bvr[0], registers.dbg_bcr[0], registers.dbg_bcr[1]) == (0xFFFF_8000_8000_1234, 0x1E7, 0)


@pytest.mark.parametrize(
    ("kind", "address", "length", "pairs"),
    [
        (Kind.WRITE, 0x1000, 8, [(0x1000, 0x1FF7)]),
        (Kind.READ, 0x1004, 4, [(0x1000, 0x1E0F)]),
        (Kind.ACCESS, 0x1003, 1, [(0x1000, 0x011F)]),
        (Kind.ACCESS, 0x1006, 4, [(0x1000, 0x181F), (0x1008, 0x007F)]),
        (Kind.WRITE, 0x2000, 4096, [(0x2000, 0x0C00_1FF7)]),
        (Kind.WRITE, 0x2008, 24, [(0x2008, 0x1FF7), (0x2010, 0x1FF7), (0x2018, 0x1FF7)]),
    ],
)
def test_a_watchpoint_takes_a_register_for_8_bytes_or_one_with_a_mask(
    kind: Kind, address: int, length: int, pairs: list[tuple[int, int]]
) -> None:
    points = Breakpoints(6, 4)
    points.insert(kind, address, length)
    registers = points.registers()
    assert [(registers.dbg_wvr[n], registers.dbg_wcr[n]) for n in range(len(pairs))] == pairs
    assert not any(registers.dbg_wcr[len(pairs) :])
    points.remove(kind, address, length)
    assert not points


def test_more_breakpoints_than_registers_are_refused() -> None:
    points = Breakpoints(2, 2)
    for address in (0, 4):
        points.insert(Kind.HARDWARE, address, 4)
    points.insert(Kind.SOFTWARE, 4, 4)  # this one shares a register
    with pytest.raises(Refused, match="all 2 breakpoint registers"):
        points.insert(Kind.SOFTWARE, 8, 4)
    points.remove(Kind.HARDWARE, 4, 4)
    assert points.at(4) is Kind.SOFTWARE
    points.insert(Kind.WRITE, 0, 8)
    with pytest.raises(Refused, match="2 watchpoint registers"):
        points.insert(Kind.WRITE, 12, 8)


@pytest.mark.parametrize(("address", "length"), [(0, 0), (8, 1 << 30), (0, 3 << 20), (0, 1 << 32), (1, 33)])
def test_a_watchpoint_that_no_register_can_watch_is_refused(address: int, length: int) -> None:
    with pytest.raises(Refused):
        Breakpoints(6, 4).insert(Kind.WRITE, address, length)


def test_a_breakpoint_between_instructions_is_refused() -> None:
    with pytest.raises(Refused, match="multiples of 4"):
        Breakpoints(6, 4).insert(Kind.HARDWARE, 0x1002, 4)


def test_the_nearest_watchpoint_is_reported_if_the_access_began_before_it() -> None:
    points = Breakpoints(6, 4)
    assert points.watching(0) is None
    points.insert(Kind.WRITE, 0x1000, 8)
    points.insert(Kind.READ, 0x2008, 8)
    assert points.watching(0x1004) == (Kind.WRITE, 0x1004)
    assert points.watching(0x2000) == (Kind.READ, 0x2008)


EL1H, EL1T, EL0, EL0_32 = 0b0101, 0b0100, 0b0000, 0b1_0000


def test_an_exception_enters_the_vector_for_its_source_level() -> None:
    assert [vector(state | 0x6000_03C0) for state in (EL1T, EL1H, EL0, EL0_32)] == [0, 0x200, 0x400, 0x600]


def test_a_handler_starts_at_el1_with_interrupts_masked_and_the_flags_unchanged() -> None:
    span, dssbs = 1 << 23, 1 << 44
    assert handler_state(0x6000_0000 | EL0, span) == 0x6000_03C5
    assert handler_state(0x8000_1000 | 1 << 21 | EL1H, 0) == 0x8040_03C5
    assert handler_state(EL0, span | dssbs) == 0x13C5
