# SPDX-License-Identifier: Apache-2.0
"""Draws when each page of a range was touched and how long that took; a cell covers many touches. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyvmm.bench.model import Series
from pyvmm.bench.report import plot
from pyvmm.bench.report.groups import Row, Scale, number

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_CLASSES: Final = (0.8, 1.25, 2.0, 5.0)
"""Limits between classes of durations, in medians."""
_CELLS: Final = (160, 80)
"""Of a heat map, in time and in address; twice as many for more touches than :data:`_FEW`."""
_FEW: Final = 1000


def has_places(series: Series) -> bool:
    """Return whether a series has the address and time of at least each value of its last round."""
    import numpy as np

    length = series.rounds[-1] if series.rounds else len(series.values)
    if not 0 < length <= min(len(series.values), len(series.places), len(series.began)):
        return False
    try:
        told = np.array((series.places[-length:], series.began[-length:]), dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return bool(np.isfinite(told).all())


def draw(row: Row, scale: Scale, title: str, *, relative: bool) -> Figure:
    """Draw when each page of the last round was touched, and how long that took: the longest touch of each cell."""
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    series = row.series
    length = series.rounds[-1] if series.rounds else len(series.values)
    took = np.array(series.values[-length:]) / scale.factor
    began = np.array(series.began[-length:], dtype=float)
    places = np.array(series.places[-length:], dtype=float)
    end = float((began + np.array(series.values[-length:])).max())
    time = Scale(*_time_scale(end, series.unit))
    edges = class_edges(took)
    kinds = np.searchsorted(edges, took, side="right")
    cells = _cells(began, np.array(series.values[-length:]), places, kinds)
    figure, axes = plot.paper(title, 4.2, relative=relative, left=0.95, right=2.2)
    axes.set_facecolor(plot.PANEL)
    axes.grid(visible=False)
    axes.imshow(
        np.ma.masked_less(cells, 0),
        cmap=ListedColormap(plot.CLASSES),
        vmin=0,
        vmax=len(plot.CLASSES) - 1,
        interpolation="nearest",
        aspect="auto",
        origin="lower",
        extent=(
            float(began.min()) / time.factor,
            end / time.factor or 1.0,
            float(places.min()),
            float(places.max()) + 1,
        ),
    )
    axes.set_xlabel(f"since the first touch, {time.unit}")
    axes.set_ylabel("page of the range touched")
    plot.plain(axes, "x")
    plot.plain(axes, "y")
    counts = np.bincount(kinds, minlength=len(edges) + 1)
    bounds = [number(edge) for edge in edges]
    names = [*(f"below {edge}" for edge in bounds[:1]), *map("{} to {}".format, bounds, bounds[1:])]
    names += [f"from {bounds[-1]} (5 medians)"] if bounds else ["all"]
    patches = [
        Patch(facecolor=plot.CLASSES[at], edgecolor=plot.SOFT, linewidth=0.6, label=f"{name}: {counts[at]:,}")
        for at, name in enumerate(names)
    ]
    heading = f"{scale.unit} a touch: pages"
    key = axes.legend(
        handles=patches,
        title=heading,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=8,
        title_fontsize=8,
        alignment="left",
    )
    key.get_title().set_fontweight("bold")
    axes.text(1.03, 0.02, f"n={len(took):,}, one round", transform=axes.transAxes, size=8)
    return figure


def _cells(began: Floats, took: Floats, places: Floats, kinds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a grid over time and address: the highest class of the touches in progress in each cell, or -1."""
    import numpy as np

    took = np.maximum(took, 0)

    finer = 1 if len(took) <= _FEW else 2
    width, height = finer * _CELLS[0], min(finer * _CELLS[1], len(np.unique(places)))
    ended = began + took
    first = _cell(began, width, end=float(ended.max()))
    last = _cell(ended, width, begin=float(began.min()))
    along = _cell(places, height)
    spans = last - first + 1
    touch = np.repeat(np.arange(len(took)), spans)
    across = first[touch] + np.arange(len(touch)) - np.repeat(np.cumsum(spans) - spans, spans)
    cells = np.full((height, width), -1)
    np.maximum.at(cells, (along[touch], across), kinds[touch])
    return cells


def _cell(values: Floats, cells: int, *, begin: float | None = None, end: float | None = None) -> NDArray[np.int64]:
    """Return the cell of each value, of equal cells from ``begin`` to ``end``."""
    import numpy as np

    low = float(values.min()) if begin is None else begin
    span = (float(values.max()) if end is None else end) - low
    found = ((values - low) * (cells / span if span else 0.0)).astype(np.int64)
    return np.minimum(found, cells - 1)


def class_edges(took: Floats) -> list[float]:
    """Return the limits between classes of durations, as multiples of the median; none where it is 0."""
    import numpy as np

    median = float(np.median(took))
    return [factor * median for factor in _CLASSES] if median > 0 else []


def _time_scale(longest: float, unit: str) -> tuple[float, str]:
    if unit == "instructions":
        return (1e6, "million instructions") if longest >= 1e6 else (1.0, "instructions")
    for factor, name in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if longest >= 10 * factor:
            return factor, name
    return 1.0, "ns"
