# SPDX-License-Identifier: Apache-2.0
"""Page maps: made from a ledger, read back from triples, counted and compared."""

from __future__ import annotations

import json

import pytest
from hypothesis import given

from pyvmm.errors import UsageError
from pyvmm.memory.address import MIB
from pyvmm.memory.backing import Memfd
from pyvmm.memory.ledger import ASSUMED, PageState
from pyvmm.observe.pagemap import Change, Count, PageMap, Run
from pyvmm.protection import Protection
from tests.memory_helper import BASE, build
from tests.unit.pagemap_samples import ENTRIES, EVERY_ENTRY, PAGE, page_maps


def test_a_map_of_a_ledger_has_the_longest_runs_across_areas() -> None:
    _, memory, _ = build(Protection.PKVM)
    with memory:
        memory.add(BASE + MIB, Memfd(MIB))
        memory.add(BASE + 4 * MIB, Memfd(MIB))
        memory.seal()
        memory.ledger.set(BASE + PAGE, PageState.SHARED)
        taken = PageMap.of(memory.ledger)
    private = PageState.PRIVATE | ASSUMED
    assert taken.runs == (
        (BASE, 1, private),
        (BASE + PAGE, 1, PageState.SHARED),
        (BASE + 2 * PAGE, 510, private),
        (BASE + 4 * MIB, 256, private),
    )
    assert taken.areas == ((BASE, BASE + 2 * MIB), (BASE + 4 * MIB, BASE + 5 * MIB))
    counts = taken.counts()
    assert (counts[PageState.PRIVATE], counts[PageState.SHARED]) == (Count(767, 767), Count(1, 0))


def test_an_empty_map_is_valid() -> None:
    empty = PageMap()
    assert (empty.pages, empty.areas, empty.diff(empty)) == (0, (), ())
    assert set(empty.counts().values()) == {Count(0, 0)}
    assert PageMap.from_runs([]) == empty


@given(page_maps())
def test_counts_add_up_and_a_map_reads_back_from_json(page_map: PageMap) -> None:
    counts = page_map.counts()
    assert sum(count.pages for count in counts.values()) == page_map.pages
    assert all(0 <= count.assumed <= count.pages for count in counts.values())
    assert sum(end - start for start, end in page_map.areas) == page_map.pages * PAGE
    data = json.loads(json.dumps(page_map.to_json()))
    assert PageMap.from_runs(data["runs"]) == page_map
    assert sum(count["pages"] for count in data["counts"].values()) == data["pages"]


@given(page_maps(), page_maps())
def test_the_changes_turn_one_map_into_the_other(before: PageMap, after: PageMap) -> None:
    changes = after.diff(before)
    assert after.diff(after) == ()
    assert [(c.gpa, c.pages, c.after, c.before) for c in changes] == list(before.diff(after))
    for change in changes:
        last = change.gpa + (change.pages - 1) * PAGE
        for gpa in (change.gpa, last):
            assert (entry(before, gpa), entry(after, gpa)) == (change.before, change.after)
            assert change.before != change.after
    grown = {state: count.pages for state, count in after.counts().items() if state is not PageState.ABSENT}
    for state in grown:
        grown[state] -= before.counts()[state].pages
        grown[state] -= sum(c.pages for c in changes if c.after & ~ASSUMED == state)
        grown[state] += sum(c.pages for c in changes if c.before & ~ASSUMED == state)
    assert set(grown.values()) == {0}


def entry(page_map: PageMap, gpa: int) -> int:
    return next((run.entry for run in page_map.runs if run.gpa <= gpa < run.end), PageState.ABSENT)


def test_a_change_includes_the_previous_state_of_the_page() -> None:
    before = PageMap.from_runs([(BASE, 8, PageState.PRIVATE | ASSUMED)])
    after = PageMap.from_runs([(BASE, 2, PageState.PRIVATE | ASSUMED), (BASE + 2 * PAGE, 1, PageState.SHARED)])
    assert after.diff(before) == (
        Change(BASE + 2 * PAGE, 1, PageState.PRIVATE | ASSUMED, PageState.SHARED),
        Change(BASE + 3 * PAGE, 5, PageState.PRIVATE | ASSUMED, PageState.ABSENT),
    )


def test_a_run_has_a_description() -> None:
    run = Run(BASE, 1, PageState.PRIVATE | ASSUMED)
    assert (run.state, run.assumed, run.end) == (PageState.PRIVATE, True, BASE + PAGE)
    assert run.describe() == (
        "[0x8000_0000, 0x8000_1000) 1 page: private to the guest (assumed: the kernel does not tell)"
    )
    assert [r.entry for r in EVERY_ENTRY.runs] == ENTRIES


@pytest.mark.parametrize(
    ("runs", "what"),
    [
        ([(BASE, 1, 6)], "no ledger entry"),
        ([(BASE, 1, 0x42)], "no ledger entry"),
        ([(BASE, 0, 1)], "0 pages at gpa 0x80000000"),
        ([(BASE + 1, 1, 1)], "no guest pages"),
        ([(-PAGE, 1, 1)], "no guest pages"),
        ([((1 << 64) - PAGE, 2, 1)], "no guest pages"),
        ([(BASE + PAGE, 1, 1), (BASE, 2, 1)], "two entries for the page at gpa 0x8000_1000"),
    ],
)
def test_triples_that_describe_no_memory_are_refused(runs: list[tuple[int, int, int]], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        PageMap.from_runs(runs)
