# SPDX-License-Identifier: Apache-2.0
"""What a benchmark's results are made of: plain values, and the JSON lines they are kept in. Nothing is dropped.

A results file is JSON lines. The first is the header: the format, the environment, what was asked for. Then one line
for each :class:`Series` as it was measured, and one last line that says that the run was whole. A file without the
last line is of a run that was cut off; what it has is good all the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Self

from pyvmm.errors import PyvmmError
from pyvmm.experiment.record import renamed

FORMAT: Final = 2
"""Of the file. Format 1, whose environment had ``emulated`` for ``tcg``, is still read; others are refused."""

Value = str | int | float | bool | None
Point = dict[str, Value]
"""The axes of a case and where on each a series was measured; with case and metric it says what was measured."""


class BenchError(PyvmmError):
    """A benchmark that cannot be run, kept, read or compared: the message says which."""


@dataclass(frozen=True, slots=True)
class Series:
    """Values of one metric at one point of one case, raw and in the order they were measured.

    ``clock`` says which clock they come from: ``guest`` (CNTVCT in the guest), ``vmm`` (CLOCK_MONOTONIC in the native
    loop), ``host`` (CLOCK_MONOTONIC around a call), ``el2`` (the hypervisor's trace buffer), ``kvm`` (KVM's
    statistics) or ``memory``. ``unit`` is ``ns``, ``instructions`` (where time counts them), ``bytes`` or ``count``;
    values are per ``per``: a page, an exit, a call. ``warmup`` values at the beginning are warm-up by ``rule``: kept,
    and left out of every statistic. ``rounds`` says how many values each round brought, warm-up included; a round is a
    fresh range of memory or a fresh guest, and values within one are not independent. ``places`` and ``began`` are
    there where a series has a picture: page numbers in the range touched, and ns since its first touch.
    ``unavailable`` says why there are no values, where there are none.
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
        """The values that statistics are made of: all but the warm-up."""
        return self.values[self.warmup :]

    @property
    def key(self) -> tuple[Value, ...]:
        """What must be the same in two runs for their values to be of the same thing."""
        axes = (f"{axis}={self.point[axis]}" for axis in sorted(self.point))
        return (self.case, self.metric, self.clock, self.per, *axes)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; what is empty is left out."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if value not in ((), {}, "", 0) or name in _ALWAYS}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the series again; unknown fields are refused with BenchError."""
        try:
            lists = {name: tuple(data[name]) for name in _LISTS if name in data}
            return cls(**{**data, **lists})
        except TypeError as error:
            raise BenchError(f"a series that is none: {error}") from None


_LISTS = ("values", "rounds", "places", "began")
_ALWAYS = ("case", "point", "metric", "clock", "unit", "per", "values")


@dataclass(frozen=True, slots=True)
class Run:
    """A whole results file."""

    environment: dict[str, Value]
    asked: dict[str, Any]
    series: tuple[Series, ...]
    end: dict[str, Value] | None = None
    """What the last line says (``seconds``, ``date``); None for a run that was cut off."""

    def with_series(self, series: Iterable[Series]) -> Run:
        """Return a run of the same environment with other series."""
        return replace(self, series=tuple(series))


def header(environment: Mapping[str, Value], asked: Mapping[str, Any]) -> str:
    """Return a results file's first line."""
    return _line({"pyvmm bench": FORMAT, "environment": dict(environment), "asked": dict(asked)})


def line(series: Series) -> str:
    """Return the line of one series."""
    return _line({"series": series.to_json()})


def footer(end: Mapping[str, Value]) -> str:
    """Return the last line of a run that was whole."""
    return _line({"end": dict(end)})


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":")) + "\n"


def parse(lines: Iterable[str], name: str) -> Run:
    """Return the run that the lines of the file ``name`` tell.

    Raises BenchError for what is no results file, is of another format, or is damaged elsewhere than in its last line.
    """
    head: dict[str, Any] | None = None
    series: list[Series] = []
    end: dict[str, Value] | None = None
    texts = list(lines)
    for number, text in enumerate(texts, 1):
        try:
            data = json.loads(text)
            if not isinstance(data, dict):
                raise ValueError("no object")
        except ValueError as error:
            if head is not None and number == len(texts):
                break  # a run that was cut off in the middle of a line
            raise BenchError(f"{name}: line {number} is not of a benchmark's results: {error}") from None
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
    """Return the run that a file holds. Raises BenchError where it cannot be read or is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return parse(file, path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise BenchError(f"{path} cannot be read: {reason}") from None
