# SPDX-License-Identifier: Apache-2.0
"""Draw page maps as SVG: one, or one for each step of an experiment, with changes outlined.

Colours are Okabe and Ito's. Each state also has its own mark, so the map is readable without colours. Assumed states
are hatched. :func:`svg_steps` makes a document. With ``inline`` it makes an element for an HTML page, which must hold
:func:`svg_defs` once: the picture itself carries no ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from pyvmm.errors import hex_
from pyvmm.memory.address import span
from pyvmm.memory.ledger import PageState
from pyvmm.observe import svg
from pyvmm.observe.grid import LOOKS, NOTHING, Block, Grid, size, tally, words
from pyvmm.observe.pagemap import PageMap, stretches
from pyvmm.observe.svg import FAINT, INK, LINE, TEXT, Drawing, num
from pyvmm.pages import HOST_PAGE

CELL: Final = 8
"""Pixels of a cell's side, its margin included."""

FILLS: Final = {
    PageState.ABSENT: "#DDDDDD", PageState.HOST: "#56B4E9", PageState.PRIVATE: "#0072B2", PageState.SHARED: "#E69F00",
    PageState.HOLE: "#009E73", PageState.POISONED: "#D55E00",
}  # fmt: skip
_MARKS: Final = {
    PageState.ABSENT: '<path d="M3 3h1v1h-1z" fill="#888888"/>',
    PageState.HOST: "",
    PageState.PRIVATE: "",
    PageState.SHARED: '<path d="M2 2h3v3h-3z" fill="#000000"/>',
    PageState.HOLE: '<path d="M2 2h3v3h-3z" fill="#FFFFFF"/>',
    PageState.POISONED: '<path d="M1 1l5 5M6 1l-5 5" stroke="#FFFFFF" stroke-width="1.4"/>',
}
_HATCH: Final = '<path d="M0 3.5L3.5 0M0 7L7 0M3.5 7L7 3.5" stroke="#FFFFFF" stroke-width="0.9"/>'

COLUMNS, ROWS = 64, 64
STEP_COLUMNS, STEP_ROWS = 32, 32
STEPS_WIDTH, STEP_GAP = 1100, 28
LABEL_EVERY: Final = 4
SMALL: Final = 10
GAP: Final = 18
"""Pixels of a gap between two blocks of rows."""
TITLES: Final = 256
"""With more runs of cells than this a picture has no tooltips."""
ASSUMED_NOTE: Final = "hatched = assumed: the kernel does not tell"


def svg_steps(steps: Sequence[tuple[str, PageMap]], title: str = "", *, inline: bool = False) -> str:
    """Draw a map for each step, (its title, the map after it), with cells outlined that changed since the last."""
    return svg.finish(draw_steps(steps, title), title or "Guest memory", definitions=patterns(), inline=inline)


def svg_defs() -> str:
    """Return what the cells of all inline pictures refer to: an element that takes no room, needed once a page."""
    return f'<svg width="0" height="0" style="position:absolute" aria-hidden="true">{patterns()}</svg>'


def patterns() -> str:
    """Return the definitions that :func:`draw_map` and :func:`draw_steps` need in a document."""
    found = "".join(
        f'<pattern id="{_name(level)}" width="{CELL}" height="{CELL}" patternUnits="userSpaceOnUse">'
        f'<path d="M0 0h7v7h-7z" fill="{FILLS[look.state]}"/>{_HATCH if look.assumed else ""}{_MARKS[look.state]}'
        "</pattern>"
        for level, look in enumerate(LOOKS)
        if look is not None
    )
    return f"<defs>{found}</defs>"


def _name(level: int) -> str:
    return "pyvmm-" + words(level).replace(", ", "-")


def _fill(level: int) -> str:
    look = LOOKS[level]
    # The colour alone, where a page has forgotten the patterns.
    return "none" if look is None else f"url(#{_name(level)}) {FILLS[look.state]}"


# -- one map


def svg_map(page_map: PageMap, title: str = "Guest memory", *, inline: bool = False) -> str:
    """Draw one map with its legend, as :func:`svg_steps` draws several."""
    return svg.finish(draw_map(page_map, title), title, definitions=patterns(), inline=inline)


