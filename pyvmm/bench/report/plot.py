# SPDX-License-Identifier: Apache-2.0
"""The canvas of figures: size, colours, and how it becomes a file or a part of a page.

Uses matplotlib without its global state. The same drawing is written as SVG and PNG, and inlined in a page, where
it takes the page's light or dark colours. The palette is that of Okabe and Ito, which colour-blind people can
distinguish; lines and marks differ in shape too.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pyvmm.labenv import TCG_NOTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE, PAPER = "#1b1f25", "#59636f", "#d5dae1", "#fffffe"
COLOURS: Final = ("#0072b3", "#d55e01", "#009e74", "#aa4498", "#b08101", "#4b4b91")
CLASSES: Final = ("#7ad251", "#22a885", "#2a788f", "#414488", "#440155")
"""Of durations, from short to long; on :data:`PANEL`, whatever the page is."""
PANEL: Final = "#f4f6f8"
DASHES: Final = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MARKS: Final = ("o", "s", "^", "D", "v", "P")

THEMED: Final = {
    INK: "ink", SOFT: "soft", LINE: "line", PAPER: "page", **{each: f"c{at}" for at, each in enumerate(COLOURS)},
}  # fmt: skip
"""The colours that are a page's variables, with their names there."""

WIDTH: Final = 8.4
"""Of every figure, in inches."""

_FONT: Final = 9.0
_CHARACTER: Final = 0.0075 * _FONT
"""Width of a character, in inches."""
_LONGEST: Final = 44
"""Characters of a row's name that are shown."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure: ``name`` for a file, ``title`` and ``caption`` as text; ``draw`` makes it."""

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]


def paper(title: str, height: float, *, relative: bool, left: float = 0.85, right: float = 0.3) -> tuple[Figure, Axes]:
    """Return a figure ``height`` inches high, and its axes; margins to the left and right are in inches.

    ``relative`` marks it as from a machine under QEMU's TCG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), facecolor=PAPER)
    figure.subplots_adjust(left=left / WIDTH, right=1 - right / WIDTH, top=1 - 0.55 / height, bottom=0.62 / height)
    axes = figure.add_subplot()
    figure.text(0.1 / WIDTH, 1 - 0.12 / height, safe(shortened(title, 88)), va="top", size=11, weight="bold")
    if relative:
        where = 0.1 / WIDTH, 0.1 / height  # on the left, so that a narrow screen shows it
        figure.text(*where, TCG_NOTE, va="bottom", size=8, weight="bold", color=COLOURS[1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def margin(labels: list[str]) -> float:
    """Return the inches that labels to the left of an axis take."""
    return 0.35 + _CHARACTER * max((min(len(label), _LONGEST) for label in labels), default=0)


def shortened(text: str, width: int = _LONGEST) -> str:
    """Return a text of at most ``width`` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def safe(text: str) -> str:
    """Return text that matplotlib shows: it would leave out a label that begins with an underscore."""
    return f" {text}" if text.startswith("_") else text


def key(axes: Axes, **options: Any) -> None:
    """Add a legend beside a figure."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, frameon=False, fontsize=8, handlelength=2.6, **options)


def plain(axes: Axes, which: str) -> None:
    """Write the numbers on an axis without exponents."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(lambda value, _: f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}")


def plain_log(axes: Axes, which: str) -> None:
    """Make an axis logarithmic, with numbers without exponents."""
    from matplotlib.ticker import LogLocator, NullFormatter

    scale = axes.set_xscale if which == "x" else axes.set_yscale
    scale("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    wide = high / max(low, 1e-300) > 300
    axis.set_major_locator(LogLocator(10, subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=30))
    plain(axes, which)
    axis.set_minor_formatter(NullFormatter())


# -- output


@contextmanager
def _settings() -> Iterator[None]:
    """Draw the same everywhere: ignore the user's settings, and use no dates and no random names."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        # A browser's font may have characters that this font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcParams.update(
            {
                "font.family": "DejaVu Sans",
                "font.size": _FONT,
                "axes.labelsize": _FONT,
                "text.parse_math": False,
                "text.color": INK,
                "axes.labelcolor": INK,
                "axes.edgecolor": SOFT,
                "xtick.color": SOFT,
                "ytick.color": SOFT,
                "xtick.labelcolor": INK,
                "ytick.labelcolor": INK,
                "axes.facecolor": "none",
                "svg.fonttype": "none",
                "svg.hashsalt": "pyvmm",
                "axes.formatter.useoffset": False,
                "path.simplify": True,
                "axes.unicode_minus": False,
            }
        )
        yield


def svg(picture: Plot) -> str:
    """Return a picture as an SVG document, without a date, and with text that can be searched."""
    with _settings():
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        picture.draw().savefig(out, format="svg", metadata=nothing)
    plain = _FAMILY.sub("'DejaVu Sans', Verdana, sans-serif", out.getvalue())
    return _DATA.sub(lambda path: _LONG.sub(r"\1", path[0]), plain)


def png(picture: Plot) -> bytes:
    """Return a picture as a PNG, for 200 dots an inch."""
    with _settings():
        out = io.BytesIO()
        picture.draw().savefig(out, format="png", dpi=200, metadata={"Software": None})
    return out.getvalue()


_FAMILY = re.compile(r"'DejaVu Sans'(?:, [^;\"]*)?(?=[;\"])")
_DATA = re.compile(r'(?<= d=")[^"]*')
_LONG = re.compile(r"(\.\d\d)\d+")
"""Coordinates to a hundredth of a point are fine enough."""
_TAG = re.compile(r"<[^<>]*>")
_NAMED = re.compile(r'\bid="([^"]*)"')
_REFERRED = re.compile(r'url\(#([^)]*)\)|href="#([^"]*)"')
_HEX = re.compile("|".join(THEMED))


def inline(document: str, prefix: str, label: str) -> str:
    """Return an SVG document as an element of a page.

    It gets unique ids, the page's colours and the page's width, and no style sheet, which would affect the page.
    ``label`` is the escaped alternative text.
    """
    start, end = document.index("<svg"), document.rindex("</svg>") + len("</svg>")
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", document[start:end], count=1, flags=re.DOTALL)
    wanted = {one or other for tag in _TAG.findall(body) for one, other in _REFERRED.findall(tag)}

    def changed(match: re.Match[str]) -> str:
        tag = match[0].replace("xlink:href=", "href=")
        tag = _NAMED.sub(lambda found: f'id="{prefix}-{found[1]}"' if found[1] in wanted else "", tag)
        tag = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", tag)
        return _HEX.sub(lambda found: f"var(--{THEMED[found[0]]})", tag)

    body = _TAG.sub(changed, body)
    box = re.search(r'viewBox="[\d. ]+"', body)
    head = f'<svg role="img" aria-label="{label}" {box[0] if box else ""} stroke-linejoin="round">'
    return re.sub(r"\s*\n\s*", "\n", head + body[body.index(">") + 1 :])
