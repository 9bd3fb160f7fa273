# SPDX-License-Identifier: Apache-2.0
"""Wording shared by all atlas reports: names of claims, places, verdicts and values, and folding of reasons.

Pure functions and constants; used by the other modules of this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pyvmm.atlas.model import Atlas, Result
from pyvmm.experiment.record import TCG, Event, Evidence, Value, Verdict
from pyvmm.memory.choices import BACKINGS
from pyvmm.protection import PROTECTIONS
from pyvmm.reports.words import one_line
from pyvmm.terminal import clean

Key = tuple[str, str, str]
"""(id, protection, backing) of a result."""

Expected = Mapping[Key, Verdict]
"""The expected verdicts. A result without an entry may have any."""

NOTHING_EXPECTED: Expected = {}

SHORT = {Verdict.HOLDS: "holds", Verdict.FAILS: "fails", Verdict.UNTOLD: "untold", Verdict.CRASHED: "crashed"}
"""A verdict in one word, for narrow places."""

_PLURAL = {Verdict.HOLDS: "hold", Verdict.FAILS: "do not hold"}

HOST = {
    "kernel": "kernel",
    "version": "version",
    "mode": "KVM mode",
    "machine": "machine",
    "cpu": "CPU",
    TCG: "QEMU TCG",
    "pyvmm": "pyvmm",
}
"""The host's known fields, in order, with their labels."""


def value_text(value: Value) -> str:
    """Format a value of evidence or of the host."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return clean(str(value)) if value != "" else "(empty)"


def wanted(evidence: Evidence) -> str:
    """Return the wanted value if it differs from the observed one."""
    return "" if evidence.wanted is None or evidence.ok else value_text(evidence.wanted)


def name(result: Result) -> str:
    """Return the claim's name within its group."""
    return one_line(result.id.removeprefix(f"{result.group}/"))


def full_name(result: Result) -> str:
    """Return ``group/name``."""
    return f"{one_line(result.group)}/{name(result)}"


def place(result: Result) -> str:
    """Return ``protection/backing``."""
    return one_line(f"{result.protection}/{result.backing}")


def counted(verdict: Verdict, count: int) -> str:
    """Format the number of results with a verdict: ``3 hold``, ``1 holds``."""
    return f"{count} {verdict.value if count == 1 else _PLURAL.get(verdict, verdict.value)}"


def columns(atlas: Atlas) -> dict[str, list[str]]:
    """Return the backings that occur under each protection, known ones first, in a fixed order."""
    found: dict[str, list[str]] = {}
    for protection, backing in atlas.columns():
        found.setdefault(protection, []).append(backing)
    return {
        protection: sorted(found[protection], key=lambda each: _rank(each, BACKINGS))
        for protection in sorted(found, key=lambda each: _rank(each, PROTECTIONS))
    }


def _rank(word: str, known: tuple[str, ...]) -> int:
    return known.index(word) if word in known else len(known)


def seconds(times: Mapping[str, Any]) -> float | None:
    """Return a duration in seconds, if its times contain it."""
    value = times.get("seconds")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def ticks(result: Result) -> dict[str, str]:
    """Return the measured times in the guest's ticks, as text."""
    found = result.times.get("ticks")
    if not isinstance(found, dict):
        return {}
    return {one_line(str(what)): one_line(str(value)) for what, value in found.items()}


def when(result: Result) -> list[int]:
    """Return the time of each event, in ns since the experiment's start; empty unless all are known."""
    found = result.times.get("events")
    if not isinstance(found, list) or len(found) != len(result.events):
        return []
    return found if all(isinstance(ns, int) for ns in found) else []


def count_events(events: Iterable[Event]) -> dict[str, int]:
    """Count events by kind, in the order of first occurrence."""
    counts: dict[str, int] = {}
    for event in events:
        kind = one_line(event.kind)
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def host_facts(atlas: Atlas) -> list[tuple[str, str]]:
    """Return (label, value) of all fields of the host and the run, known ones first."""
    known = [(HOST[field], value_text(atlas.host[field])) for field in HOST if field in atlas.host]
    more = [(one_line(field), value_text(value)) for field, value in atlas.host.items() if field not in HOST]
    took = seconds(atlas.times)
    run = [("date", one_line(str(atlas.times["date"])))] if atlas.times.get("date") else []
    run += [("took", f"{took:.0f} s")] if took is not None else []
    return [*known, *more, *run]


def surprises(result: Result, expected: Expected) -> bool:
    """Whether the verdict differs from the expected one."""
    return expected.get(result.key, result.verdict) is not result.verdict


class Folded(NamedTuple):
    """Results with the same verdict and reason."""

    verdict: Verdict
    reason: str
    results: list[Result]


def fold(results: Iterable[Result], verdict: Verdict) -> list[Folded]:
    """Group the results with this verdict by reason, the most frequent first."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.verdict is verdict:
            found.setdefault(result.reason, []).append(result)
    folded = [Folded(verdict, reason, same) for reason, same in found.items()]
    return sorted(folded, key=lambda each: -len(each.results))


def some(results: Iterable[Result], most: int = 3) -> str:
    """Name results, each claim once with its places, up to ``most``; then the number of further claims."""
    places: dict[str, list[str]] = {}
    for result in results:
        places.setdefault(full_name(result), []).append(place(result))
    same = len({tuple(where) for where in places.values()}) == 1
    named = [claim if same else f"{claim} ({', '.join(where)})" for claim, where in places.items()]
    # "and 1 more" would take the room of the name that it replaces.
    shown = named if len(named) <= most + 1 else named[:most]
    more = f" and {len(named) - most} more" if len(shown) < len(named) else ""
    head = f"{', '.join(next(iter(places.values())))}: " if same else ""
    return head + ", ".join(shown) + more
