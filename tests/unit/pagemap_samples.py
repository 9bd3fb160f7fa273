# SPDX-License-Identifier: Apache-2.0
"""Page maps for tests: a strategy for arbitrary ones, and one with every possible entry."""

from __future__ import annotations

from hypothesis import strategies as st

from pyvmm.memory.ledger import ASSUMED, PageState
from pyvmm.observe.pagemap import PageMap

BASE = 0x8000_0000
PAGE = 4096
ENTRIES = [state | bit for state in PageState for bit in (0, ASSUMED)]

EVERY_ENTRY = PageMap.from_runs([(BASE + index * 64 * PAGE, 64, entry) for index, entry in enumerate(ENTRIES)])


@st.composite
def page_maps(draw: st.DrawFn, most: int = 12) -> PageMap:
    """Draw any map: areas of any size, near and far, up to the end of guest addresses."""
    pages = st.one_of(st.integers(1, 9), st.integers(1, 1 << 20))
    gaps = st.one_of(st.just(0), st.integers(0, 300), st.integers(0, 1 << 44))
    runs, page = [], draw(gaps)
    for gap, size, entry in draw(st.lists(st.tuples(gaps, pages, st.sampled_from(ENTRIES)), max_size=most)):
        page += gap
        runs.append((page * PAGE, size, entry))
        page += size
    return PageMap.from_runs(runs)
