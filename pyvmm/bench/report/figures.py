# SPDX-License-Identifier: Apache-2.0
"""The figures of a run: distributions of every metric, cost against an axis, parts of the time, maps of ranges.

The HTML report has the same figures as the directory of SVG and PNG files for papers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Final

from pyvmm.bench.model import BenchError, Point, Run
from pyvmm.bench.report import charts, heat, plot
from pyvmm.bench.report.groups import Group, Row, Section, is_relative, point_of, scale_of, sections, value_text
from pyvmm.bench.report.plot import Plot
from pyvmm.bench.split import PARTS, WHOLE
from pyvmm.bench.statistics import require

SIZES: Final = ("size", "memory", "resident")
"""Axes that are how much memory a guest has: MiB, unless K, M or G is behind the number."""
OURS: Final = "pyvmm"
"""Where on the axis ``peer`` we are ourselves."""

ROWS: Final = 30
"""In one chart of distributions."""
LINES: Final = 6
"""In one chart that has a line a series."""
HEATS: Final = 9
"""Pictures of ranges that are drawn of a case."""
_ENOUGH: Final = 20
"""Values from which on a distribution is drawn as a line."""

_MIB: Final = {"": 1.0, "K": 1 / 1024, "M": 1.0, "G": 1024.0}


def pictures(section: Section, *, relative: bool) -> Iterator[Plot]:
    """Return a case's figures; ``relative`` marks them as from a machine under QEMU's TCG."""
    names = _Names(section.case)
    if section.case == "split":
        yield from _split(section, names, relative)
    if section.case == "peer" or any("peer" in group.columns for group in section.groups):
        yield from _peers(section, names, relative)
    for group in section.groups:
        yield from _against(group, names, relative)
    for group in section.groups:
        yield from _distributions(group, names, relative)
    yield from _heats(section, names, relative)


def save(run: Run, directory: str | Path) -> list[Path]:
    """Write all figures of a run, each as SVG and PNG, and return their paths. Makes the directory.

    Raises BenchError if they cannot be written, HostError without matplotlib.
    """
    require()
    where, written = Path(directory), list[Path]()
    try:
        where.mkdir(parents=True, exist_ok=True)
        for section in sections(run):
            for picture in pictures(section, relative=is_relative(run)):
                for ending, made in ((".svg", plot.svg(picture).encode()), (".png", plot.png(picture))):
                    path = where / (picture.name + ending)
                    path.write_bytes(made)
                    written.append(path)
    except OSError as error:
        raise BenchError(f"figures cannot be written to {where}: {error.strerror}") from None
    return written


class _Names:
    """File names: safe, short, and unique in a run because they begin with the case's name."""

    _MOST: Final = 80

    def __init__(self, case: str) -> None:
        self._case, self._taken = case, set[str]()

    def of(self, *words: str) -> str:
        """Return a name made of the case's name and ``words``."""
        plain = re.sub(r"[^A-Za-z0-9_]+", "-", "-".join((self._case, *words))).strip("-_")[: self._MOST] or "figure"
        name, number = plain, 1
        while name in self._taken:
            number += 1
            name = f"{plain}-{number}"
        self._taken.add(name)
        return name


# -- distributions


def _distributions(group: Group, names: _Names, relative: bool) -> Iterator[Plot]:
    what = f"{group.case}: {group.title}"
    parts = [group.rows[at : at + ROWS] for at in range(0, len(group.rows), ROWS)]
    for number, rows in enumerate(parts, 1):
        title = f"{what}: distributions" + (f" ({number} of {len(parts)})" if len(parts) > 1 else "")
        yield Plot(
            names.of(group.metric, "distributions"),
            title,
            "Shade: density (its root); bar: the middle half; circle: median with its 95 % interval; "
            "small circles: outliers, some of them where there are many.",
            partial(charts.rows, group, rows, title, relative=relative),
        )
    some = [row for row in group.rows if row.summary.n >= _ENOUGH]
    if len(some) > LINES:
        some = [row for row in some if "(base)" in row.cells]
    if 2 <= len(some) <= LINES and group.case != "split":
        title = f"{what}: shares"
        yield Plot(
            names.of(group.metric, "shares"),
            title,
            "What share of the values is at most so large (ECDF).",
            partial(charts.cumulative, group, some, title, relative=relative),
        )


