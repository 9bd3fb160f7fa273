# SPDX-License-Identifier: Apache-2.0
"""A benchmark run from its plan to its results: the points, their order, and the result lines.

The host of the guest makes the lines. The host of the report takes them, and may be another machine. Besides the lines
of :mod:`pyvmm.bench.model`, one line reports each finished point. Readers of a file skip it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TextIO

from pyvmm.bench.case import Case, select
from pyvmm.bench.history import FIRST, is_new
from pyvmm.bench.model import ROUNDS, Point, Run, Series, Value, footer, header, line, parse
from pyvmm.errors import PyvmmError, UsageError
from pyvmm.experiment.registry import nearest

Say = Callable[[str], None]
_Turns = dict[tuple[Value, ...], dict[Value, Series]]
"""Series by their identity and their turn."""


@dataclass(frozen=True, slots=True)
class Step:
    """A point to measure. In a run that measures two points in turns, ``pair`` identifies the two."""

    case: Case
    point: Point
    turn: int = 0
    side: str = ""
    pair: str = ""

    @property
    def notes(self) -> dict[str, Value]:
        """The fields that its series need, to be matched again."""
        return {"side": self.side, "turn": self.turn, "pair": self.pair} if self.side else {}


@dataclass(frozen=True, slots=True)
class Plan:
    """The request of a run. ``axes`` are values by axis. ``versus`` is an axis and its value on the other side."""

    cases: tuple[str, ...] = ()
    axes: Mapping[str, Sequence[Value]] | None = None
    quick: bool = False
    versus: tuple[str, Value] | None = None
    turns: int = 10
    rounds: int = ROUNDS
    """Of each point, the first included, which is warm-up."""

    def steps(self) -> list[Step]:
        """Return the points in the order of measuring. Raises UsageError if there is nothing to measure."""
        points: list[Step] = []
        self._check_axes()
        for case in select(self.cases):
            chosen = {axis: values for axis, values in (self.axes or {}).items() if axis in case.axes}
            if not chosen:
                found = case.points(quick=self.quick)
            elif self.cases:
                found = case.cross(chosen)
            else:  # without named cases, only those with such points
                found = [each for each in case.points(quick=self.quick) if _within(each, chosen)]
            points += [Step(case, point) for point in found]
        if not points:
            raise UsageError("there is nothing to measure", hint="pyvmm bench --list names every case and its axes")
        # Only what is measured first can be the first after a boot.
        points.sort(key=lambda step: step.point.get("history") != FIRST)
        return points if self.versus is None else self._by_turns(points)

    def _check_axes(self) -> None:
        cases = select(self.cases)
        known = dict.fromkeys(axis for case in cases for axis in case.axes)
        for axis in [*(self.axes or {}), *([self.versus[0]] if self.versus else [])]:
            if axis not in known:
                raise UsageError(f"none of the cases has an axis {axis!r}", hint=nearest(axis, known))
        if self.cases:
            return  # named cases report unknown axes themselves
        for axis, values in (self.axes or {}).items():
            there = dict.fromkeys(str(point[axis]) for case in cases for point in case.points() if axis in point)
            for value in map(str, values):
                if value not in there:
                    raise UsageError(f"{axis} is never {value!r} in any case", hint=nearest(value, there))

    def _by_turns(self, points: list[Step]) -> list[Step]:
        axis, value = self.versus or ("", None)
        pairs: list[tuple[Step, Step]] = []
        why = UsageError(f"every point has {axis}={value} already: there is nothing to compare it with")
        for step in points:
            if axis not in step.case.axes:
                continue
            try:
                other = step.case.check({**step.point, axis: value})
            except UsageError as error:  # leave out points whose other side is invalid
                why = error
                continue
            if other != step.point:
                both = replace(step, pair=f"{step.point[axis]} / {other[axis]}")
                pairs.append((replace(both, side="A"), replace(both, point=other, side="B")))
        if not pairs:
            raise why
        return [
            replace(each, turn=turn)
            for turn in range(self.turns)
            for pair in pairs
            for each in (pair if turn % 2 == 0 else pair[::-1])
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the request in the form of a results file."""
        return {
            "cases": list(self.cases),
            "axes": {axis: list(values) for axis, values in (self.axes or {}).items()},
            "quick": self.quick,
            "versus": list(self.versus) if self.versus else None,
            "rounds": self.rounds,
        }


def _within(point: Point, chosen: Mapping[str, Sequence[Value]]) -> bool:
    return all(str(point[axis]) in map(str, values) for axis, values in chosen.items())


