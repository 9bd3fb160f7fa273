# SPDX-License-Identifier: Apache-2.0
"""Measures points, each in a process of its own with a deadline, so that none can hurt its neighbours.

A point that cannot be measured, crashes, or is past its deadline leaves a series without values that says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pyvmm.bench.case import Case, select
from pyvmm.bench.measure import Bench
from pyvmm.bench.model import Point, Series, Value
from pyvmm.errors import PyvmmError
from pyvmm.experiment.child import CrashedError, run_apart
from pyvmm.experiment.host.settings import Snapshot


class Task(NamedTuple):
    """One case at one point."""

    case: Case
    point: Point


def measure_point(case: str, point: Mapping[str, Value], *, deadline: float | None = None) -> list[Series]:
    """Measure a case at ``point``, some or all of its axes; ``deadline`` seconds replace the case's own.

    Raises UsageError for an unknown case, axis or value. Must be called in a process without other threads.
    """
    [found] = select([case])
    [(_, series)] = run([Task(found, found.check(point))], deadline=deadline)
    return series


def run(tasks: Iterable[Task], *, deadline: float | None = None) -> Iterator[tuple[Task, list[Series]]]:
    """Measure one point after the other and yield their series as they come."""
    before = Snapshot()
    for task in tasks:
        orderly = False
        try:
            series = _apart(task, deadline)
            orderly = not any(each.notes.get("crashed") for each in series)
        finally:
            if not orderly:  # it may have left the host's settings changed
                before.restore()
        yield task, series


def _apart(task: Task, deadline: float | None) -> list[Series]:
    seconds = task.case.seconds if deadline is None else deadline
    try:
        return [Series.from_json(each) for each in run_apart(lambda: _measure(task, seconds), seconds)]
    except CrashedError as crash:
        return [_nothing(task, crash.message, crashed=True)]


def _measure(task: Task, seconds: float) -> list[dict[str, Any]]:
    bench = Bench(task.case.name, task.point, seconds=seconds)
    try:
        task.case.function(bench)
    except (PyvmmError, OSError) as error:
        why = error.message if isinstance(error, PyvmmError) else str(error)
        bench.series.append(_nothing(task, why))
    return [each.to_json() for each in bench.series]


def _nothing(task: Task, why: str, **notes: Value) -> Series:
    return Series(task.case.name, task.point, "cost", "guest", "ns", "page", unavailable=why, notes=dict(notes))