# -- against an axis


def _against(group: Group, names: _Names, relative: bool) -> Iterator[Plot]:
    for axis in ("cpus", "pages", *SIZES):
        place = _count if axis in ("cpus", "pages") else _mebibytes
        lines = _lines(group, axis, place)
        title = f"{group.case}: {group.title}, by " + ("number of vCPUs" if axis == "cpus" else axis)
        for at in range(0, len(lines), LINES):
            yield Plot(
                names.of(group.metric, "by", axis),
                title,
                "Medians with their 95 % intervals.",
                partial(
                    charts.against, group, axis, lines[at : at + LINES], title, relative=relative, log=axis != "cpus"
                ),
            )


def _lines(
    group: Group, axis: str, place: Callable[[object], float | None]
) -> list[tuple[str, list[tuple[float, Row]]]]:
    """Return the rows that differ only along an axis: the name of each line, and its rows by their places."""
    found: dict[tuple[tuple[str, str], ...], dict[float, Row]] = {}
    for row in group.rows:
        at = place(row.series.point.get(axis))
        if at is not None:
            rest = tuple((name, value_text(value)) for name, value in row.series.point.items() if name != axis)
            found.setdefault(rest, {}).setdefault(at, row)
    lines = {rest: sorted(points.items()) for rest, points in found.items() if len(points) > 1}
    # Names of lines leave out what all lines have in common.
    varying = [
        name
        for name in dict.fromkeys(name for rest in lines for name, _ in rest)
        if len({dict(rest).get(name) for rest in lines}) > 1
    ]
    return [
        (" ".join(dict(rest).get(name, "-") for name in varying) or "all", points) for rest, points in lines.items()
    ]


def _count(value: object) -> float | None:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _mebibytes(value: object) -> float | None:
    found = re.fullmatch(r"(\d{1,15})([KMG]?)(?:i?B)?", str(value))
    return int(found[1]) * _MIB[found[2]] or None if found else None


# -- where the time goes


def _split(section: Section, names: _Names, relative: bool) -> Iterator[Plot]:
    units = dict.fromkeys((row.series.unit, group.per) for group in section.groups for row in group.rows)
    for unit, per in units:
        medians: dict[str, dict[str, float]] = {}
        counts: dict[str, list[int]] = {}
        for group in section.groups:
            for row in group.rows:
                if (row.series.unit, group.per) == (unit, per) and row.summary.median is not None:
                    label = _without_common(section, row)
                    medians.setdefault(label, {})[group.metric] = row.summary.median
                    counts.setdefault(label, []).append(row.summary.n)
        parts = [part for part in PARTS if any(part in each for each in medians.values())]
        bars = [
            (label, each, each.get(WHOLE), min(counts[label]))
            for label, each in medians.items()
            if set(each) & set(parts)
        ]
        if bars:
            scale = scale_of(unit, [whole or max(each.values()) for _, each, whole, _ in bars])
            what = f"time per {per}" if per else "time"
            title = f"split: where the {what.replace('time', 'time goes', 1)}"
            yield Plot(
                names.of("stacked"),
                title,
                "Medians of the parts, stacked; beneath them the whole as it was measured. Parts that were not "
                "available are missing from the sum.",
                partial(charts.split, bars, parts, scale, what, title, relative=relative),
            )


def _without_common(section: Section, row: Row) -> str:
    """Write a row's point by the axes that vary in its case."""
    points = [other.series.point for group in section.groups for other in group.rows]
    point = row.series.point
    varying: Point = {name: value for name, value in point.items() if any(other.get(name) != value for other in points)}
    return point_of(varying) or point_of(point) or "all"


