"""A run from its plan to its results: what is measured, in which order, and the lines that come of it.

The lines are made where the guest runs and taken where the report is made, which may be another machine. A line
besides those of :mod:`pyvmm.bench.model` says that a point is done; whoever reads a file passes over it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TextIO

from pyvmm.bench.case import Case, nearest, select
from pyvmm.bench.model import Point, Run, Series, Value, footer, header, line, parse
from pyvmm.errors import PyvmmError, UsageError

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Step:
    """A point to measure; ``turn`` and ``side`` are of runs that measure two things by turns."""

    case: Case
    point: Point
    turn: int = 0
    side: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run was asked for. ``axes`` are values by axis; ``versus`` is an axis and its value on the other side."""

    cases: tuple[str, ...] = ()
    axes: Mapping[str, Sequence[Value]] | None = None
    quick: bool = False
    versus: tuple[str, Value] | None = None
    turns: int = 10

    def steps(self) -> list[Step]:
        """Return the points in the order in which they are measured. UsageError where there is nothing to measure."""
        points: list[Step] = []
        self._check_axes()
        for case in select(self.cases):
            chosen = {axis: values for axis, values in (self.axes or {}).items() if axis in case.axes}
            if not chosen:
                found = case.points(quick=self.quick)
            elif self.cases:
                found = case.cross(chosen)
            else:  # of cases that nobody named, those that have such points
                found = [each for each in case.points(quick=self.quick) if _within(each, chosen)]
            points += [Step(case, point) for point in found]
        if not points:
            raise UsageError("there is nothing to measure", hint="pyvmm bench --list names every case and its axes")
        return points if self.versus is None else self._by_turns(points)

    def _check_axes(self) -> None:
        known = dict.fromkeys(axis for case in select(self.cases) for axis in case.axes)
        for axis in [*(self.axes or {}), *([self.versus[0]] if self.versus else [])]:
            if axis not in known:
                raise UsageError(f"no axis of what is to be measured is called {axis!r}", hint=nearest(axis, known))

    def _by_turns(self, points: list[Step]) -> list[Step]:
        axis, value = self.versus or ("", None)
        pairs = []
        for step in points:
            if axis in step.case.axes:
                other = step.case.check({**step.point, axis: value})
                if other != step.point:
                    pairs.append((replace(step, side="A"), replace(step, point=other, side="B")))
        if not pairs:
            raise UsageError(f"none of these cases has the axis {axis!r}", hint="pyvmm bench --list names them")
        return [
            replace(each, turn=turn)
            for turn in range(self.turns)
            for pair in pairs
            for each in (pair if turn % 2 == 0 else pair[::-1])
        ]

    def to_json(self) -> dict[str, Any]:
        """Return it as a results file has it."""
        return {
            "cases": list(self.cases), "axes": {axis: list(values) for axis, values in (self.axes or {}).items()},
            "quick": self.quick, "versus": list(self.versus) if self.versus else None,
        }  # fmt: skip


def _within(point: Point, chosen: Mapping[str, Sequence[Value]]) -> bool:
    return all(str(point[axis]) in map(str, values) for axis, values in chosen.items())


def measure(
    plan: Plan, say: Say, *, deadline: float | None = None, peers: Callable[[], list[Series]] | None = None
) -> None:
    """Measure everything, and then what ``peers`` do, saying each line as it comes. In a process of one thread."""
    from pyvmm.bench.environment import environment
    from pyvmm.bench.runner import Task, run

    steps, begun = plan.steps(), time.monotonic()
    say(header(environment(), {**plan.to_json(), "points": len(steps)}))
    results = run((Task(step.case, step.point) for step in steps), deadline=deadline)
    last = begun
    for step, (_, series) in zip(steps, results, strict=True):
        for each in series:
            notes = {**each.notes, "side": step.side, "turn": step.turn} if step.side else each.notes
            say(line(replace(each, notes=notes)))
        now = time.monotonic()
        done = {"case": step.case.name, "point": step.point, "seconds": round(now - last, 3)}
        say(json.dumps({"done": done}) + "\n")
        last = now
    for each in peers() if peers else ():
        say(line(each))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    say(footer({"seconds": round(time.monotonic() - begun, 1), "date": date}))


class Collector:
    """Takes a run's lines: keeps them, writes them to a file as they come, and counts points.

    ``progress`` hears points done, points there are, and the point that was measured last.
    """

    def __init__(self, file: TextIO | None, path: str, progress: Callable[[int, int, str], None]) -> None:
        self._file, self._path, self._progress = file, path, progress
        self._lines: list[str] = []
        self._done = self._points = 0
        self.failed: PyvmmError | None = None
        """Why the file is not whole; the lines are here all the same."""

    def take(self, text: str) -> None:
        """Take one line, with its end."""
        data = json.loads(text)
        if "done" in data:
            self._done += 1
            point = data["done"]
            self._progress(self._done, self._points, f"{point['case']} {point['point'].get('protection', '')}")
        elif not self._lines:
            self._points = data.get("asked", {}).get("points", 0)
        self._lines.append(text)
        if self._file is not None and self.failed is None:
            try:
                self._file.write(text)
                self._file.flush()
            except OSError as error:
                self.failed = PyvmmError(
                    f"{self._path} cannot be written any more: {error.strerror}; it lacks what came after that",
                    hint="everything is in the table above; make room, or measure again to another place",
                )

    def run(self) -> Run | None:
        """Return what there is, None where not even the header came."""
        return parse(self._lines, "the run") if self._lines else None


def sides(run: Run) -> tuple[Run, Run]:
    """Return the two sides of a run that measured by turns, each turn a round; the axis that differs is taken out.

    UsageError for a run that has none.
    """
    versus = run.asked.get("versus")
    if not versus:
        raise UsageError(
            "this run has one side only, so there is nothing to compare it with",
            hint="name a second file, or measure by turns: pyvmm bench CASE --versus AXIS=VALUE",
        )
    axis = versus[0]
    found: dict[str, dict[tuple[Value, ...], list[Series]]] = {"A": {}, "B": {}}
    for series in run.series:
        point = {name: value for name, value in series.point.items() if name != axis}
        plain = replace(series, point=point)
        found.get(str(series.notes.get("side")), {}).setdefault(plain.key, []).append(plain)
    return _merged(run, found["A"]), _merged(run, found["B"])


def _merged(run: Run, found: Mapping[tuple[Value, ...], list[Series]]) -> Run:
    merged = []
    for turns in found.values():
        whole = [each for each in turns if each.kept]
        values = tuple(value for each in whole for value in each.kept)
        rounds = tuple(len(each.kept) for each in whole)
        merged.append(
            replace(turns[0], values=values, rounds=rounds, warmup=0, rule="", places=(), began=(), notes={})
        )  # fmt: skip
    return run.with_series(merged)
