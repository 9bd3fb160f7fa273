# SPDX-License-Identifier: Apache-2.0
"""The layout of a drawn page map: rows of cells from left to right, the same for a terminal and for SVG.

A cell is 2^n pages, with the smallest n that lets all memory fit. Rows start at multiples of their own size, as in a
hex dump. Rows without memory are left out, and the gap is labelled. Data only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from pyvmm.memory.ledger import ASSUMED, PageState
from pyvmm.observe.pagemap import PageMap
from pyvmm.pages import HOST_PAGE, HOST_PAGE_SHIFT

NOTHING: Final = 0
"""The level of a cell without memory."""


class CellLook(NamedTuple):
    """What a cell shows."""

    state: PageState
    assumed: bool


LOOKS: Final = (None, *(CellLook(state, assumed) for state in PageState for assumed in (False, True)))
"""The meaning of each level. A cell shows its page with the highest level: the last state in the order of ``PageState``
(absent, host, private, shared, hole, poisoned), and within a state the assumed one."""
_LEVELS: Final = {look.state | (ASSUMED if look.assumed else 0): level for level, look in enumerate(LOOKS) if look}


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows: the address of the first, their number, and the bytes without memory before them."""

    start: int
    rows: int
    gap: int


@dataclass(frozen=True, slots=True)
class Grid:
    """An arrangement of cells of ``1 << shift`` bytes, ``columns`` (a power of two) in a row."""

    columns: int
    shift: int
    blocks: tuple[Block, ...]

    @classmethod
    def fit(cls, areas: Sequence[tuple[int, int]], *, columns: int, lines: int, rows_in_line: int = 1) -> Grid:
        """Arrange ``areas`` (sorted, disjoint) so that they take no more than ``lines`` lines, a gap being one."""
        shift = HOST_PAGE_SHIFT
        while True:
            blocks = _blocks(areas, columns << shift)
            used = sum(-(-block.rows // rows_in_line) for block in blocks) + max(len(blocks) - 1, 0)
            if used <= max(lines, 1):
                return cls(columns, shift, blocks)
            shift += 1

    @property
    def cell_pages(self) -> int:
        """The number of pages of a cell."""
        return 1 << (self.shift - HOST_PAGE_SHIFT)

    @property
    def row_bytes(self) -> int:
        """The bytes of guest memory of a row."""
        return self.columns << self.shift

    def scale(self) -> str:
        """Return a text: the size of a cell, and what it shows."""
        pages = self.cell_pages
        cell = f"1 cell = {pages:,} page{'s' if pages > 1 else ''} ({size(pages * HOST_PAGE)})"
        return cell if pages == 1 else f"{cell}; the most telling state in a cell is shown"

    def levels(self, page_map: PageMap) -> list[bytearray]:
        """Return each block's cells, row after row, as an index into LOOKS."""
        return self._paint((run.gpa, run.end, _LEVELS[run.entry]) for run in page_map.runs)

    def marks(self, ranges: Iterable[tuple[int, int]]) -> list[bytearray]:
        """Return each block's cells: 1 where a page of ``ranges`` of (gpa, pages), sorted, is in it."""
        return self._paint((gpa, gpa + pages * HOST_PAGE, 1) for gpa, pages in ranges)

    def _paint(self, pieces: Iterable[tuple[int, int, int]]) -> list[bytearray]:
        cells = [bytearray(block.rows * self.columns) for block in self.blocks]
        starts = [block.start for block in self.blocks]
        for start, end, level in pieces:
            for index in range(max(bisect_right(starts, start) - 1, 0), bisect_right(starts, end - 1)):
                block, row = self.blocks[index], cells[index]
                first = max(start - block.start, 0) >> self.shift
                last = min((end - 1 - block.start) >> self.shift, len(row) - 1)
                if first > last:
                    continue
                # Pieces do not overlap: only the cells at a piece's ends can hold another's pages too.
                ends = max(row[first], level), max(row[last], level)
                row[first : last + 1] = bytes([level]) * (last + 1 - first)
                row[first] = max(row[first], ends[0])
                row[last] = max(row[last], ends[1])
        return cells


def _blocks(areas: Sequence[tuple[int, int]], row: int) -> tuple[Block, ...]:
    blocks: list[Block] = []
    end = 0
    for start, stop in areas:
        first, behind = start // row, -(-stop // row)
        if blocks and first <= blocks[-1].start // row + blocks[-1].rows:
            last = blocks.pop()
            blocks.append(Block(last.start, behind - last.start // row, last.gap))
        else:
            blocks.append(Block(first * row, behind - first, start - end if blocks else 0))
        end = stop
    return tuple(blocks)


def tally(page_map: PageMap) -> list[tuple[int, int]]:
    """Return (level, pages) of each look that occurs in a map, for its legend."""
    counts = page_map.counts()
    known = [(_LEVELS[state], count.pages - count.assumed) for state, count in counts.items()]
    assumed = [(_LEVELS[state | ASSUMED], count.assumed) for state, count in counts.items()]
    return sorted((level, pages) for level, pages in (*known, *assumed) if pages)


def words(level: int) -> str:
    """Name a look."""
    look = LOOKS[level]
    if look is None:
        return "no memory"
    return look.state.name.lower() + (", assumed" if look.assumed else "")


def size(number: int) -> str:
    """Write a number of bytes for a reader: ``4 KiB``, ``64 MiB``, ``1.9 GiB``."""
    for shift, unit in ((60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 1 << shift:
            return f"{number / (1 << shift):.1f}".removesuffix(".0") + f" {unit}"
    return f"{number} bytes"
