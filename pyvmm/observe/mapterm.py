# SPDX-License-Identifier: Apache-2.0
"""Draw a page map with characters: coloured half blocks for a terminal, letters otherwise.

Only makes lines of text. The caller decides about colours.
"""

from __future__ import annotations

from typing import Final

from pyvmm.errors import hex_
from pyvmm.memory.ledger import PageState
from pyvmm.observe.grid import LOOKS, NOTHING, Block, Grid, size, tally, words
from pyvmm.observe.pagemap import PageMap

LETTERS: Final = {
    PageState.ABSENT: ".", PageState.HOST: "H", PageState.PRIVATE: "P", PageState.SHARED: "S", PageState.HOLE: "O",
    PageState.POISONED: "X",
}  # fmt: skip
"""Upper case is known, lower case assumed."""

COLOURS: Final = {
    PageState.ABSENT: (240, 237), PageState.HOST: (117, 67), PageState.PRIVATE: (32, 24),
    PageState.SHARED: (214, 136), PageState.HOLE: (36, 23), PageState.POISONED: (202, 130),
}  # fmt: skip
"""Of xterm's 256, near Okabe and Ito's: known, and, dimmed, assumed."""

_RESET: Final = "\x1b[0m"
_LEAST_COLUMNS = 8


def render(page_map: PageMap, *, width: int = 80, height: int = 24, colour: bool = False) -> list[str]:
    """Return the map and its legend as at most ``height`` lines (never fewer than the legend and one) of ``width``."""
    if not page_map.pages:
        return ["no guest memory"]
    legend = _legend(page_map, width, colour)
    columns, indent = _columns(page_map, width)
    # Whether the scale needs saying of depends on it: two lines are kept for what follows the counts.
    grid = Grid.fit(page_map.areas, columns=columns, lines=height - len(legend) - 2, rows_in_line=2 if colour else 1)
    lines: list[str] = []
    for block, cells in zip(grid.blocks, grid.levels(page_map), strict=True):
        if block.gap:
            lines.append(f"{'':{indent}} ~ {size(block.gap)} without memory ~")
        lines += _block(grid, block, cells, indent, colour)
    return [*lines, *legend, *_notes(page_map, grid, colour)]


def _columns(page_map: PageMap, width: int) -> tuple[int, int]:
    """Return how many cells a row has room for, a power of two, and how wide the addresses before it are."""
    indent = len(hex_(page_map.runs[-1].end - 1))
    columns = _LEAST_COLUMNS
    while columns * 2 + indent + 1 <= width:
        columns *= 2
    return columns, indent


def _block(grid: Grid, block: Block, cells: bytearray, indent: int, colour: bool) -> list[str]:
    step = 2 if colour else 1
    lines = []
    for row in range(0, block.rows, step):
        upper = cells[row * grid.columns : (row + 1) * grid.columns]
        lower = cells[(row + 1) * grid.columns : (row + 2) * grid.columns].ljust(grid.columns, bytes([NOTHING]))
        text = _half_blocks(upper, lower) if colour else "".join(map(_letter, upper)).rstrip()
        lines.append(f"{hex_(block.start + row * grid.row_bytes):>{indent}} {text}")
    return lines


def _letter(level: int) -> str:
    look = LOOKS[level]
    if look is None:
        return " "
    return LETTERS[look.state].lower() if look.assumed else LETTERS[look.state]


def _half_blocks(upper: bytes | bytearray, lower: bytes | bytearray) -> str:
    text, last = [], (NOTHING, NOTHING)
    for above, below in zip(upper, lower, strict=True):
        if (above, below) != last:
            last = above, below
            text.append(_RESET + _ink(above, 38) + _ink(below, 48) if above else _RESET + _ink(below, 38))
        text.append("▀" if above else "▄" if below else " ")
    return "".join(text) + _RESET


def _ink(level: int, layer: int) -> str:
    look = LOOKS[level]
    return "" if look is None else f"\x1b[{layer};5;{COLOURS[look.state][look.assumed]}m"


def _legend(page_map: PageMap, width: int, colour: bool) -> list[str]:
    """Return what each look means and how many pages have it, in as few lines as it takes."""
    lines, room = [""], 0
    for text, shown in _items(page_map, colour):
        if lines[-1] and len(text) + 2 > room:
            lines.append("")
        if not lines[-1]:
            room = width - len(text)
            lines[-1] = shown
        else:
            room -= len(text) + 2
            lines[-1] += f"  {shown}"
    return lines


def _items(page_map: PageMap, colour: bool) -> list[tuple[str, str]]:
    """Return each item of the legend as it counts for width, and as it is printed."""
    items = []
    for level, pages in tally(page_map):
        said = f"{words(level)} {pages:,}"
        mark = f"{_ink(level, 38)}██{_RESET}" if colour else _letter(level)
        items.append((f"{'xx' if colour else mark} {said}", f"{mark} {said}"))
    return items


def _notes(page_map: PageMap, grid: Grid, colour: bool) -> list[str]:
    notes = [grid.scale()]
    if any(run.assumed for run in page_map.runs):
        notes.append(f"{'dim' if colour else 'lower case'} = assumed: the kernel does not tell")
    return notes
