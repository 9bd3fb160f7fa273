# SPDX-License-Identifier: Apache-2.0
"""Compute EL2 residency (how long the hypervisor ran for an operation) from EL2 entries and exits. Pure functions.

A *visit* is a period at EL2, from an entry to the next exit on the same CPU. A share is one visit, because EL2 answers
it itself:

    guest ─ guest_exit … eret_guest ─ guest

The donation of a page is three or more visits, and the host runs in the gaps:

    guest ─ guest_exit … eret_host ─ gap ─ hvc … eret_host ─ gap ─ hvc … eret_guest ─ guest

Times are those of events: ns, truncated to microseconds. Means over many are accurate to a few ten nanoseconds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from pyvmm.observe.hyptrace import HypEvent

_CUT = 1000
"""ns."""


class Window(NamedTuple):
    """A period [begin, end) in ns of the events' clock, and the number of operations in it."""

    begin: int
    end: int
    operations: int = 1


class Visit(NamedTuple):
    """One period at EL2. ``reason`` is the reason of its entry."""

    begin: int
    end: int
    cpu: int
    reason: str

    @property
    def ns(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Residency:
    """The mean cost of one operation at EL2: ``ns`` and ``entries`` by reason."""

    operations: int
    ns: dict[str, float] = field(default_factory=dict)
    entries: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """ns at EL2 per operation."""
        return sum(self.ns.values())

    @property
    def visits(self) -> float:
        """Entries an operation."""
        return sum(self.entries.values())

    @property
    def error(self) -> float:
        """Standard deviation of :attr:`total` in ns, from timestamps truncated to microseconds."""
        stamps = 2 * max(self.visits, 0.0) * self.operations
        return _CUT / math.sqrt(12) * math.sqrt(stamps) / self.operations

    def less(self, rest: Residency, *, times: float = 1.0) -> Residency:
        """Subtract ``times`` of ``rest`` from each operation, such as an order's own exits."""
        return Residency(self.operations, _minus(self.ns, rest.ns, times), _minus(self.entries, rest.entries, times))

    def without_tracing(self, event: float) -> Residency:
        """Subtract the cost of tracing: ``event`` ns for each visit, the time for writing one event at EL2."""
        ns = {reason: value - event * self.entries.get(reason, 0.0) for reason, value in self.ns.items()}
        return Residency(self.operations, ns, self.entries)


class Cost(NamedTuple):
    """The time of one operation in ns, with and without tracing.

    ``traced`` is by the waiting side's clock, ``el2`` from the trace, ``event`` the cost of one event. A visit has two
    events. Writing the entry event is part of ``el2``, because the timestamp is taken before writing.
    """

    traced: float
    el2: Residency
    event: float

    @property
    def whole(self) -> float:
        """The whole time."""
        return self.traced - 2 * self.event * self.el2.visits

    @property
    def hypervisor(self) -> float:
        """EL2's part."""
        return self.el2.without_tracing(self.event).total

    @property
    def rest(self) -> float:
        """The guest's and the host's part."""
        return self.whole - self.hypervisor


def visits(events: Iterable[HypEvent]) -> list[Visit]:
    """Pair entries with exits, per CPU, and return them by start. Incomplete pairs at either end are dropped."""
    inside: dict[int, HypEvent] = {}
    found = []
    for event in events:
        if event.entered:
            inside[event.cpu] = event
        elif entry := inside.pop(event.cpu, None):
            found.append(Visit(entry.ns, event.ns, event.cpu, entry.reason))
    found.sort(key=lambda visit: visit.begin)
    return found


def residency(seen: Sequence[Visit], window: Window, *, cpus: Iterable[int] | None = None) -> Residency:
    """Return the cost at EL2 of an operation of the ``window``, on ``cpus`` (default all).

    ``seen`` is in order, as from :func:`visits`. A visit counts if it begins in the window. ValueError for a window
    without operations.
    """
    if window.operations < 1:
        raise ValueError("no operations, nothing to divide by")
    wanted = None if cpus is None else frozenset(cpus)
    ns: Counter[str] = Counter()
    entries: Counter[str] = Counter()
    first, last = (bisect_left(seen, moment, key=attrgetter("begin")) for moment in (window.begin, window.end))
    for visit in seen[first:last]:
        if wanted is None or visit.cpu in wanted:
            ns[visit.reason] += visit.ns
            entries[visit.reason] += 1
    return Residency(window.operations, _over(ns, window.operations), _over(entries, window.operations))


def _over(counts: Counter[str], operations: int) -> dict[str, float]:
    return {reason: value / operations for reason, value in sorted(counts.items())}


def _minus(one: dict[str, float], other: dict[str, float], times: float) -> dict[str, float]:
    return {reason: one.get(reason, 0.0) - times * other.get(reason, 0.0) for reason in sorted({*one, *other})}
