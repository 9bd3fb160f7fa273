# SPDX-License-Identifier: Apache-2.0
"""The walk of a guest's page tables, over tables built here in bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.debug.stage1 import Regime, Untranslated, translate

TG0 = {12: 0b00, 14: 0b10, 16: 0b01}
TG1 = {12: 0b10, 14: 0b01, 16: 0b11}
MMU_ON = 1
ROOT = 0x8000_0000
DS = 1 << 59
IPS_52 = 6 << 32


class Tables:
    """Page tables in a sparse memory, built as an operating system builds them."""

    def __init__(self, granule: int, bits: int, tcr: int = 0) -> None:
        self.granule, self.bits = granule, bits
        self.memory: dict[int, int] = {}
        self.next = ROOT + (1 << granule)
        size = 64 - bits
        self.regime = Regime(
            MMU_ON, tcr | TG0[granule] << 14 | TG1[granule] << 30 | size << 16 | size, ROOT, ROOT | 0x42 << 48
        )

    def levels(self) -> list[int]:
        """Return each level's shift, the first one's first."""
        stride = self.granule - 3
        count = -(-(self.bits - self.granule) // stride)
        return [self.granule + stride * n for n in reversed(range(count))]

    def map(self, va: int, leaf: int, depth: int = 0) -> None:
        """Map ``va`` to ``leaf``, ``depth`` levels above the last one."""
        table = ROOT
        shifts = self.levels()
        for shift in shifts:
            width = self.bits - shift if shift == shifts[0] else self.granule - 3
            at = table + 8 * (va >> shift & (1 << width) - 1)
            if shift == shifts[-1 - depth]:
                self.memory[at] = leaf
                return
            if at not in self.memory:
                self.memory[at] = self.next | 3
                self.next += 1 << self.granule
            table = self.memory[at] & -(1 << self.granule)

    def read(self, gpa: int) -> int:
        return self.memory.get(gpa, 0)

    def go(self, va: int) -> tuple[int, int]:
        found = translate(va, self.regime, self.read)
        return found.gpa, found.size


def test_addresses_are_physical_with_the_mmu_off() -> None:
    found = translate(0x8008_0123, Regime(0x30D0_0800, 0, 0, 0), lambda _: 0)
    assert (found.gpa, found.size) == (0x8008_0123, 4096)


@pytest.mark.parametrize(("granule", "bits"), [(12, 39), (12, 48), (12, 25), (14, 47), (14, 36), (16, 48), (16, 42)])
@pytest.mark.parametrize("upper", [False, True])
@given(data=st.data())
def test_every_granule_maps_pages_in_both_halves(granule: int, bits: int, upper: bool, data: st.DataObject) -> None:
    tables = Tables(granule, bits)
    va = data.draw(st.integers(0, (1 << bits) - 1))
    pa = data.draw(st.integers(0, (1 << 48 - granule) - 1)) << granule
    va |= (1 << 64) - (1 << bits) if upper else 0
    attributes = 0x0060_0000_0000_0F03
    tables.map(va, pa | attributes)
    assert tables.go(va) == (pa | va & (1 << granule) - 1, 1 << granule)
    with pytest.raises(Untranslated, match="is not mapped"):
        tables.go(va ^ 1 << granule)


@pytest.mark.parametrize(
    ("granule", "depth", "size"), [(12, 1, 2 << 20), (12, 2, 1 << 30), (14, 1, 32 << 20), (16, 1, 512 << 20)]
)
def test_blocks_reach_as_far_as_their_level(granule: int, depth: int, size: int) -> None:
    tables = Tables(granule, 39 if granule == 12 else 42)
    va = 0x11_2345_6789
    tables.map(va, 0x40_0000_0000 | 0x701, depth)
    assert tables.go(va) == (0x40_0000_0000 + va % size, size)


def test_a_block_at_an_invalid_level_and_a_reserved_page_map_nothing() -> None:
    tables = Tables(12, 48)
    tables.map(0x1000, 0x40_0000_0701, 3)
    with pytest.raises(Untranslated, match="block at level 0"):
        tables.go(0x1000)
    tables = Tables(12, 39)
    tables.map(0x1000, 0x40_0000_0701)
    with pytest.raises(Untranslated, match=r"is not mapped: .*at level 3"):
        tables.go(0x1000)


def test_output_addresses_may_have_52_bits() -> None:
    tables = Tables(16, 48, IPS_52)
    tables.map(0x12_3456_7000, 0x0000_1234_5670_A003)
    assert tables.go(0x12_3456_7000) == (0xA_1234_5670_7000, 1 << 16)
    tables = Tables(12, 52, DS)
    tables.map(0x1_2345_6000, 0x2_0000_0000_0303 | 0x5000)
    assert tables.go(0x1_2345_6000) == (0xE_0000_0000_5000, 4096)
    assert Tables(12, 52, DS).levels()[0] == 48  # a walk that starts at level -1


def test_top_bytes_are_ignored_if_the_guest_enables_that() -> None:
    tables = Tables(12, 39)
    tables.map(0x1000, 0x9000_0003)
    with pytest.raises(Untranslated, match="outside the 39 bits"):
        tables.go(0xAB00_0000_0000_1000)
    tables.regime = replace(tables.regime, tcr=tables.regime.tcr | 1 << 37)
    assert tables.go(0xAB00_0000_0000_1004)[0] == 0x9000_0004


def test_a_disabled_half_maps_nothing() -> None:
    tables = Tables(12, 39, 1 << 23)
    with pytest.raises(Untranslated, match=r"TTBR1_EL1 are off"):
        tables.go(0xFFFF_FFFF_FFFF_0000)


@given(st.integers(0, 2**64 - 1), *[st.integers(0, 2**64 - 1)] * 3, st.integers(0, 2**64 - 1))
def test_the_walk_ends_whatever_the_guests_registers_and_tables(
    va: int, tcr: int, ttbr0: int, ttbr1: int, entry: int
) -> None:
    reads = []

    def read(gpa: int) -> int:
        reads.append(gpa)
        return entry

    try:
        found = translate(va, Regime(MMU_ON, tcr, ttbr0, ttbr1), read)
    except Untranslated:
        return
    finally:
        assert len(reads) <= 5
        assert all(0 <= gpa < 1 << 52 and gpa % 8 == 0 for gpa in reads)
    assert 0 <= found.gpa < 1 << 52