def draw_map(page_map: PageMap, title: str, *, outlined: Iterable[int] = (), note: str = "") -> Drawing:
    """Draw one map with its title and legend, with outlines around the pages ``outlined``, which ``note`` explains."""
    if not page_map.pages:
        return svg.stack([svg.heading(title), Drawing(200, LINE, svg.text(0, TEXT, "no guest memory", fill=FAINT))], 4)
    grid = Grid.fit(page_map.areas, columns=COLUMNS, lines=ROWS)
    picture = _picture(grid, page_map, labels=True, changed=[(gpa, 1) for gpa in sorted(set(outlined))])
    said = f"{page_map.pages:,} pages, {size(page_map.pages * HOST_PAGE)}"
    notes = [grid.scale(), *([note] if note else [])]
    legend = _legend(tally(page_map), notes, max(picture.width, 480))
    return svg.stack([svg.heading(title, said), picture, legend], 10)


def _picture(grid: Grid, page_map: PageMap, *, labels: bool, changed: Sequence[tuple[int, int]] = ()) -> Drawing:
    """Draw the cells, with addresses before the rows, and outlines around those that hold a changed page."""
    indent = _indent(grid) if labels else 0.0
    parts, y = [], 0.0
    marks = grid.marks(changed)
    titled = sum(1 for cells in grid.levels(page_map) for _ in stretches(cells)) <= TITLES
    for block, cells, mark in zip(grid.blocks, grid.levels(page_map), marks, strict=True):
        if block.gap:
            parts.append(svg.text(indent, y + 12, f"~ {size(block.gap)} without memory ~", size=SMALL, fill=FAINT))
            y += GAP
        if labels:
            parts += _labels(grid, block, indent - 6, y)
        body = _shapes(grid, block, cells, titled) + _outlines(grid, mark)
        parts.append(f'<g transform="translate({num(indent)} {num(y)})">{body}</g>')
        y += block.rows * CELL
    return Drawing(indent + grid.columns * CELL, y, "".join(parts))


def _indent(grid: Grid) -> float:
    last = grid.blocks[-1]
    return svg.advance(hex_(last.start + last.rows * grid.row_bytes), SMALL) + 8


def _labels(grid: Grid, block: Block, x: float, y: float) -> list[str]:
    return [
        svg.text(
            x, y + row * CELL + 7.5, hex_(block.start + row * grid.row_bytes), size=SMALL, fill=FAINT, anchor="end"
        )
        for row in range(0, block.rows, LABEL_EVERY)
    ]


def _shapes(grid: Grid, block: Block, cells: bytearray, titled: bool) -> str:
    """Draw each run of equal cells as one shape, those of a look together."""
    found: dict[int, list[str]] = {}
    for first, count, level in stretches(cells):
        if level == NOTHING:
            continue
        shape = _shape(first, count, grid.columns)
        if titled:
            where = span(block.start + (first << grid.shift), count << grid.shift)
            found.setdefault(level, []).append(f'<path d="{shape}">{svg.title(f"{where} {words(level)}")}</path>')
        else:
            found.setdefault(level, []).append(shape)
    if titled:
        return "".join(f'<g fill="{_fill(level)}">{"".join(paths)}</g>' for level, paths in found.items())
    return "".join(f'<path fill="{_fill(level)}" d="{"".join(shapes)}"/>' for level, shapes in found.items())


def _outlines(grid: Grid, marks: bytearray) -> str:
    shapes = "".join(_shape(first, count, grid.columns) for first, count, mark in stretches(marks) if mark)
    if not shapes:
        return ""
    # Where cells end in the paper's margin, half a pixel up and left runs around them evenly.
    return f'<path transform="translate(-.5 -.5)" d="{shapes}" fill="none" stroke="{INK}" stroke-width="1.6"/>'


def _shape(first: int, count: int, columns: int) -> str:
    """Draw around the cells ``first`` to ``first + count`` in the order of reading."""
    last = first + count - 1
    top, bottom = first // columns * CELL, (last // columns + 1) * CELL
    left, right = first % columns * CELL, (last % columns + 1) * CELL
    if bottom - top == CELL:
        return f"M{left} {top}H{right}V{bottom}H{left}z"
    return f"M{left} {top}H{columns * CELL}V{bottom - CELL}H{right}V{bottom}H0V{top + CELL}H{left}z"


