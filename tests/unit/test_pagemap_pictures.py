# SPDX-License-Identifier: Apache-2.0
"""Pictures of a page map: the same grid as letters, as half blocks, and as SVG."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.memory.ledger import ASSUMED, PageState
from pyvmm.observe import mapsvg
from pyvmm.observe.grid import LOOKS, NOTHING, Grid, size, tally, words
from pyvmm.observe.mapsvg import svg_defs, svg_map, svg_steps
from pyvmm.observe.mapterm import LETTERS, render
from pyvmm.observe.pagemap import PageMap
from tests.unit.pagemap_samples import BASE, ENTRIES, EVERY_ENTRY, PAGE, page_maps

SVG = "{http://www.w3.org/2000/svg}"
TOP = 1 << 40
FAR_APART = PageMap.from_runs(
    [(0x1000, 3, PageState.HOST), (BASE, 1024, PageState.PRIVATE), (TOP - 5 * PAGE, 5, 3), (TOP, 2, 5)]
)


# -- the grid


@given(page_maps(), st.sampled_from([8, 32, 64]), st.integers(1, 64), st.integers(1, 2))
def test_the_grid_shows_all_memory_and_fits_its_lines(
    page_map: PageMap, columns: int, lines: int, rows_in_line: int
) -> None:
    grid = Grid.fit(page_map.areas, columns=columns, lines=lines, rows_in_line=rows_in_line)
    assert sum(-(-b.rows // rows_in_line) for b in grid.blocks) + max(len(grid.blocks) - 1, 0) <= lines
    for block, following in pairwise(grid.blocks):
        assert block.start + block.rows * grid.row_bytes < following.start
        assert following.gap > 0
    assert all(block.start % grid.row_bytes == 0 for block in grid.blocks)
    levels = grid.levels(page_map)
    for run in page_map.runs:
        for gpa in (run.gpa, run.end - PAGE):
            [(block, cells)] = [
                pair
                for pair in zip(grid.blocks, levels, strict=True)
                if pair[0].start <= gpa < pair[0].start + pair[0].rows * grid.row_bytes
            ]
            look = LOOKS[cells[(gpa - block.start) >> grid.shift]]
            assert look is not None
            assert (look.state, look.assumed) >= (run.state, run.assumed)


@given(page_maps(most=6))
def test_a_cell_shows_only_the_most_important_of_its_pages(page_map: PageMap) -> None:
    grid = Grid.fit(page_map.areas, columns=8, lines=4)
    for block, cells in zip(grid.blocks, grid.levels(page_map), strict=True):
        for index, level in enumerate(cells):
            start = block.start + (index << grid.shift)
            inside = [run for run in page_map.runs if run.gpa < start + (1 << grid.shift) and run.end > start]
            most = max(((run.state, run.assumed) for run in inside), default=None)
            assert LOOKS[level] == most


def test_a_cell_has_one_page_of_small_memory_and_more_of_large_memory() -> None:
    def cell_pages(mib: int) -> int:
        return Grid.fit([(BASE, BASE + (mib << 20))], columns=64, lines=64).cell_pages

    assert [cell_pages(mib) for mib in (4, 16, 17, 64, 1024, 1 << 20)] == [1, 1, 2, 4, 64, 1 << 17]


def test_marks_are_at_the_cells_of_their_pages() -> None:
    grid = Grid.fit([(BASE, BASE + 128 * PAGE)], columns=64, lines=64)
    [marks] = grid.marks([(BASE + 3 * PAGE, 2), (BASE + 64 * PAGE, 1)])
    assert [index for index, mark in enumerate(marks) if mark] == [3, 4, 64]


def test_the_tally_has_the_states_that_occur_and_adds_up() -> None:
    assert [pages for _, pages in tally(EVERY_ENTRY)] == [64] * len(ENTRIES)
    assert words(tally(PageMap.from_runs([(0, 1, PageState.PRIVATE | ASSUMED)]))[0][0]) == "private, assumed"
    assert LOOKS[NOTHING] is None


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 bytes"), (4096, "4 KiB"), (3 << 19, "1.5 MiB"), (1 << 40, "1 TiB"), (1 << 64, "16 EiB")]
)
def test_sizes_are_legible(number: int, said: str) -> None:
    assert size(number) == said


# -- the terminal


def plain(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def test_every_state_has_a_distinct_letter_in_lower_case_if_assumed() -> None:
    rows = render(EVERY_ENTRY)[: len(ENTRIES)]
    for entry, row in zip(ENTRIES, rows, strict=True):
        letter = LETTERS[PageState(entry & ~ASSUMED)]
        assert row.split() == [row.split()[0], (letter.lower() if entry & ASSUMED else letter) * 64]
    assert len({letter.lower() for letter in LETTERS.values()}) == len(LETTERS)
    text = "\n".join(render(EVERY_ENTRY))
    assert "lower case = assumed: the kernel does not tell" in text
    assert "p private, assumed 64" in text
    assert "1 cell = 1 page (4 KiB)" in text


def test_a_coloured_map_has_two_rows_in_a_line_and_dims_assumed_states() -> None:
    lines = render(EVERY_ENTRY, colour=True)
    assert [plain(line) for line in lines[:6]] == [f"0x80{row * 8:02x}_0000 {'▀' * 64}" for row in range(6)]
    assert "38;5;32m" in lines[2]
    assert "48;5;24m" in lines[2]
    assert all(line.endswith("\x1b[0m") for line in lines[:6])
    assert "dim = assumed: the kernel does not tell" in lines


def test_an_odd_number_of_rows_ends_with_upper_halves() -> None:
    three = PageMap.from_runs([(BASE, 130, PageState.HOST)])
    assert plain(render(three, colour=True)[1]).split() == ["0x8008_0000", "▀▀"]


def test_gaps_are_written_and_not_drawn() -> None:
    lines = render(FAR_APART)
    assert [line.strip() for line in lines if "without" in line] == [
        "~ 2 GiB without memory ~",
        "~ 1022 GiB without memory ~",
    ]
    assert "0x100_0000_0000 XX" in lines
    assert lines[0].split() == ["0x0", "HHH"]


def test_the_map_of_no_memory_says_so() -> None:
    assert render(PageMap()) == ["no guest memory"]
    assert "no guest memory" in svg_map(PageMap())
    assert "no guest memory" in svg_steps([("nothing", PageMap())])
    assert "no guest memory" in svg_steps([])


@given(page_maps(), st.integers(40, 200), st.integers(8, 60), st.booleans())
def test_a_map_keeps_within_its_lines_and_its_legend_counts_every_page(
    page_map: PageMap, width: int, height: int, colour: bool
) -> None:
    lines = [plain(line) for line in render(page_map, width=width, height=height, colour=colour)]
    legend = sum(1 for line in lines if "~" not in line and not line.lstrip().startswith("0x"))
    assert len(lines) <= max(height, legend + 1)
    assert all(len(line) <= max(width, 84) for line in lines)
    # A count has a name before it; "1 cell = ..." does not.
    counted = re.findall(r"(?:absent|host|private|shared|hole|poisoned)(?:, assumed)? ([\d,]+)", "\n".join(lines))
    assert sum(int(count.replace(",", "")) for count in counted) == page_map.pages


# -- SVG


def ids(root: ET.Element) -> list[str]:
    return [found.attrib["id"] for found in root.iter() if "id" in found.attrib]


def test_the_document_shows_every_state_with_a_pattern_and_a_count() -> None:
    root = ET.fromstring(svg_map(EVERY_ENTRY, "Guest <memory> & more").encode())
    assert root.tag == f"{SVG}svg"
    assert root.find(f"{SVG}title").text == "Guest <memory> & more"  # type: ignore[union-attr]
    assert len(ids(root)) == len(set(ids(root))) == len(ENTRIES)
    used = {fill for element in root.iter() if (fill := element.attrib.get("fill", "")).startswith("url")}
    assert {re.match(r"url\(#(.*)\) #", fill)[1] for fill in used} == set(ids(root))  # type: ignore[index]
    text = [element.text or "" for element in root.iter(f"{SVG}text")]
    for level, _ in tally(EVERY_ENTRY):
        assert f"{words(level)} 64" in text
    assert mapsvg.ASSUMED_NOTE in text
    assert "1 cell = 1 page (4 KiB)" in text


def test_the_document_loads_nothing_and_runs_no_script() -> None:
    text = svg_steps([("a step", EVERY_ENTRY), ("another", FAR_APART)])
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    for word in ("<script", "@font-face", "<style", "href", "<image"):
        assert word not in text


def test_known_states_are_not_called_assumed() -> None:
    known = PageMap.from_runs([(BASE, 4, PageState.HOST)])
    assert "assumed" not in svg_map(known, inline=True)
    assert "assumed" not in "".join(render(known))


@pytest.mark.parametrize("page_map", [EVERY_ENTRY, FAR_APART, PageMap()])
def test_notebook_shows_a_map_as_its_picture(page_map: PageMap) -> None:
    shown = page_map._repr_svg_()
    assert ET.fromstring(shown.encode()).tag == f"{SVG}svg"
    assert shown == svg_map(page_map)
    assert ("no guest memory" in shown) is (not page_map.pages)


def test_inline_pictures_carry_no_ids_and_the_page_has_the_patterns_once() -> None:
    pictures = [svg_map(EVERY_ENTRY, inline=True), svg_steps([("a", EVERY_ENTRY)] * 2, inline=True)]
    page = ET.fromstring("<body>" + svg_defs() + "".join(pictures) + "</body>")
    assert len(ids(page)) == len(set(ids(page))) == len(ENTRIES)
    for picture in pictures:
        assert not picture.startswith("<?xml")
        assert "id=" not in picture


def test_runs_of_cells_are_one_shape_with_a_tooltip_each() -> None:
    page_map = PageMap.from_runs([(BASE, 1000, PageState.HOST), (BASE + 1000 * PAGE, 24, PageState.SHARED)])
    text = svg_map(page_map, inline=True)
    assert text.count("<path d=") == 2 + text.count('<path d="M0 0h16')
    assert "<title>[0x8000_0000, 0x803e_8000) host</title>" in text
    assert "<title>[0x803e_8000, 0x8040_0000) shared</title>" in text


def test_a_picture_of_chequered_memory_stays_small() -> None:
    chequered = PageMap.from_runs([(BASE + index * PAGE, 1, 2 + index % 2) for index in range(4096)])
    assert len(svg_map(chequered, inline=True)) < 120_000
    assert len(svg_map(PageMap.from_runs([(BASE, 1 << 18, 2)]), inline=True)) < 3000


def test_steps_share_one_grid_and_outline_the_changes() -> None:
    first = PageMap.from_runs([(BASE, 64, PageState.PRIVATE | ASSUMED)])
    second = PageMap.from_runs([(BASE, 63, PageState.PRIVATE | ASSUMED), (BASE + 63 * PAGE, 1, PageState.SHARED)])
    third = PageMap.from_runs([*second.runs, (TOP, 1, PageState.HOLE)])
    root = ET.fromstring(svg_steps([("one", first), ("two & more", second), ("three", third)]).encode())
    text = [element.text for element in root.iter(f"{SVG}text")]
    assert [line for line in text if line and re.match(r"\d\. ", line)] == ["1. one", "2. two & more", "3. three"]
    outlines = [path.attrib["d"] for path in root.iter(f"{SVG}path") if path.attrib.get("fill") == "none"]
    assert outlines == ["M248 8H256V16H248z", "M0 0H8V8H0z"]
    assert text.count("~ 1022 GiB without memory ~") == 3
    assert "shared 1, private assumed 63" in text
    assert "outlined = changed since the step before" in text
    assert "outlined" not in svg_steps([("one", first)])


@given(page_maps(), page_maps())
def test_any_map_makes_a_well_formed_picture_within_its_box(before: PageMap, after: PageMap) -> None:
    for text in (svg_map(after), svg_steps([("before", before), ("after", after)])):
        root = ET.fromstring(text.encode())
        width = float(root.attrib["width"])
        assert root.attrib["viewBox"].split()[2] == root.attrib["width"]
        assert width < 1300