# -- peers


def _peers(section: Section, names: _Names, relative: bool) -> Iterator[Plot]:
    kinds = dict.fromkeys((row.series.unit, group.per) for group in section.groups for row in group.rows)
    for unit, per in kinds:
        rows = [
            (group, row)
            for group in section.groups
            for row in group.rows
            if (row.series.unit, group.per) == (unit, per) and ("peer" in row.series.point or section.case == "peer")
        ]
        metrics = dict.fromkeys(group.metric for group, _ in rows)
        ours = {_rest(group, row): row for group, row in rows if row.series.point.get("peer") == OURS}
        bars = []
        for group, row in rows[:ROWS]:
            mine = ours.get(_rest(group, row))
            times = None
            if mine is not None and mine.summary.median and row.summary.median is not None:
                times = row.summary.median / mine.summary.median if mine is not row else 1.0
            bars.append((_peer(section, group, row, several=len(metrics) > 1), row, times))
        if len(bars) > 1:
            scale = scale_of(unit, [row.summary.median for _, row, _ in bars if row.summary.median is not None])
            what = (next(iter(metrics)) if len(metrics) == 1 else "cost") + (f" per {per}" if per else "")
            title = f"{section.case}: {what}, by who does it"
            yield Plot(
                names.of("peers", per),
                title,
                "Medians with their 95 % intervals; ours in another colour.",
                partial(charts.peers, bars, scale, what, title, relative=relative),
            )


def _peer(section: Section, group: Group, row: Row, *, several: bool) -> str:
    """Name a peer, and its operation if operations vary. For pyvmm, name the peer that it took turns with."""
    point = {name: value_text(value) for name, value in row.series.point.items()}
    who, beside = point.pop("peer", ""), point.pop("beside", "")
    points = [other.series.point for group in section.groups for other in group.rows]
    what = [value for name, value in point.items() if any(value_text(other.get(name)) != value for other in points)]
    name = f"{who} beside {beside}" if who == OURS and beside else who
    return ", ".join(each for each in (name, group.metric if several else "", *what) if each) or "all"


def _rest(group: Group, row: Row) -> tuple[str, ...]:
    return (
        group.metric,
        *(f"{name}={value_text(value)}" for name, value in row.series.point.items() if name != "peer"),
    )


# -- pictures of ranges


def _heats(section: Section, names: _Names, relative: bool) -> Iterator[Plot]:
    for group, row in _chosen(section):
        cells = zip(group.columns, row.cells, strict=True)
        point = " ".join(f"{name}={cell}" if name else cell for name, cell in cells)
        title = f"{section.case}: {group.metric}, page by page" + (f", {point}" if point else "")
        yield Plot(
            names.of(group.metric, "pages", row.label),
            title,
            "The last round: a page's touch from its begin to its end. Where several fall together the dearest is "
            "shown.",
            partial(heat.draw, row, group.scale, title, relative=relative),
        )


def pictured(section: Section) -> list[tuple[Group, Row]]:
    """Return the series of a case that have the address and time of each value."""
    return [(group, row) for group in section.groups for row in group.rows if heat.has_places(row.series)]


def _chosen(section: Section) -> list[tuple[Group, Row]]:
    """Choose the most important, equally many of each protection: the base, orders and numbers of vCPUs, others."""

    def telling(pair: tuple[Group, Row]) -> int:
        words = pair[1].cells[-1:] or ("",)
        return 0 if words[0] == "(base)" else 1 if words[0].startswith(("order=", "cpus=")) else 2

    found: dict[str, list[tuple[Group, Row]]] = {}
    for pair in sorted(pictured(section), key=telling):
        found.setdefault(value_text(pair[1].series.point.get("protection")), []).append(pair)
    by_turns = zip_longest(*found.values())
    return [pair for turn in by_turns for pair in turn if pair is not None][:HEATS]
