# SPDX-License-Identifier: Apache-2.0
"""What a run of the benchmark is made of: a case at one point, measured in a child process, and the series it leaves.

A point that cannot be measured, crashes, or is past its deadline leaves a series without values that says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pyvmm.bench.case import Case, select
from pyvmm.bench.history import is_new
from pyvmm.bench.measure import Bench
from pyvmm.bench.model import ROUNDS, Point, Series, Value
from pyvmm.errors import PyvmmError
from pyvmm.experiment.runner import run


class Task(NamedTuple):
    """One case at one point; see :class:`pyvmm.experiment.runner.Task`."""

    case: Case
    point: Point
    rounds: int = ROUNDS
    new: bool = False
    """Whether no protected VM was made since the host's boot."""

    @property
    def seconds(self) -> float:
        """The case's own deadline."""
        return self.case.seconds

    def conduct(self, seconds: float) -> list[dict[str, Any]]:
        """Measure the point in this very process and return its series."""
        bench = Bench(self.case.name, self.point, rounds=self.rounds, seconds=seconds, new=self.new)
        try:
            self.case.function(bench)
        except (PyvmmError, OSError) as error:
            why = error.message if isinstance(error, PyvmmError) else str(error)
            bench.series.append(_nothing(self, why))
        return [each.to_json() for each in bench.series]

    def result(self, data: list[dict[str, Any]]) -> list[Series]:
        """Return the series that :meth:`conduct` left."""
        return [Series.from_json(each) for each in data]

    def crashed(self, why: str, _seconds: float) -> list[Series]:
        """Return the series without values of a point whose process died, or was killed."""
        return [_nothing(self, why, crashed=True)]

    def is_orderly(self, result: list[Series]) -> bool:
        """Whether the case came to its end."""
        return not any(each.notes.get("crashed") for each in result)


def measure_point(case: str, point: Mapping[str, Value], *, deadline: float | None = None) -> list[Series]:
    """Measure a case at ``point``, some or all of its axes; ``deadline`` seconds replace the case's own.

    Raises UsageError for an unknown case, axis or value. Must be called in a process without other threads.
    """
    [found] = select([case])
    [series] = run([Task(found, found.check(point), new=is_new())], deadline=deadline)
    return series


def _nothing(task: Task, why: str, **notes: Value) -> Series:
    return Series(task.case.name, task.point, "cost", "guest", "ns", "page", unavailable=why, notes=dict(notes))
