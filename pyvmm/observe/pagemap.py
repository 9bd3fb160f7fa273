# SPDX-License-Identifier: Apache-2.0
"""The page map: the state of every guest page in the ledger at one moment, as runs of equal pages.

Data only. It is made from a ledger, or from the (gpa, pages, entry) triples in JSON. The renderers draw it
(:mod:`pyvmm.observe.mapterm`, :mod:`pyvmm.observe.mapsvg`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pyvmm.errors import UsageError, hex_
from pyvmm.memory.address import is_aligned, span
from pyvmm.memory.ledger import ASSUMED, PageState, describe
from pyvmm.pages import HOST_PAGE, HOST_PAGE_SHIFT

if TYPE_CHECKING:
    from pyvmm.memory.ledger import Ledger

_EQUAL = re.compile(rb"(.)\1*", re.DOTALL)
_ENTRIES = frozenset(state | bit for state in PageState for bit in (0, ASSUMED))
ADDRESSES = 1 << 64
"""Guest addresses end here at the latest."""


class Run(NamedTuple):
    """``pages`` pages from ``gpa`` with the same ledger entry: a :class:`PageState`, ASSUMED or-ed in or not."""

    gpa: int
    pages: int
    entry: int

    @property
    def end(self) -> int:
        """The address behind the last page."""
        return self.gpa + (self.pages << HOST_PAGE_SHIFT)

    @property
    def state(self) -> PageState:
        """What the pages are."""
        return PageState(self.entry & ~ASSUMED)

    @property
    def assumed(self) -> bool:
        """Whether that is an assumption: the kernel does not tell."""
        return bool(self.entry & ASSUMED)

    def describe(self) -> str:
        """Say it in words, with the addresses."""
        many = f"{self.pages:,} page{'' if self.pages == 1 else 's'}"
        return f"{span(self.gpa, self.end - self.gpa)} {many}: {describe(self.entry)}"


class Count(NamedTuple):
    """How many pages are in a state, and of how many of them that is assumed."""

    pages: int
    assumed: int


class Change(NamedTuple):
    """``pages`` pages from ``gpa`` whose entry was ``before`` and is ``after``; ABSENT where there is no memory."""

    gpa: int
    pages: int
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class PageMap:
    """Runs sorted by gpa, disjoint, and as long as they can be: equal maps compare equal."""

    runs: tuple[Run, ...] = ()

    @classmethod
    def of(cls, ledger: Ledger) -> Self:
        """Read ``ledger``. vCPUs may run: each page has its state at some moment of the call."""
        return cls(
            _joined(
                Run(gpa + (first << HOST_PAGE_SHIFT), count, entry)
                for gpa, entries in ledger.snapshot()
                for first, count, entry in stretches(entries)
            )
        )

    @classmethod
    def from_runs(cls, runs: Iterable[tuple[int, int, int]]) -> Self:
        """Make a map of ``runs``, each (gpa, pages, entry), in any order. Raises UsageError for an impossible map."""
        ordered = sorted(Run(*run) for run in runs)
        end = 0
        for run in ordered:
            if run.entry not in _ENTRIES:
                raise UsageError(f"a page map says {run.entry:#x} of gpa {run.gpa:#x}, which is no ledger entry")
            if run.gpa < 0 or not is_aligned(run.gpa) or run.pages < 1 or run.end > ADDRESSES:
                raise UsageError(f"a page map has {run.pages} pages at gpa {run.gpa:#x}, which are no guest pages")
            if run.gpa < end:
                raise UsageError(f"a page map has two entries for the page at gpa {hex_(run.gpa)}")
            end = run.end
        return cls(_joined(ordered))

    @property
    def pages(self) -> int:
        """How many pages there are, ABSENT ones included."""
        return sum(run.pages for run in self.runs)

    @property
    def areas(self) -> tuple[tuple[int, int], ...]:
        """The ranges of addresses that are mapped, each (first, behind the last), none touching the next."""
        found: list[tuple[int, int]] = []
        for run in self.runs:
            start = found.pop()[0] if found and found[-1][1] == run.gpa else run.gpa
            found.append((start, run.end))
        return tuple(found)

    def counts(self) -> dict[PageState, Count]:
        """Count the pages in each state, those that do not occur too."""
        pages, assumed = dict.fromkeys(PageState, 0), dict.fromkeys(PageState, 0)
        for run in self.runs:
            pages[run.state] += run.pages
            assumed[run.state] += run.pages if run.assumed else 0
        return {state: Count(pages[state], assumed[state]) for state in PageState}

    def diff(self, before: PageMap) -> tuple[Change, ...]:
        """Return what has changed since ``before``, sorted by gpa."""
        edges = sorted({edge for run in (*self.runs, *before.runs) for edge in (run.gpa, run.end)})
        changes: list[Change] = []
        then, now = _Reader(before), _Reader(self)
        for start, end in itertools.pairwise(edges):
            old, new = then.entry(start), now.entry(start)
            if old == new:
                continue
            change = Change(start, (end - start) >> HOST_PAGE_SHIFT, old, new)
            if changes and _follows(changes[-1], change):
                change = Change(changes[-1].gpa, changes.pop().pages + change.pages, old, new)
            changes.append(change)
        return tuple(changes)

    def to_json(self) -> dict[str, Any]:
        """Return plain values: the runs, and pages by state."""
        return {
            "page_size": HOST_PAGE,
            "pages": self.pages,
            "counts": {state.name.lower(): count._asdict() for state, count in self.counts().items()},
            "runs": [list(run) for run in self.runs],
        }

    def _repr_svg_(self) -> str:
        """Draw the map for a notebook, which calls this."""
        from pyvmm.observe.mapsvg import svg_map

        return svg_map(self)


def stretches(cells: bytes | bytearray) -> Iterator[tuple[int, int, int]]:
    """Give (first, count, byte) of each run of equal bytes."""
    for match in _EQUAL.finditer(cells):
        yield match.start(), match.end() - match.start(), cells[match.start()]


class _Reader:
    """Reads a map at rising addresses."""

    def __init__(self, page_map: PageMap) -> None:
        self._runs = iter(page_map.runs)
        self._run: Run | None = next(self._runs, None)

    def entry(self, gpa: int) -> int:
        """Return the entry at ``gpa``, which is no lower than at the last call; ABSENT outside."""
        while self._run is not None and self._run.end <= gpa:
            self._run = next(self._runs, None)
        return PageState.ABSENT.value if self._run is None or gpa < self._run.gpa else self._run.entry


def _follows(last: Change, change: Change) -> bool:
    end = last.gpa + (last.pages << HOST_PAGE_SHIFT)
    return end == change.gpa and (last.before, last.after) == (change.before, change.after)


def _joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Join runs, sorted by gpa, where equal ones touch."""
    joined: list[Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last is not None and last.end == run.gpa and last.entry == run.entry:
            joined[-1] = Run(last.gpa, last.pages + run.pages, run.entry)
        else:
            joined.append(run)
    return tuple(joined)
