# SPDX-License-Identifier: Apache-2.0
"""The data of benchmark results: plain values, and their JSON lines. Nothing is dropped.

A results file is JSON lines. The first is the header: the format, the environment, the request. Then one line follows
for each :class:`Series`. The last line marks the run as complete. A file without it is of an aborted run, but its
series are valid.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Self

from pyvmm.errors import PyvmmError
from pyvmm.experiment.record import renamed
from pyvmm.syntax.foreign import load_json

FORMAT: Final = 2
"""Of the file. Format 1, whose environment had ``emulated`` for ``tcg``, is still read; others are refused."""

ROUNDS: Final = 7
"""Rounds of a point unless another number is asked for: one for warm-up, and six, the minimum for an interval."""

Value = str | int | float | bool | None
Point = dict[str, Value]
"""A series' value on each axis of its case. Case, point and metric identify a series."""


class BenchError(PyvmmError):
    """A benchmark cannot be run, stored, read or compared. The message has the details."""


@dataclass(frozen=True, slots=True)
class Series:
    """Raw values of one metric at one point of one case, in the order of measuring.

    ``clock`` says which clock they come from: ``guest`` (CNTVCT in the guest), ``vmm`` (CLOCK_MONOTONIC in the native
    loop), ``host`` (CLOCK_MONOTONIC around a call), ``el2`` (the hypervisor's trace buffer), ``kvm`` (KVM's
    statistics) or ``memory``. ``unit`` is ``ns``, ``instructions`` (where time counts them), ``bytes`` or ``count``;
    values are per ``per``: a page, an exit, a call. The first ``warmup`` values are warm-up by ``rule``: they are kept,
    but excluded from every statistic. ``rounds`` has the number of values of each round, including warm-up. A round is
    a fresh range of memory or a fresh guest, and values within one are not independent. Series with a picture have
    ``places`` (page numbers in the accessed range) and ``began`` (ns since its first access). ``unavailable`` is the
    reason for a series without values.
    """

    case: str
    point: Point
    metric: str
    clock: str
    unit: str
    per: str
    values: tuple[float, ...] = ()
    warmup: int = 0
    rule: str = ""
    rounds: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    began: tuple[float, ...] = ()
    unavailable: str = ""
    notes: dict[str, Value] = field(default_factory=dict)

    @property
    def kept(self) -> tuple[float, ...]:
        """The values for statistics: all except the warm-up."""
        return self.values[self.warmup :]

    @property
    def once(self) -> bool:
        """Whether it has one value and its case takes no more of them in a run."""
        return self.rounds == (1,) and not self.warmup

    @property
    def repeats(self) -> float:
        """The share by which its only value differs between runs at most, as its case says; 0 if it does not say."""
        said = self.notes.get(REPEATS, 0.0)
        return float(said) if self.once and isinstance(said, int | float) else 0.0

    @property
    def key(self) -> tuple[Value, ...]:
        """The identity of a series: equal in two runs if both measured the same."""
        axes = (f"{axis}={self.point[axis]}" for axis in sorted(self.point))
        return (self.case, self.metric, self.clock, self.per, *axes)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without empty fields."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if value not in ((), {}, "", 0) or name in _ALWAYS}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Convert plain values back. Raises BenchError for unknown fields."""
        try:
            lists = {name: tuple(data[name]) for name in _LISTS if name in data}
            return cls(**{**data, **lists})
        except TypeError as error:
            raise BenchError(f"an invalid series: {error}") from None


REPEATS = "repeats within"
"""A note: the share by which a value that is measured once differs between runs at most."""

_LISTS = ("values", "rounds", "places", "began")
_ALWAYS = ("case", "point", "metric", "clock", "unit", "per", "values")


@dataclass(frozen=True, slots=True)
class Run:
    """A whole results file."""

    environment: dict[str, Value]
    asked: dict[str, Any]
    series: tuple[Series, ...]
    end: dict[str, Value] | None = None
    """The last line's contents (``seconds``, ``date``); None for an aborted run."""

    def with_series(self, series: Iterable[Series]) -> Run:
        """Return a run of the same environment with ``series`` instead of its own."""
        return replace(self, series=tuple(series))


def header(environment: Mapping[str, Value], asked: Mapping[str, Any]) -> str:
    """Return a results file's first line."""
    return _line({"pyvmm bench": FORMAT, "environment": dict(environment), "asked": dict(asked)})


def line(series: Series) -> str:
    """Return the line of one series."""
    return _line({"series": series.to_json()})


def footer(end: Mapping[str, Value]) -> str:
    """Return the last line of a complete run."""
    return _line({"end": dict(end)})


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":")) + "\n"


def parse(lines: Iterable[str], name: str) -> Run:
    """Parse the lines of the results file ``name``.

    Raises BenchError if it is not a results file, has another format, or is damaged before its last line.
    """
    head: dict[str, Any] | None = None
    series: list[Series] = []
    end: dict[str, Value] | None = None
    texts = list(lines)
    for number, text in enumerate(texts, 1):
        data, why = None, "no object"
        try:
            data = load_json(text)
        except ValueError as error:
            why = str(error)
        if not isinstance(data, dict):
            if head is not None and number == len(texts):
                break  # an aborted run ended within a line
            raise BenchError(f"{name}: line {number} is not of a benchmark's results: {why}")
        if head is None:
            head = _header(data, name)
        elif "series" in data:
            try:
                series.append(Series.from_json(data["series"]))
            except BenchError as error:
                raise BenchError(f"{name}: line {number}: {error.message}") from None
        elif "end" in data:
            end = data["end"]
    if head is None:
        raise BenchError(f"{name} is empty: no benchmark's results", hint="pyvmm bench --json FILE writes them")
    return Run(head["environment"], head.get("asked", {}), tuple(series), end)


def _header(data: dict[str, Any], name: str) -> dict[str, Any]:
    theirs = data.get("pyvmm bench")
    if theirs not in (1, FORMAT):
        raise BenchError(
            f"{name}: its format is {'none' if theirs is None else theirs}, this pyvmm reads 1 and {FORMAT}",
            hint="measure again, or read it with the pyvmm that wrote it",
        )
    if not isinstance(data.get("environment"), dict) or not isinstance(data.get("asked", {}), dict):
        raise BenchError(f"{name}: line 1 is not of a benchmark's results: no environment, or nothing asked for")
    return data | {"environment": renamed(data["environment"])} if theirs == 1 else data


def read(path: str) -> Run:
    """Read the results file at ``path``. A file without its last line is read as far as it goes.

    Raises BenchError if the file cannot be read, does not hold results, or has an unknown format.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return parse(file, path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise BenchError(f"{path} cannot be read: {reason}") from None
