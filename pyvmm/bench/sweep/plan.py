# SPDX-License-Identifier: Apache-2.0
"""The plan of a sweep: reads the TOML file with cases and axes, and makes all combinations. Owns nothing.

    case = "fault"
    repeat = 3                          # optional: repetitions of every point; 1
    deadline = 60                       # optional: seconds for each point; the case's
    [axes]                              # axes that are not named stay at their base
    protection = ["none", "pkvm"]
    pages = [256, 1024]
    [lab]                               # optional: measure the points in labs like this
    host-kernel = "own"

Several cases are ``[[sweep]]`` tables, each with a ``case``, ``repeat``, ``deadline`` and ``axes``. ``repeat``
may be among the axes. Every round of repetitions goes through all points before the next begins, so that drift
affects all points alike.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, Protocol

from pyvmm.bench.model import Point, Value
from pyvmm.errors import UsageError
from pyvmm.experiment.registry import nearest
from pyvmm.syntax.foreign import load_toml

_TABLE: Final = ("case", "repeat", "deadline", "axes")
_LAB: Final = {"host-kernel": str, "mode": str, "icount": bool, "mem": str | int, "cpus": int}
_HEADER: Final = re.compile(r"\s*\[+\s*([^\]]+?)\s*\]+\s*(?:#.*)?$")


class Known(Protocol):
    """The parts of a case that a plan needs; see :class:`pyvmm.bench.case.Case`."""

    @property
    def axes(self) -> Mapping[str, tuple[Value, ...]]: ...
    @property
    def seconds(self) -> float: ...
    def cross(self, chosen: Mapping[str, Sequence[Value]]) -> list[Point]: ...


@dataclass(frozen=True, slots=True)
class Task:
    """One measurement of a point. ``repetition`` counts from 1, ``deadline`` is in seconds."""

    number: int
    case: str
    point: Point
    repetition: int
    deadline: float

    @property
    def key(self) -> str:
        """A unique name, legible for people too."""
        return " ".join((self.case, *(f"{axis}={value}" for axis, value in self.point.items()), f"#{self.repetition}"))


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole file: its requests, and the resulting points in the order of measurement."""

    file: str
    asked: dict[str, Any]
    tasks: tuple[Task, ...]
    left_out: int = 0
    """Combinations that make no sense, and are not measured."""
    lab: dict[str, Any] | None = field(default=None)

    @property
    def identity(self) -> str:
        """Two plans with the same identity have the same points in the same order. Deadlines may differ."""
        text = json.dumps([self.asked, [task.key for task in self.tasks]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _nobody(_name: str) -> None:
    return None


def read(file: str, cases: Mapping[str, Known], brought: Callable[[str], Known | None] = _nobody) -> Plan:
    """Return the plan in a file; ``brought`` looks up a case that is not in ``cases``.

    Raises UsageError, with the line, for unknown entries, and for a plan without points.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"{file} cannot be read: {reason}") from None
    return parse(text, file, cases, brought)


def parse(text: str, file: str, cases: Mapping[str, Known], brought: Callable[[str], Known | None] = _nobody) -> Plan:
    """Return the plan of a file's text; raises as :func:`read` does."""
    try:
        data = load_toml(text)
    except ValueError as error:
        raise UsageError(f"{file} is not TOML: {error}") from None
    return _Reader(text, file, cases, brought).plan(data)


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Describe the differences between the requests of two plans."""
    ours, theirs = dict(_flat(here)), dict(_flat(there))
    return [
        f"{name}: {theirs.get(name, 'nothing')} there, {ours.get(name, 'nothing')} here"
        for name in dict.fromkeys((*theirs, *ours))
        if ours.get(name) != theirs.get(name)
    ]


def _flat(data: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(data, list) and data and isinstance(data[0], Mapping):
        for number, value in enumerate(data, 1):
            yield from _flat(value, f"{name} {number}")
    else:
        yield name, json.dumps(data)


class _Reader:
    """Parses the file's text, and names the line of an error."""

    def __init__(
        self, text: str, file: str, cases: Mapping[str, Known], brought: Callable[[str], Known | None]
    ) -> None:
        self._text = text
        self._file = file
        self._cases = dict(cases)
        self._brought = brought

    def plan(self, data: dict[str, Any]) -> Plan:
        tables = data.get("sweep")
        if tables is None:
            self._names(data, (*_TABLE, "lab"), None)
            tables, several = [{name: data[name] for name in _TABLE if name in data}], False
        else:
            self._names(data, ("sweep", "lab"), None)
            several = True
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self._refuse("sweep must be tables, each begun by [[sweep]]", "sweep", None)
        sweeps = [self._sweep(table, number if several else None) for number, table in enumerate(tables)]
        if not sweeps:
            self._refuse("a sweep with no points: it has no [[sweep]]", "sweep", None)
        asked: dict[str, Any] = {"sweep": [sweep.asked for sweep in sweeps]}
        lab = self._lab(data["lab"]) if "lab" in data else None
        if lab is not None:
            asked["lab"] = lab
        tasks: dict[str, Task] = {}
        for repetition in range(1, max(sweep.repeat for sweep in sweeps) + 1):
            for sweep in sweeps:
                for point in sweep.points if repetition <= sweep.repeat else ():
                    task = Task(len(tasks), sweep.case, point, repetition, sweep.deadline)
                    tasks.setdefault(task.key, task)
        left_out = sum(sweep.combinations - len(sweep.points) for sweep in sweeps)
        return Plan(self._file, asked, tuple(tasks.values()), left_out, lab)

    def _sweep(self, table: dict[str, Any], number: int | None) -> _Sweep:
        self._names(table, _TABLE, number)
        name = table.get("case")
        if not isinstance(name, str):
            hint = f"known are {', '.join(self._cases)}"
            self._refuse(
                "case must name what is measured" if "case" in table else "no case is named", "case", number, hint=hint
            )
        if name not in self._cases and (brought := self._bring(name, number)) is not None:
            self._cases[name] = brought
        if name not in self._cases:
            self._refuse(f"no case is called {name!r}", "case", number, hint=nearest(name, self._cases))
        case = self._cases[name]
        axes = table.get("axes", {})
        if not isinstance(axes, dict):
            self._refuse("axes must be a table: [axes]", "axes", number)
        axes = dict(axes)
        if "repeat" in axes and "repeat" in table:
            self._refuse("repeat stands among the axes as well as above them", "repeat", number)
        repeat = axes.pop("repeat", table.get("repeat", 1))
        where = "axes" if "repeat" in table.get("axes", {}) else None
        if not isinstance(repeat, int) or isinstance(repeat, bool) or repeat < 0:
            self._refuse(f"repeat is a whole number, not {repeat!r}", "repeat", number, where)
        if repeat == 0:
            self._refuse("a sweep with no points: repeat is 0", "repeat", number, where)
        deadline = table.get("deadline", case.seconds)
        if not isinstance(deadline, int | float) or isinstance(deadline, bool) or not 0 < deadline < float("inf"):
            self._refuse(f"deadline is seconds above 0, not {deadline!r}", "deadline", number)
        chosen = {axis: self._values(name, axis, values, number) for axis, values in axes.items()}
        return _Sweep(
            name,
            {"case": name, "axes": chosen, "repeat": repeat},
            self._cross(case, chosen, number),
            math.prod(map(len, chosen.values())),
            repeat,
            float(deadline),
        )

    def _bring(self, name: str, number: int | None) -> Known | None:
        try:
            return self._brought(name)
        except UsageError as error:
            self._refuse(error.message, "case", number, hint=error.hint)

    def _values(self, case: str, axis: str, values: Any, number: int | None) -> list[Value]:
        if axis not in self._cases[case].axes:
            hint = nearest(axis, self._cases[case].axes)
            self._refuse(f"{case} has no axis {axis!r}", axis, number, "axes", hint=hint)
        listed = values if isinstance(values, list) else [values]
        if not listed:
            self._refuse(f"a sweep with no points: the axis {axis} is empty", axis, number, "axes")
        for value in listed:
            if not isinstance(value, str | int | float):
                self._refuse(f"{axis} has {value!r}; text, numbers, true and false are values", axis, number, "axes")
        return list(dict.fromkeys(listed))

    def _cross(self, case: Known, chosen: Mapping[str, list[Value]], number: int | None) -> list[Point]:
        try:
            return case.cross(chosen)
        except UsageError as error:
            for axis, values in chosen.items():  # only the case can check values: ask it which axis it refuses
                try:
                    case.cross({axis: values})
                except UsageError as alone:
                    if alone.message == error.message:
                        self._refuse(error.message, axis, number, "axes", hint=error.hint)
            self._refuse(f"a sweep with no points: {error.message}", "case", number, hint=error.hint)

    def _lab(self, lab: Any) -> dict[str, Any]:
        if not isinstance(lab, dict):
            self._refuse("lab must be a table: [lab]", "lab", None)
        for name, value in lab.items():
            if name not in _LAB:
                self._refuse(f"a lab has no {name!r}", name, None, "lab", hint=nearest(name, _LAB))
            if not isinstance(value, _LAB[name]) or (isinstance(value, bool) and _LAB[name] is not bool):
                self._refuse(f"{name} of a lab is never {value!r}", name, None, "lab")
        return dict(lab)

    def _names(self, table: Mapping[str, Any], known: tuple[str, ...], number: int | None) -> None:
        for name in table:
            if name not in known:
                hint = nearest(name, known)
                if name in _TABLE:
                    hint = f"with [[sweep]] tables {name} belongs into each of them"
                self._refuse(f"{name!r} means nothing here", name, number, hint=hint)

    def _refuse(
        self, what: str, key: str, number: int | None, table: str | None = None, *, hint: str | None = None
    ) -> NoReturn:
        """Raise a UsageError with the place: the ``number``-th [[sweep]] from 0, if there are several."""
        line = self._line(key, number, table)
        where = self._file if line is None else f"{self._file}: line {line}"
        within = "" if number is None or line is not None else f"[[sweep]] number {number + 1}: "
        raise UsageError(f"{where}: {within}{what}", hint=hint)

    def _line(self, key: str, number: int | None, table: str | None) -> int | None:
        """Return the line where a key of a table is set, or None if it is set in an unsupported form."""
        wanted = ".".join(([] if number is None else ["sweep"]) + ([] if table is None else [table]))
        pattern = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=")
        dotted = re.compile(rf"\s*{re.escape(table or '')}\s*\.\s*[\"']?{re.escape(key)}[\"']?\s*=")
        header, index = "", -1
        for at, line in enumerate(self._text.splitlines(), 1):
            if found := _HEADER.match(line):
                header = found[1].replace(" ", "")
                index += header == "sweep"
                if header == key and table is None and number is None:
                    return at
            elif number is None or index == number:
                outer = wanted.removesuffix(table or "").removesuffix(".")
                if (header == wanted and pattern.match(line)) or (table and header == outer and dotted.match(line)):
                    return at
        return None


@dataclass(frozen=True, slots=True)
class _Sweep:
    case: str
    asked: dict[str, Any]
    points: list[Point]
    combinations: int
    repeat: int
    deadline: float
