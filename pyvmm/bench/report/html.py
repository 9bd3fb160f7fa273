# SPDX-License-Identifier: Apache-2.0
"""A run as one self-contained HTML file: the host, tables, figures, and the results themselves.

Pure: data to text. Foreign text is escaped, and a policy in the page allows only the page's own script.
The text is ASCII, so every encoding gives the same file. The same run gives the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from pyvmm.bench.model import Run, Series
from pyvmm.bench.report import embedded, figures, plot, style
from pyvmm.bench.report.groups import (
    Group,
    Row,
    Section,
    count,
    host,
    is_relative,
    point_of,
    sections,
    value_text,
)
from pyvmm.bench.report.table import RATIO, RATIO_NOTE, has_ratio, interval, ratio
from pyvmm.bench.statistics import FEW, RESAMPLES, require
from pyvmm.labenv import TCG_NOTE
from pyvmm.reports.escaping import escaped
from pyvmm.reports.page import facts, file_name, page

_CELLS: Final[dict[str, Callable[[Row, Group], str]]] = {
    "median": lambda row, group: group.scale.show(row.summary.median),
    "95 % CI": interval,
    "n": lambda row, _: count(row.summary),
    "min": lambda row, group: group.scale.show(row.summary.minimum),
    "mean": lambda row, group: group.scale.show(row.summary.mean),
    "p90": lambda row, group: group.scale.show(row.summary.p90),
    "p99": lambda row, group: group.scale.show(row.summary.p99),
    "p99.9": lambda row, group: group.scale.show(row.summary.p999),
    "max": lambda row, group: group.scale.show(row.summary.maximum),
    "outliers": lambda row, _: f"{row.summary.outliers:,}",
}
_HOWTO: Final = {
    "n": "values/rounds. A round is a fresh range of memory or a fresh guest. Warm-up is left out by the rule that the "
    "results tell; nothing else is.",
    "median, 95 % CI": f"percentile bootstrap of {RESAMPLES:,} samples with a fixed seed; where there are several "
    "rounds whole rounds are drawn, as values within one are not independent. "
    f"~ marks an interval of fewer than {FEW} rounds, which may be too narrow.",
    "p90, p99, p99.9": "where there are 10, 100, 1,000 values at least; else a dash.",
    "outliers": "values above the third quartile by more than three times the interquartile range. They are counted in "
    "everything and drawn.",
    RATIO: f"{RATIO_NOTE}.",
}
_NAMES: Final = 6
"""Points named that could not be measured for one reason."""


def render(run: Run) -> str:
    """Return the page. Raises BenchError for invalid values, HostError if a needed package is not installed."""
    require()
    made = _Page(run)
    return page(f"{host(run)} - pyvmm bench", style.CSS, style.SCRIPT, made.parts())


class _Page:
    def __init__(self, run: Run) -> None:
        self._run, self._sections, self._relative = run, sections(run), is_relative(run)
        self._figures = 0

    def parts(self) -> Iterable[str]:
        """Yield the page's body, piece by piece."""
        yield from self._header()
        for number, section in enumerate(self._sections):
            yield from self._section(section, f"case-{number}")
        yield from self._footer()
        yield embedded.element(self._run)

    # -- above the cases

    def _header(self) -> Iterable[str]:
        environment = self._run.environment
        kernel, mode = (value_text(environment.get(name)) for name in ("kernel", "mode"))
        yield '<header><p class="kicker">pyvmm bench</p>'
        yield f"<h1>{escaped(f'What guest memory costs on Linux {kernel}, KVM in {mode} mode')}</h1>"
        if self._relative:
            yield f'<p class="stripe">{TCG_NOTE}.</p>'
        if self._run.end is None:
            yield '<p class="stripe">Cut off: the run was not whole; this is what it had measured.</p>'
        told = [(name, value_text(value)) for name, value in environment.items()]
        told += [(f"asked: {name}", _asked(value)) for name, value in self._run.asked.items() if value]
        told += [(name, value_text(value)) for name, value in (self._run.end or {}).items()]
        listed = facts((name, value or "(empty)") for name, value in told)
        yield f'</header><div class="top"><dl class="facts">{listed}</dl>'
        yield from self._contents()
        yield "</div>"
        howto = facts(_HOWTO.items())
        yield f'<details class="howto"><summary>How to read this</summary><dl class="facts">{howto}</dl></details>'
        if not self._sections:
            yield "<p>No series: nothing was measured.</p>"

    def _contents(self) -> Iterable[str]:
        yield '<nav><table class="toc"><thead><tr><td></td><th scope="col">series</th><th scope="col">values</th>'
        yield '<th scope="col">not available</th></tr></thead><tbody>'
        for number, section in enumerate(self._sections):
            rows = [row for group in section.groups for row in group.rows]
            missing = sum(len(some) for _, some in section.missing)
            yield f'<tr><th scope="row"><a href="#case-{number}">{escaped(section.case) or "(empty)"}</a></th>'
            yield f"<td>{len(rows):,}</td><td>{sum(row.summary.n for row in rows):,}</td><td>{missing:,}</td></tr>"
        yield "</tbody></table></nav>"

    def _footer(self) -> Iterable[str]:
        yield "<footer><p>"
        name = escaped(file_name("bench", self._run.environment.get("kernel"), ".jsonl"))
        yield f'<span class="js"><a id="_download" href="#" download="{name}">Download the results</a> as JSON lines: '
        yield "</span>they are in this page's source, in the element <code>_data</code>. "
        yield "<code>pyvmm bench report FILE.html</code> reads them, "
        yield "<code>pyvmm bench compare A.jsonl B.jsonl</code> compares two runs.</p></footer>"

    # -- a case

    def _section(self, section: Section, anchor: str) -> Iterable[str]:
        yield f'<section><h2 id="{anchor}"><a href="#{anchor}">{escaped(section.case) or "(empty)"}</a></h2>'
        for group in section.groups:
            yield from self._group(group)
        for reason, missing in section.missing:
            yield f'<p class="missing">not available: {escaped(reason)}{_points(missing)}</p>'
        drawn = [self._figure(picture) for picture in figures.pictures(section, relative=self._relative)]
        if drawn:
            yield '<div class="figures">'
            yield from drawn
            yield "</div>"
        more = len(figures.pictured(section)) - figures.HEATS
        if more > 0:
            yield f'<p class="at">Of {more} more series there are pictures of pages in the results, not drawn here.</p>'
        yield "</section>"

    def _group(self, group: Group) -> Iterable[str]:
        relative = f'<span class="relative">{TCG_NOTE}</span>' if self._relative else ""
        unit = escaped(f"{group.scale.unit}, {group.clocked}")
        yield f"<h3>{escaped(group.title)}<small>{unit}</small>{relative}</h3>"
        if group.base:
            words = "base: " if "" in group.columns else "at "
            yield f'<p class="at">{words}{escaped(point_of(group.base))}</p>'
        names = "".join(f'<th scope="col" class="name">{escaped(name or "differs in")}</th>' for name in group.columns)
        extra: dict[str, Callable[[Row, Group], str]] = {RATIO: lambda row, _: ratio(row)} if has_ratio(group) else {}
        columns = {**extra, **_CELLS}
        heads = "".join(f'<th scope="col">{name}</th>' for name in columns)
        yield f'<div class="wide"><table class="numbers"><thead><tr>{names}{heads}</tr></thead><tbody>'
        for row in group.rows:
            cells = "".join(f'<td class="name">{escaped(cell)}</td>' for cell in row.cells)
            for name, cell in columns.items():
                shown = escaped(cell(row, group))
                cells += f"<td><b>{shown}</b></td>" if name == "median" else f"<td>{shown}</td>"
            yield f'<tr title="{escaped(_told(row.series))}">{cells}</tr>'
        yield "</tbody></table></div>"

    def _figure(self, picture: plot.Plot) -> str:
        self._figures += 1
        drawn = plot.inline(plot.svg(picture), f"f{self._figures}", escaped(picture.title))
        return f"<figure>{drawn}<figcaption>{escaped(picture.caption)}</figcaption></figure>"


def _asked(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{axis}={_asked(values)}" for axis, values in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "yes" if value is True else str(value)


def _told(series: Series) -> str:
    """Say of a series what has no column."""
    parts = [point_of(series.point)]
    if series.warmup:
        parts.append(f"{series.warmup:,} values of warm-up left out" + (f" ({series.rule})" if series.rule else ""))
    return "; ".join([*parts, *(f"{name}: {value_text(value)}" for name, value in series.notes.items())])


def _points(missing: Iterable[Series]) -> str:
    names = list(dict.fromkeys(point_of(series.point) for series in missing))
    more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
    return f"<small>{escaped('; '.join(names[:_NAMES]) + more)}</small>" if any(names) else ""