def _legend(counts: Sequence[tuple[int, int]], notes: Sequence[str], width: float) -> Drawing:
    """Say what each look means, and of how many pages (0: not said)."""
    parts, x, y = [], 0.0, 0.0
    for level, pages in counts:
        said = f"{words(level)} {pages:,}" if pages else words(level)
        room = 2 * CELL + 4 + svg.advance(said)
        if x and x + room > width:
            x, y = 0.0, y + LINE + 3
        swatch = f'<path d="M0 0h{2 * CELL}v{2 * CELL}h-{2 * CELL}z" fill="{_fill(level)}"/>'
        parts.append(f'<g transform="translate({num(x)} {num(y)})">{swatch}</g>')
        parts.append(svg.text(x + 2 * CELL + 4, y + 12, said))
        x += room + 16
    y += LINE + 6
    if any(look is not None and look.assumed for look in (LOOKS[level] for level, _ in counts)):
        notes = [*notes, ASSUMED_NOTE]
    for note in notes:
        for line in svg.wrapped(note, width):
            parts.append(svg.text(0, y + TEXT, line, fill=FAINT))
            y += LINE
    return Drawing(width, y, "".join(parts))


# -- several


def draw_steps(steps: Sequence[tuple[str, PageMap]], title: str = "") -> Drawing:
    """Draw the maps of several steps beside each other, all over the same grid, with one legend."""
    head = [svg.heading(title)] if title else []
    areas = _union(area for _, page_map in steps for area in page_map.areas)
    if not areas:
        return svg.stack([*head, Drawing(200, LINE, svg.text(0, TEXT, "no guest memory", fill=FAINT))], 4)
    grid = Grid.fit(areas, columns=STEP_COLUMNS, lines=STEP_ROWS)
    indent, wide = _indent(grid), grid.columns * CELL
    a_line = max(int((STEPS_WIDTH - indent + STEP_GAP) / (wide + STEP_GAP)), 1)
    lines = []
    for start in range(0, len(steps), a_line):
        parts, x, height = [], indent, 0.0
        row = range(start, min(start + a_line, len(steps)))
        titles = [svg.wrapped(f"{number + 1}. {steps[number][0]}", wide) for number in row]
        head_lines = max(map(len, titles))
        for number, said in zip(row, titles, strict=True):
            panel = _step(grid, steps, number, said, head_lines, labels=number == start)
            parts.append(panel.at(x - (indent if number == start else 0), 0))
            x += wide + STEP_GAP
            height = max(height, panel.height)
        lines.append(Drawing(x - STEP_GAP, height, "".join(parts)))
    levels = sorted({level for _, page_map in steps for level, _ in tally(page_map)})
    notes = [grid.scale(), *(["outlined = changed since the step before"] if len(steps) > 1 else [])]
    width = max(480.0, *(line.width for line in lines))
    return svg.stack([*head, *lines, _legend([(level, 0) for level in levels], notes, width)], 14)


def _step(
    grid: Grid, steps: Sequence[tuple[str, PageMap]], number: int, title: Sequence[str], lines: int, *, labels: bool
) -> Drawing:
    """Draw one step: title, cells, counts."""
    page_map = steps[number][1]
    changes = page_map.diff(steps[number - 1][1]) if number else ()
    picture = _picture(grid, page_map, labels=labels, changed=[(change.gpa, change.pages) for change in changes])
    indent = _indent(grid) if labels else 0.0
    top = lines * LINE + 3
    parts = [svg.text(indent, (lines - len(title) + index) * LINE + TEXT, line) for index, line in enumerate(title)]
    parts.append(picture.at(0, top))
    y = top + picture.height + 3
    counts = ", ".join(f"{words(level).replace(',', '')} {pages:,}" for level, pages in reversed(tally(page_map)))
    for line in svg.wrapped(counts, grid.columns * CELL):
        parts.append(svg.text(indent, y + TEXT, line, fill=FAINT))
        y += LINE
    return Drawing(picture.width, y, "".join(parts))


def _union(areas: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, end in sorted(areas):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found
