"""How long the hypervisor ran for an operation: EL2 residency, from its entries and exits. Pure functions.

A *visit* is a stretch at EL2, from an entry to the exit that follows on the same CPU. A *trip* is what a vCPU's guest
waits for: from the exit that ends a stretch of guest to the one that begins the next, visits with the host's *gaps*
between them. The share that EL2 answers itself is a trip of one visit:

    guest ─ guest_exit … eret_guest ─ guest

The donation of a page is one of three or more, and what runs in the gaps is the host:

    guest ─ guest_exit … eret_host ─ gap ─ hvc … eret_host ─ gap ─ hvc … eret_guest ─ guest

Times are as events have them: ns, cut to the microsecond. Sums over many are good to a few ten nanoseconds each.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from pyvmm.observe.hyptrace import HypEvent

_CUT = 1000
"""ns."""
GUEST_EXIT, ERET_GUEST = "guest_exit", "eret_guest"
HVC, HOST_ABORT = "hvc", "host_abort"


class Window(NamedTuple):
    """A stretch of time, [begin, end) in ns of the events' clock, and the operations done in it."""

    begin: int
    end: int
    operations: int = 1


class Visit(NamedTuple):
    """One stretch at EL2; ``reason`` is why it was entered, ``left`` how it was left.

    ``vcpu`` is whose guest came or went, 0 for what the host does on its own account.
    """

    begin: int
    end: int
    cpu: int
    reason: str
    left: str
    vcpu: int

    @property
    def ns(self) -> int:
        return self.end - self.begin


class Trip(NamedTuple):
    """What lies between two stretches of one vCPU's guest."""

    vcpu: int
    visits: tuple[Visit, ...]

    @property
    def begin(self) -> int:
        return self.visits[0].begin

    @property
    def ns(self) -> int:
        """All of it."""
        return self.visits[-1].end - self.visits[0].begin

    @property
    def el2(self) -> int:
        """The hypervisor's part, in ns."""
        return sum(visit.ns for visit in self.visits)

    @property
    def gaps(self) -> tuple[int, ...]:
        """The host's parts, in ns, in order."""
        return tuple(later.begin - earlier.end for earlier, later in pairwise(self.visits))

    @property
    def calls(self) -> int:
        """How many hypervisor calls the host made, that which runs the vCPU again among them."""
        return sum(visit.reason == HVC for visit in self.visits)


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
            vcpu = event.vcpu or entry.vcpu
            found.append(Visit(entry.ns, event.ns, event.cpu, entry.reason, event.reason, vcpu))
    found.sort(key=lambda visit: visit.begin)
    return found


def trips(seen: Iterable[Visit], vcpu: int) -> list[Trip]:
    """Return a vCPU's trips out of its guest, in order.

    What its CPU does meanwhile for others is in them: pin the thread, and leave the CPU to it. A trip that ends on
    another CPU than it began on is left out.
    """
    out: dict[int, list[Visit]] = {}
    found = []
    for visit in seen:
        mine = visit.vcpu == vcpu
        if mine and visit.reason == GUEST_EXIT:
            out.clear()  # it left its guest here; what it began elsewhere has ended where it was not seen
            out[visit.cpu] = []
        if visit.cpu not in out:
            continue
        out[visit.cpu].append(visit)
        if mine and visit.left == ERET_GUEST:
            found.append(Trip(vcpu, tuple(out.pop(visit.cpu))))
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


def of_trips(some: Sequence[Trip]) -> Residency:
    """Return what a trip cost at EL2, in the mean. ValueError for none."""
    if not some:
        raise ValueError("no trips, nothing to divide by")
    everything = sorted((visit for trip in some for visit in trip.visits), key=attrgetter("begin"))
    return residency(everything, Window(everything[0].begin, everything[-1].begin + 1, len(some)))


def mean_gaps(some: Iterable[Trip]) -> list[float]:
    """Return the host's mean ns in the first gap, the second, and so on, of trips that all have as many."""
    columns: defaultdict[int, list[int]] = defaultdict(list)
    for trip in some:
        for place, gap in enumerate(trip.gaps):
            columns[place].append(gap)
    return [sum(values) / len(values) for _, values in sorted(columns.items())]


def _over(counts: Counter[str], operations: int) -> dict[str, float]:
    return {reason: value / operations for reason, value in sorted(counts.items())}


def _minus(one: dict[str, float], other: dict[str, float], times: float) -> dict[str, float]:
    return {reason: one.get(reason, 0.0) - times * other.get(reason, 0.0) for reason in sorted({*one, *other})}
