# SPDX-License-Identifier: Apache-2.0
"""How long the hypervisor ran for an operation: EL2 residency, from its entries and exits. Pure functions.

A *visit* is a stretch at EL2, from an entry to the exit that follows on the same CPU. The share that EL2 answers itself
is one visit:

    guest ─ guest_exit … eret_guest ─ guest

The donation of a page is three or more, and what runs in the gaps is the host:

    guest ─ guest_exit … eret_host ─ gap ─ hvc … eret_host ─ gap ─ hvc … eret_guest ─ guest

Times are as events have them: ns, cut to the microsecond. Sums over many are good to a few ten nanoseconds each.
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
    """A stretch of time, [begin, end) in ns of the events' clock, and the operations done in it."""

    begin: int
    end: int
    operations: int = 1


class Visit(NamedTuple):
    """One stretch at EL2; ``reason`` is why it was entered."""

    begin: int
    end: int
    cpu: int
    reason: str

    @property
    def ns(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Residency:
    """What one operation cost at EL2, in the mean: ``ns`` and ``entries`` by reason."""

    operations: int
    ns: dict[str, float] = field(default_factory=dict)
    entries: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Ns at EL2 an operation."""
        return sum(self.ns.values())

    @property
    def visits(self) -> float:
        """Entries an operation."""
        return sum(self.entries.values())

    @property
    def error(self) -> float:
        """Ns by which :attr:`total` may be off, one standard deviation, for stamps are cut to the microsecond."""
        stamps = 2 * max(self.visits, 0.0) * self.operations
        return _CUT / math.sqrt(12) * math.sqrt(stamps) / self.operations

    def less(self, rest: Residency, *, times: float = 1.0) -> Residency:
        """Return what is left without ``times`` of the ``rest`` in each operation: an order's own exits, say."""
        return Residency(self.operations, _minus(self.ns, rest.ns, times), _minus(self.entries, rest.entries, times))

    def without_tracing(self, event: float) -> Residency:
        """Return it less the cost of being traced: ``event`` ns for each visit, what one event takes EL2 to write."""
        ns = {reason: value - event * self.entries.get(reason, 0.0) for reason, value in self.ns.items()}
        return Residency(self.operations, ns, self.entries)


class Cost(NamedTuple):
    """What one operation took, in ns, while the hypervisor was traced and as if it had not been.

    ``traced`` is by the clock of who waited for it, ``el2`` what the trace says, ``event`` what one event costs. Of the
    two events of a visit one is within what the trace says: an entry's, which is stamped first and written then.
    """

    traced: float
    el2: Residency
    event: float

    @property
    def whole(self) -> float:
        """All of it."""
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
    """Pair entries with exits, CPU by CPU, and return them by their beginning; halves at either end are left out."""
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
    """Return what an operation of the ``window`` cost at EL2, on ``cpus`` (all unless told).

    ``seen`` is in order, as of :func:`visits`; visits count where they begin in the window. ValueError for a window
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
