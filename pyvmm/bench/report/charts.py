# SPDX-License-Identifier: Apache-2.0
"""The charts of a benchmark: each function draws series. See
:mod:`pyvmm.bench.report.figures`.

A drawing's size does not depend on the number of values: it has quantiles, histograms or cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pyvmm.bench import statistics
from pyvmm.bench.report import plot
from pyvmm.bench.report.groups import Group, Row, Scale, count, number

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_SPAN: Final = 20
"""From this factor between the largest and the least on an axis is logarithmic."""
_BINS: Final = 50
_STEPS: Final = 200
"""Quantiles that a distribution's line is drawn through."""
_POINTS: Final = 40
"""Outliers drawn of one series: the largest, and others evenly between; all are counted."""
_ENOUGH: Final = 20
"""Values from which on a density is drawn; fewer are drawn one by one."""
_ROW: Final = 0.27
"""Inches a row of a chart is high."""
_AXES: Final = {
    "cpus": "vCPUs",
    "size": "size, MiB (log scale)",
    "memory": "memory, MiB (log scale)",
    "resident": "resident, MiB (log scale)",
    "pages": "pages (log scale)",
}


def _floor(values: Floats) -> float | None:
    """Return the minimum of a logarithmic axis if the values need one, because of their range.

    Returns None for a linear axis. A logarithmic axis cannot show zeros, so they are drawn at the minimum.
    """
    positive = values[values > 0]
    if values.min() < 0 or not len(positive) or positive.max() / positive.min() <= _SPAN:
        return None
    return float(positive.min() / (2 if values.min() == 0 else 1))


def _axis(axes: Axes, group: Group, *, log: bool, zeros: bool = False, which: str = "x") -> None:
    words = f"{group.title}, {group.scale.unit}"
    if log:
        words += " (log scale, 0 at the edge)" if zeros else " (log scale)"
    (axes.set_xlabel if which == "x" else axes.set_ylabel)(plot.safe(plot.shortened(words, 80)))
    (plot.plain_log if log else plot.plain)(axes, which)


