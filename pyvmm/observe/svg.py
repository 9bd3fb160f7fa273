# SPDX-License-Identifier: Apache-2.0
"""The part of SVG that the pictures need: drawings as text, combined into a document or a part of a page.

Self-contained: no scripts, no style sheets, no fonts or files from elsewhere; shapes are attributes only, so that a
picture inlined in a page neither styles the page nor is styled by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

FONT = "ui-monospace,SFMono-Regular,Menlo,'DejaVu Sans Mono',monospace"
INK, FAINT, PAPER = "#222222", "#666666", "#FFFFFF"
TEXT = 11
"""Size of text, in pixels."""
ADVANCE = 0.61
"""Width of a character in sizes of the text: that of the widest of FONT's."""
LINE = 15
MARGIN = 12


@dataclass(frozen=True, slots=True)
class Drawing:
    """Elements in a box of ``width`` by ``height`` pixels, its upper left corner being the origin."""

    width: float
    height: float
    body: str

    def at(self, x: float, y: float) -> str:
        """Return the elements moved to (x, y)."""
        return f'<g transform="translate({num(x)} {num(y)})">{self.body}</g>' if x or y else self.body


def num(value: float) -> str:
    """Write a coordinate in few characters."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def advance(text: str, size: float = TEXT) -> float:
    """Return how wide a line of text is."""
    return len(text) * size * ADVANCE


def text(
    x: float, y: float, words: str, *, size: float = TEXT, fill: str = INK, anchor: str = "", bold: bool = False
) -> str:
    """Write one line whose base line is at ``y``; ``anchor`` is middle, end, or nothing for the start."""
    more = f' font-size="{num(size)}"' if size != TEXT else ""
    more += f' fill="{fill}"' if fill != INK else ""
    more += f' text-anchor="{anchor}"' if anchor else ""
    more += ' font-weight="bold"' if bold else ""
    return f'<text x="{num(x)}" y="{num(y)}"{more}>{escape(words, quote=False)}</text>'


def heading(words: str, more: str = "") -> Drawing:
    """Write a picture's title, and below it a note in small text."""
    body, height = text(0, 13, words, size=14, bold=True), 17.0
    if more:
        body, height = body + text(0, height + TEXT, more, fill=FAINT), height + LINE
    return Drawing(max(advance(words, 14), advance(more)), height, body)


def title(words: str) -> str:
    """Make the tooltip of the element it stands in."""
    return f"<title>{escape(words, quote=False)}</title>"


def wrapped(words: str, width: float, *, most: int = 3) -> list[str]:
    """Break words into at most ``most`` lines of ``width`` pixels; what does not fit ends in an ellipsis."""
    import textwrap

    room = max(int(width / (TEXT * ADVANCE)), 8)
    return textwrap.wrap(words, room, max_lines=most, placeholder=" …") or [""]


def stack(drawings: Iterable[Drawing], gap: float = 18) -> Drawing:
    """Put drawings one below the other."""
    body: list[str] = []
    y = width = 0.0
    for drawing in drawings:
        y += gap if body else 0
        body.append(drawing.at(0, y))
        y += drawing.height
        width = max(width, drawing.width)
    return Drawing(width, y, "".join(body))


def finish(drawing: Drawing, name: str, *, definitions: str = "", inline: bool = False) -> str:
    """Make a picture of a drawing: a document of its own, or, ``inline``, an element for an HTML page.

    ``definitions`` go into a document only: a page has them once, for all of its pictures.
    """
    width, height = drawing.width + 2 * MARGIN, drawing.height + 2 * MARGIN
    box = f'width="{num(width)}" height="{num(height)}" viewBox="0 0 {num(width)} {num(height)}"'
    start = "" if inline else '<?xml version="1.0" encoding="UTF-8"?>\n'
    space = "" if inline else ' xmlns="http://www.w3.org/2000/svg"'
    return (
        f'{start}<svg{space} {box} role="img" font-family="{FONT}" font-size="{TEXT}" fill="{INK}">'
        f'{title(name)}{"" if inline else definitions}<rect width="100%" height="100%" fill="{PAPER}"/>'
        f"{drawing.at(MARGIN, MARGIN)}</svg>" + ("" if inline else "\n")
    )
