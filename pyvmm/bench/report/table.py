# SPDX-License-Identifier: Apache-2.0
"""A run for the terminal: a table for each case and metric, a row for each point, with every supported statistic.

Pure; foreign text cannot control the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from pyvmm.bench.model import Run
from pyvmm.bench.report.groups import Group, Row, Section, count, host, is_relative, number, point_of, sections
from pyvmm.labenv import TCG_NOTE
from pyvmm.reports.look import PLAIN, Look

BOLD, DIM, STRIPE = "1", "2", "33;1"
FEW: Final = "~"
"""Before an interval that is of few rounds."""

RATIO: Final = "ratio"
"""The column of a group in which pyvmm was measured beside a peer."""
RATIO_NOTE: Final = "pyvmm's to that of what it is beside, the median over turns of both"

_LEAST: Final = ("p90", "out", "p99.9", "max", "p99", "95 % CI")
"""Columns that are left out of a narrow table, the first of them first."""
_REASON: Final = 400
_RATIOS: Final = 1e9
"""Beyond this a ratio was not measured, whatever a file says; nor is it one that is not a number."""

Cell = Callable[[Row, Group], str]
_CELLS: Final[dict[str, Cell]] = {
    "n": lambda row, _: count(row.summary),
    "median": lambda row, group: group.scale.show(row.summary.median),
    "95 % CI": lambda row, group: interval(row, group),
    "p90": lambda row, group: group.scale.show(row.summary.p90),
    "p99": lambda row, group: group.scale.show(row.summary.p99),
    "p99.9": lambda row, group: group.scale.show(row.summary.p999),
    "max": lambda row, group: group.scale.show(row.summary.maximum),
    "out": lambda row, _: f"{row.summary.outliers:,}",
}
NOTES: Final = {
    "n": "n: values/rounds, warm-up left out",
    "95 % CI": "CI: of the median, by bootstrap over rounds",
    "out": "out: outliers, beyond Q3 + 3 IQR; they count in everything",
}


def text(run: Run, look: Look = PLAIN) -> str:
    """Return the text of a whole run. Raises BenchError for invalid values, HostError without numpy."""
    lines = [host(run)]
    if is_relative(run):
        lines.append(look.paint(f"== {TCG_NOTE} ".ljust(min(look.width, 60), "="), STRIPE))
    if run.end is None:
        lines.append(look.paint("cut off: the run was not whole, this is what it had measured", STRIPE))
    found = sections(run)
    for section in found:
        lines += ["", *_section(section, look, relative=is_relative(run))]
    if not found:
        lines += ["", "no series: nothing was measured"]
    if any(section.groups for section in found):
        lines += ["", *(look.paint(each, DIM) for note in _notes(found) for each in look.wrap(note, 0))]
    shown = "\n".join(each.rstrip() for each in lines)
    return look.finish(shown.replace("µ", "u") if look.ascii else shown)


def interval(row: Row, group: Group) -> str:
    """Write the median's interval, marked if it is of few rounds."""
    summary = row.summary
    if summary.low is None:
        return "-"
    mark = FEW if summary.few else ""
    return f"{mark}[{group.scale.show(summary.low)}, {group.scale.show(summary.high)}]"


def ratio(row: Row) -> str:
    """Write the ratio of pyvmm's time to its peer's in the same turn; an unknown ratio is a dash."""
    value = row.series.notes.get(f"ratio to {row.series.point.get('beside')}")
    return number(value) if isinstance(value, int | float) and 0 < value < _RATIOS else "-"


def has_ratio(group: Group) -> bool:
    """Return whether any of a group's rows has a ratio."""
    return any(ratio(row) != "-" for row in group.rows)


def _notes(found: Sequence[Section]) -> list[str]:
    notes = [*NOTES.values()]
    groups = [group for section in found for group in section.groups]
    if any(map(has_ratio, groups)):
        notes.append(f"{RATIO}: {RATIO_NOTE}")
    rows = [row for group in groups for row in group.rows]
    if any(row.summary.few for row in rows):
        notes.append(f"{FEW}: of fewer than 6 rounds, so that the interval may be too narrow")
    return ["; ".join(notes)]


def _section(section: Section, look: Look, *, relative: bool) -> list[str]:
    lines = [look.paint(section.case, BOLD)]
    for group in section.groups:
        lines += _group(group, look, relative=relative)
    for reason, missing in section.missing:
        short = reason if len(reason) <= _REASON else reason[:_REASON] + "…"
        lines += [look.paint(each, STRIPE) for each in look.wrap(f"not available: {short}", 4, "  ")]
        names = list(dict.fromkeys(point_of(series.point) for series in missing))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines += [look.paint(each, DIM) for each in look.wrap("; ".join(names[:3]) + more, 4, "    ")]
    return lines


def _group(group: Group, look: Look, *, relative: bool) -> list[str]:
    what = f"{group.title}, {group.scale.unit}, {group.clocked}" + (f", {TCG_NOTE}" if relative else "")
    lines = [look.paint(each, BOLD) for each in look.wrap(what, 4, "  ")]
    if group.base:
        at = ("base: " if "" in group.columns else "at ") + point_of(group.base)
        lines += [look.paint(each, DIM) for each in look.wrap(at, 4, "    ")]
    names = [name if name else "differs in" for name in group.columns]
    labels = [list(row.cells) for row in group.rows]
    extra: dict[str, Cell] = {RATIO: lambda row, _: ratio(row)} if has_ratio(group) else {}
    shown, left_out = {**extra, **_CELLS}, iter(_LEAST)
    while True:
        cells = [[cell(row, group) for cell in shown.values()] for row in group.rows]
        drawn = grid([*names, *shown], [[*label, *some] for label, some in zip(labels, cells, strict=True)], len(names))
        least = next(left_out, None) if max(map(len, drawn)) > look.width else None
        if least is None:
            return [*lines, look.paint(drawn[0], DIM), *drawn[1:]]
        del shown[least]


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Align cells in columns, the first ``left`` of them to the left; every line is indented."""
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]
    return [
        "    "
        + "  ".join(
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