def measure(
    plan: Plan, say: Say, *, deadline: float | None = None, peers: Callable[[], list[Series]] | None = None
) -> None:
    """Measure all points, then ``peers``, and pass on each line as it comes. Needs a process without other threads."""
    from pyvmm.bench.task import Task
    from pyvmm.experiment.environment import conditions
    from pyvmm.experiment.runner import run

    steps, begun = plan.steps(), time.monotonic()
    new = is_new()  # asked before conditions(), which makes a protected VM to see whether it can
    say(header(conditions(), {**plan.to_json(), "points": len(steps)}))
    tasks = (Task(step.case, step.point, plan.rounds, new and not at) for at, step in enumerate(steps))
    results = run(tasks, deadline=deadline)
    last = begun
    for step, series in zip(steps, results, strict=True):
        for each in series:
            say(line(replace(each, notes={**each.notes, **step.notes})))
        now = time.monotonic()
        done = {"case": step.case.name, "point": step.point, "seconds": round(now - last, 3)}
        say(json.dumps({"done": done}) + "\n")
        last = now
    for each in peers() if peers else ():
        say(line(each))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    say(footer({"seconds": round(time.monotonic() - begun, 1), "date": date}))


class Collector:
    """Collects a run's lines: keeps them, writes them to a file as they come, and counts points.

    ``progress`` gets the points done, the total, and the last measured point.
    """

    def __init__(self, file: TextIO | None, path: str, progress: Callable[[int, int, str], None]) -> None:
        self._file, self._path, self._progress = file, path, progress
        self._lines: list[str] = []
        self._done = self._points = 0
        self.failed: PyvmmError | None = None
        """Why the file is incomplete. The lines are still kept here."""

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
                    f"{self._path} cannot be written: {error.strerror}; it lacks the later results",
                    hint="the table above has all results; make room, or measure again to another file",
                )

    def run(self) -> Run | None:
        """Return the run so far, or None without the header."""
        return parse(self._lines, "the run") if self._lines else None


def sides(run: Run) -> tuple[Run, Run]:
    """Split a run that measured in turns into its two sides, each turn a round. The differing axis names them.

    Turns that only one side has, after an abort or a crash, are left out. Raises UsageError for a run without sides.
    """
    versus = run.asked.get("versus")
    if not versus:
        raise UsageError(
            "this run has only one side, nothing to compare with",
            hint="name a second file, or measure in turns: pyvmm bench CASE --versus AXIS=VALUE",
        )
    axis = versus[0]
    found: dict[str, _Turns] = {"A": {}, "B": {}}
    for series in run.series:
        plain = replace(series, point={**series.point, axis: series.notes.get("pair")})
        found.get(str(series.notes.get("side")), {}).setdefault(plain.key, {})[series.notes.get("turn")] = plain
    return _merged(run, found["A"], found["B"]), _merged(run, found["B"], found["A"])


def across(run: Run, axis: str, values: Sequence[str]) -> tuple[Run, Run]:
    """Split a run into the points at the first and those at the second of two ``values`` of an axis.

    Raises UsageError for an axis or a value that no series with values has.
    """
    one, other = values
    there = dict.fromkeys(axis for series in run.series for axis in series.point)
    if axis not in there:
        raise UsageError(f"no series of this run has an axis {axis!r}", hint=nearest(axis, there))
    found: dict[str, list[Series]] = {one: [], other: []}
    pair = f"{one} / {other}"
    for series in run.series:
        if axis in series.point and str(series.point[axis]) in found:
            found[str(series.point[axis])].append(replace(series, point={**series.point, axis: pair}))
    measured = dict.fromkeys(str(series.point[axis]) for series in run.series if axis in series.point and series.kept)
    for value in values:
        if value not in measured:
            raise UsageError(f"this run measured nothing at {axis}={value}", hint=nearest(value, measured))
    return run.with_series(found[one]), run.with_series(found[other])


def _merged(run: Run, found: _Turns, others: _Turns) -> Run:
    merged = []
    for key, by_turn in found.items():
        turns = list(by_turn.values())
        there = {turn for turn, each in others.get(key, {}).items() if each.kept}
        paired = [each for turn, each in by_turn.items() if each.kept and turn in there]
        whole = paired or [each for each in turns if each.kept]
        values = tuple(value for each in whole for value in each.kept)
        rounds = tuple(len(each.kept) for each in whole)
        merged.append(
            replace((whole or turns)[0], values=values, rounds=rounds, warmup=0, rule="", places=(), began=(), notes={})
        )
    return run.with_series(merged)