def rows(group: Group, some: Sequence[Row], title: str, *, relative: bool) -> Figure:
    """Draw a row a series: its density, the middle half as a bar, the median with its interval, outliers as points."""
    import numpy as np

    values = [statistics.values(row.series) / group.scale.factor for row in some]
    labels = [plot.safe(plot.shortened(row.label)) for row in some]
    beside = [_beside(row, group.scale) for row in some]
    height = 1.3 + _ROW * len(some)
    right = 0.25 + 0.061 * max(map(len, beside))
    figure, axes = plot.paper(title, height, relative=relative, left=plot.margin(labels), right=right)
    everything = np.concatenate(values)
    floor = _floor(everything)
    low, high = float(everything.min()), float(everything.max())
    # A row of equal values has a width of its own, so that an axis of nothing else is not one point.
    axes.set_xlim(*(_padded(low, high) if floor is None else (floor / 1.15, high * 1.15)))
    for at, (row, mine, words) in enumerate(zip(some, values, beside, strict=True)):
        _density(axes, mine, at, floor)
        _one(axes, row, mine, at, group.scale, floor)
        axes.text(1.01, at, words, transform=axes.get_yaxis_transform(), va="center", size=7.5)
    axes.set_yticks(range(len(some)), labels)
    axes.set_ylim(len(some) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    _axis(axes, group, log=floor is not None, zeros=low == 0)
    return figure


def _beside(row: Row, scale: Scale) -> str:
    said = f"{scale.show(row.summary.median)} · n={count(row.summary)}"
    return said + (f" · {row.summary.outliers:,} out" if row.summary.outliers else "")


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _density(axes: Axes, mine: Floats, at: int, floor: float | None) -> None:
    import numpy as np

    log = floor is not None
    mine = mine if floor is None else np.maximum(mine, floor)
    low, high = float(mine.min()), float(mine.max())
    if len(mine) < _ENOUGH:
        axes.plot(mine, np.full(len(mine), at), "o", color=plot.COLOURS[0], markersize=3, alpha=0.6)
    if low == high or len(mine) < _ENOUGH:
        return
    edges = np.geomspace(low, high, _BINS + 1) if log else np.linspace(low, high, _BINS + 1)
    counts, _ = np.histogram(mine, edges)
    # The root, so that the few in the tail can be seen beside the many.
    tall = np.concatenate(((0.0,), 0.4 * np.sqrt(counts / counts.max()), (0.0,)))
    middles = np.sqrt(edges[1:] * edges[:-1]) if log else (edges[1:] + edges[:-1]) / 2
    places = np.concatenate((edges[:1], middles, edges[-1:]))
    some = (tall > 0) | (np.roll(tall, 1) > 0) | (np.roll(tall, -1) > 0)  # no points along nothing
    axes.fill_between(places[some], at - tall[some], at + tall[some], color=plot.COLOURS[0], alpha=0.25, linewidth=0)


def _one(axes: Axes, row: Row, mine: Floats, at: int, scale: Scale, floor: float | None) -> None:
    import numpy as np

    least = -math.inf if floor is None else floor
    q1, median, q3 = np.maximum(np.quantile(mine, (0.25, 0.5, 0.75)), least)
    axes.hlines(at, q1, q3, color=plot.COLOURS[0], linewidth=4)
    if row.summary.low is not None and row.summary.high is not None:
        low, high = (max(end / scale.factor, least) for end in (row.summary.low, row.summary.high))
        axes.hlines(at, low, high, color=plot.INK, linewidth=1.2)
        axes.vlines((low, high), at - 0.18, at + 0.18, color=plot.INK, linewidth=1.2)
    axes.plot(median, at, "o", color=plot.INK, markersize=4, markerfacecolor=plot.PAPER, markeredgewidth=1.2)
    if row.summary.outliers and row.summary.fence is not None:
        out = np.sort(mine[mine > row.summary.fence / scale.factor])
        if len(out) > _POINTS:
            out = out[np.linspace(0, len(out) - 1, _POINTS).astype(np.int64)]
        axes.plot(
            out,
            np.full(len(out), at),
            "o",
            color=plot.COLOURS[1],
            markersize=3,
            markerfacecolor="none",
            markeredgewidth=0.7,
        )


def cumulative(group: Group, some: Sequence[Row], title: str, *, relative: bool) -> Figure:
    """Draw what share of each series' values is at most so large."""
    import numpy as np

    labels = [f"{plot.shortened(row.label, 40)}, n={count(row.summary)}" for row in some]
    figure, axes = plot.paper(title, 3.4, relative=relative, right=_key_width(labels))
    # More steps towards the end, as that is where the tail is.
    shares = np.unique(np.concatenate((np.linspace(0, 1, _STEPS), 1 - np.geomspace(1e-4, 0.1, 40))))
    values = [statistics.values(row.series) / group.scale.factor for row in some]
    everything = np.concatenate(values)
    floor = _floor(everything)
    for at, (mine, label) in enumerate(zip(values, labels, strict=True)):
        drawn = np.quantile(mine, shares, method="inverted_cdf")
        drawn = drawn if floor is None else np.maximum(drawn, floor)
        axes.plot(
            drawn,
            shares,
            drawstyle="steps-post",
            label=plot.safe(label),
            color=plot.COLOURS[at % len(plot.COLOURS)],
            linestyle=plot.DASHES[at % len(plot.DASHES)],
            linewidth=1.5,
        )
    axes.set_ylim(0, 1.01)
    axes.set_ylabel("share of values at most so large")
    _axis(axes, group, log=floor is not None, zeros=float(everything.min()) == 0)
    plot.key(axes, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def _key_width(labels: Sequence[str]) -> float:
    return 0.75 + 0.066 * max(map(len, labels))


def against(
    group: Group,
    axis: str,
    lines: Sequence[tuple[str, Sequence[tuple[float, Row]]]],
    title: str,
    *,
    relative: bool,
    log: bool,
) -> Figure:
    """Draw medians with their intervals against an axis of the case; a line is what is else at the same point."""
    labels = [f"{plot.shortened(name, 40)}, {_counts(points)}" for name, points in lines]
    figure, axes = plot.paper(title, 3.6, relative=relative, right=_key_width(labels))
    least, most = math.inf, 0.0
    for at, (label, (_, points)) in enumerate(zip(labels, lines, strict=True)):
        xs = [x for x, _ in points]
        medians = [(row.summary.median or 0.0) / group.scale.factor for _, row in points]
        lows = [_side(row.summary.low, row, group.scale) for _, row in points]
        highs = [_side(row.summary.high, row, group.scale) for _, row in points]
        below = [median - low for median, low in zip(medians, lows, strict=True)]
        above = [high - median for median, high in zip(medians, highs, strict=True)]
        colour = plot.COLOURS[at % len(plot.COLOURS)]
        axes.errorbar(
            xs,
            medians,
            (below, above),
            label=plot.safe(label),
            color=colour,
            linestyle=plot.DASHES[at % len(plot.DASHES)],
            marker=plot.MARKS[at % len(plot.MARKS)],
            markersize=5,
            linewidth=1.4,
            capsize=3,
        )
        least, most = min(least, *medians), max(most, *medians)
    every = sorted({x for _, points in lines for x, _ in points})
    axes.set_xlabel(_AXES.get(axis, axis))
    if log:
        plot.plain_log(axes, "x")
    axes.set_xticks(every, [f"{x:,.6g}" for x in every])
    axes.minorticks_off()
    tall = least > 0 and most / least > _SPAN
    if not tall:
        axes.set_ylim(bottom=0)
    _axis(axes, group, log=tall, which="y")
    plot.key(axes, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def _counts(points: Sequence[tuple[float, Row]]) -> str:
    ns = sorted({row.summary.n for _, row in points})
    return f"n={ns[0]:,}" + (f" to {ns[-1]:,}" if len(ns) > 1 else "")


def peers(
    bars: Sequence[tuple[str, Row, float | None]], scale: Scale, what: str, title: str, *, relative: bool
) -> Figure:
    """Draw a bar a peer: the median with its interval, and how many times ours it is where ours is known."""
    labels = [plot.safe(plot.shortened(label)) for label, _, _ in bars]
    height = 1.3 + 0.36 * len(bars)
    figure, axes = plot.paper(title, height, relative=relative, left=plot.margin(labels), right=2.0)
    for at, (_, row, times) in enumerate(bars):
        median = (row.summary.median or 0.0) / scale.factor
        low, high = (_side(end, row, scale) for end in (row.summary.low, row.summary.high))
        colour = plot.COLOURS[1 if times == 1 else 0]
        axes.barh(at, median, 0.6, color=colour, alpha=0.75)
        axes.errorbar(median, at, xerr=([median - low], [high - median]), color=plot.INK, capsize=3, linewidth=1.2)
        said = scale.show(row.summary.median) + (f", {times:.2f} times ours" if times not in (None, 1) else "")
        axes.text(
            1.01, at, f"{said} · n={count(row.summary)}", transform=axes.get_yaxis_transform(), va="center", size=7.5
        )
    axes.set_yticks(range(len(bars)), labels)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(plot.safe(f"{what}, {scale.unit}"))
    plot.plain(axes, "x")
    return figure


def _side(end: float | None, row: Row, scale: Scale) -> float:
    return (end if end is not None else row.summary.median or 0.0) / scale.factor


def split(
    bars: Sequence[tuple[str, dict[str, float], float | None, int]],
    parts: Sequence[str],
    scale: Scale,
    what: str,
    title: str,
    *,
    relative: bool,
) -> Figure:
    """Draw where the time goes: a bar a point, its parts one after the other, and beneath it the whole as measured."""
    labels = [plot.safe(plot.shortened(bar[0])) for bar in bars]
    height = 1.75 + 0.62 * len(bars)
    figure, axes = plot.paper(title, height, relative=relative, left=plot.margin(labels), right=1.75)
    figure.subplots_adjust(top=1 - 0.8 / height)
    for at, (_, medians, whole, n) in enumerate(bars):
        end = 0.0
        for number_, part in enumerate(parts):
            size = medians.get(part, 0.0) / scale.factor
            axes.barh(
                at - 0.12,
                size,
                0.42,
                left=end,
                color=plot.COLOURS[number_ % len(plot.COLOURS)],
                linewidth=1,
                edgecolor=plot.PAPER,
                label=plot.safe(part) if at == 0 else None,
            )
            end += size
        said = f"sum {number(end)}"
        if whole:
            axes.barh(at + 0.22, whole / scale.factor, 0.14, color=plot.SOFT, label="whole" if at == 0 else None)
            said += f": {100 * end * scale.factor / whole:.1f} %\nof the whole, {scale.show(whole)}"
        said += f"\nn={n:,}"
        axes.text(1.01, at, said, transform=axes.get_yaxis_transform(), va="center", size=8)
    axes.set_yticks(range(len(bars)), labels)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(plot.safe(f"{what}, {scale.unit}, medians"))
    plot.plain(axes, "x")
    plot.key(axes, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=6, columnspacing=1.2)
    return figure
