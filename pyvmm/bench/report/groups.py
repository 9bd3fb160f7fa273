# SPDX-License-Identifier: Apache-2.0
"""The structure of a run in every report: cases, in each case groups of series with a common scale, in each group rows.

Pure: data to data, and numbers to text. Foreign text is made safe here, so that reports only escape it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from pyvmm.bench.model import Point, Run, Series, Value
from pyvmm.bench.statistics import Summary, merged, summary
from pyvmm.experiment.record import TCG
from pyvmm.reports.words import headline, one_line

CLOCKS: Final = {
    "guest": "the guest's counter",
    "vmm": "the host's clock, in the loop",
    "host": "the host's clock",
    "el2": "the hypervisor's trace",
    "kvm": "KVM's statistics",
    "memory": "memory",
}

_COLUMNS: Final = 3
"""Where more axes vary, a row says what differs from the most frequent point instead of having them all."""

_SCALES: Final = {
    "ns": ((1.0, "ns"), (1e3, "µs"), (1e6, "ms"), (1e9, "s")),
    "instructions": ((1.0, "instructions"), (1e3, "thousand instructions"), (1e6, "million instructions")),
    "bytes": ((1.0, "bytes"), (1024.0, "KiB"), (1024.0**2, "MiB"), (1024.0**3, "GiB")),
}


@dataclass(frozen=True, slots=True)
class Scale:
    """The divisor of shown values, and their unit afterwards."""

    factor: float
    unit: str

    def show(self, value: float | None) -> str:
        """Write a value in this unit, to four digits; an unknown value is a dash."""
        if value is None:
            return "-"
        return f"{int(value):,}" if self.factor == 1 and value == int(value) else number(value / self.factor)


@dataclass(frozen=True, slots=True)
class Row:
    """One series with its statistics; ``cells`` are its values for the group's ``columns``."""

    series: Series
    summary: Summary
    cells: tuple[str, ...]

    @property
    def label(self) -> str:
        """The row's name, on one line."""
        return " ".join(self.cells) or "all"


@dataclass(frozen=True, slots=True)
class Group:
    """The series of one case with the same metric and unit, at different points."""

    case: str
    metric: str
    clock: str
    per: str
    scale: Scale
    columns: tuple[str, ...]
    base: Point
    """What rows have that is not in their cells."""
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """The metric, with its divisor if there is one."""
        return self.metric + (f" per {self.per}" if self.per else "")

    @property
    def clocked(self) -> str:
        """The description of the clock."""
        return CLOCKS.get(self.clock, self.clock)


@dataclass(frozen=True, slots=True)
class Section:
    """A case: its groups, and the points that could not be measured, by reason."""

    case: str
    groups: tuple[Group, ...]
    missing: tuple[tuple[str, tuple[Series, ...]], ...]


def sections(run: Run) -> list[Section]:
    """Return a run's cases, in the order in which they and their metrics first appear.

    Raises BenchError for invalid values.
    """
    cases: dict[str, list[Series]] = {}
    for series in run.series:
        cases.setdefault(str(series.case), []).append(series)
    return [_section(one_line(case), found) for case, found in cases.items()]


def _section(case: str, found: list[Series]) -> Section:
    kinds: dict[tuple[str, ...], list[tuple[Series, Summary]]] = {}
    for series in merged(found):
        kind = (str(series.metric), str(series.clock), str(series.per), str(series.unit))
        kinds.setdefault(kind, []).append((series, summary(series)))
    missing: dict[str, list[Series]] = {}
    for series in found:
        if series.unavailable or not series.kept:
            reason = one_line(str(series.unavailable)) or "it has no values but warm-up"
            missing.setdefault(reason, []).append(series)
    groups = tuple(_group(case, kind, rows) for kind, rows in kinds.items())
    return Section(case, groups, tuple((reason, tuple(some)) for reason, some in missing.items()))


def _group(case: str, kind: tuple[str, ...], rows: Sequence[tuple[Series, Summary]]) -> Group:
    metric, clock, per, unit = map(one_line, kind)
    points = [series.point for series, _ in rows]
    columns, base = columns_of(points)
    scale = scale_of(unit, [said.median for _, said in rows if said.median is not None])
    cells = [cells_of(point, columns, base) for point in points]
    made = tuple(Row(series, said, some) for (series, said), some in zip(rows, cells, strict=True))
    return Group(case, metric, clock, per, scale, columns, base, made)


# -- points as text


def columns_of(points: Sequence[Point]) -> tuple[tuple[str, ...], Point]:
    """Return the axes that vary, as the columns of a table, and the most frequent value of each of the others.

    If too many vary, the columns are ``protection``, if it varies, and the difference from the most frequent point.
    """
    axes = list(dict.fromkeys(axis for point in points for axis in point))
    counts = {axis: Counter(_plain(point.get(axis)) for point in points) for axis in axes}
    varying = [axis for axis in axes if len(counts[axis]) > 1]
    if len(varying) > _COLUMNS:
        varying = [axis for axis in varying if axis == "protection"]
        columns = (*varying, "")
    else:
        columns = tuple(varying)
    values = {axis: {_plain(point.get(axis)): point.get(axis) for point in points} for axis in axes}
    base = {axis: values[axis][counts[axis].most_common(1)[0][0]] for axis in axes if axis not in varying}
    return columns, base


def cells_of(point: Point, columns: Iterable[str], base: Point) -> tuple[str, ...]:
    """Return a row's cells for its point; the column without a name has the difference from ``base``."""
    differs = " ".join(
        f"{one_line(axis)}={value_text(point.get(axis))}"
        for axis in base
        if _plain(point.get(axis)) != _plain(base[axis])
    )
    return tuple(value_text(point.get(axis)) if axis else differs or "(base)" for axis in columns)


def value_text(value: Value) -> str:
    """Write a value of an axis, of the environment or of a note."""
    if value is None:
        return "-"
    return ("yes" if value else "no") if isinstance(value, bool) else one_line(str(value))


def point_of(point: Point) -> str:
    """Write a whole point."""
    return " ".join(f"{one_line(axis)}={value_text(value)}" for axis, value in point.items())


def _plain(value: Value) -> str:
    return f"{type(value).__name__} {value}"


# -- numbers as text


def number(value: float) -> str:
    """Write a number to four digits, whole from 1,000 on, with commas between thousands."""
    if not value:
        return "0"
    digits = 3 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(digits, 0), 9)}f}"


def scale_of(unit: str, values: Iterable[float]) -> Scale:
    """Return the most legible unit for ``values``; all of them get the same."""
    scales = _SCALES.get(unit, ((1.0, unit),))
    sizes = [math.log(abs(value)) for value in values if value]
    # Instructions are shown as whole numbers while a column has room for that.
    least = 100.0 if unit == "instructions" else 1.0
    middle = math.exp(sum(sizes) / len(sizes)) if sizes else 0.0
    return Scale(*next((each for each in reversed(scales[1:]) if middle >= least * each[0]), scales[0]))


def count(series: Summary) -> str:
    """Write the number of values, and of rounds."""
    return f"{series.n:,}" + (f"/{series.rounds}" if series.rounds else "")


def host(run: Run) -> str:
    """Name the host in a few words."""
    told = {name: value for name, value in run.environment.items() if value is not None}
    return headline({name: str(value) if isinstance(value, float) else value for name, value in told.items()})


def is_relative(run: Run) -> bool:
    """Return whether the run's times are only relative. A run that does not say counts as relative."""
    return run.environment.get(TCG, True) is not False
