# SPDX-License-Identifier: Apache-2.0
"""Draw a timeline as SVG: time to the right, guest addresses downwards, a mark for each event.

Addresses without events are left out, and the gap is labelled. Each kind has its own shape and colour.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from pyvmm.errors import hex_
from pyvmm.memory.address import span
from pyvmm.observe import svg
from pyvmm.observe.grid import size
from pyvmm.observe.mapsvg import draw_map, patterns
from pyvmm.observe.pagemap import PageMap
from pyvmm.observe.svg import FAINT, INK, LINE, TEXT, Drawing, num
from pyvmm.observe.timeline import KINDS, Event
from pyvmm.pages import HOST_PAGE

WIDTH, HEIGHT = 760, 330
"""Of the plot itself, in pixels: how wide, and how high at most."""
BAND: Final = 30
"""The least height of a range of addresses."""
PLACE: Final = 8
"""What each address adds to it, as far as there is room."""
PAD: Final = 9
GAP: Final = 16
RANGES: Final = 10
"""Ranges at most; the smallest gaps between more are drawn to scale."""
SMALL: Final = 10
TITLES: Final = 400
"""With more marks than this they have no tooltips."""


class _Mark(NamedTuple):
    """A path around the origin, and how it is painted."""

    path: str
    paint: str


_EDGE: Final = f'stroke="{INK}" stroke-width="0.7"'
_MARKS: Final = {
    "fault": _Mark("h0", 'fill="none" stroke="#0072B2" stroke-width="4.4" stroke-linecap="round"'),
    "share": _Mark("m0-5l4.5 8h-9z", f'fill="#E69F00" {_EDGE}'),
    "unshare": _Mark("m0 5l4.5-8h-9z", f'fill="#56B4E9" {_EDGE}'),
    "convert": _Mark("m0-5l4.5 5l-4.5 5l-4.5-5z", f'fill="#CC79A7" {_EDGE}'),
    "punch": _Mark("m-3.5-3.5h7v7h-7z", 'fill="#FFFFFF" stroke="#009E73" stroke-width="1.8"'),
    "slot": _Mark("m-1.5-6h3v12h-3z", f'fill="{INK}" stroke="{INK}"'),
}
_OTHER: Final = _Mark("m-4-4l8 8m0-8l-8 8", f'fill="none" stroke="{FAINT}" stroke-width="1.5"')


def svg_timeline(
    events: Iterable[Event],
    title: str = "What happened to guest memory",
    *,
    start: int | None = None,
    by_order: bool = False,
    notes: Sequence[str] = (),
    inline: bool = False,
) -> str:
    """Draw events, each at its time since ``start`` (the first event's), or ``by_order`` where ``ns`` only orders them.

    ``notes`` stand below the legend: what a reader must know of what is not in the picture.
    """
    drawing = draw_timeline(events, title, start=start, by_order=by_order, notes=notes)
    return svg.finish(drawing, title, inline=inline)


def svg_run(title: str, page_map: PageMap, events: Iterable[Event], *, start: int, notes: Sequence[str] = ()) -> str:
    """Draw a run as one document: the map at its end, and what happened on the way, from ``start`` (in ns)."""
    events = list(events)
    faulted = {event.gpa for event in events if event.kind == "fault"}
    note = f"outlined = {len(faulted):,} page{'' if len(faulted) == 1 else 's'} that the guest faulted in"
    picture = draw_map(page_map, title, outlined=faulted, note=note if faulted else "")
    timeline = draw_timeline(events, "What happened on the way", start=start, notes=notes)
    drawing = svg.stack([picture, timeline], 24)
    return svg.finish(drawing, title, definitions=patterns())


def draw_timeline(
    events: Iterable[Event], title: str, *, start: int | None = None, by_order: bool = False, notes: Sequence[str] = ()
) -> Drawing:
    """Draw what :func:`svg_timeline` says, as a part of something larger."""
    ordered = sorted(events)
    head = [svg.heading(title)] if title else []
    if not ordered:
        nothing = svg.text(0, TEXT, "nothing happened", fill=FAINT)
        return svg.stack([*head, Drawing(200, LINE, nothing), *_notes(notes)], 4)
    times = _Times(ordered, start, by_order)
    addresses = _Addresses(ordered)
    plot = _axes(times, addresses) + _events(ordered, times, addresses)
    picture = Drawing(addresses.indent + WIDTH, addresses.height + 2 * LINE + 4, plot)
    return svg.stack([*head, picture, _legend(ordered), *_notes(notes)], 8)


class _Times:
    """Where an event stands from left to right."""

    def __init__(self, events: Sequence[Event], start: int | None, by_order: bool) -> None:
        self.by_order = by_order
        self.start = (0 if by_order else events[0].ns) if start is None else start
        self.length = max(events[-1].ns - self.start, 1)
        # The unit in which the axis has numbers of a few digits.
        units = ((1_000_000_000, "s"), (1_000_000, "ms"), (1000, "µs"), (1, "ns"))
        self.scale, self.unit = (1, "") if by_order else next(u for u in units if self.length >= 2 * u[0] or u[0] == 1)

    def x(self, ns: int) -> float:
        """Place a time. Earlier times are placed at the start."""
        return PAD + max(ns - self.start, 0) / self.length * (WIDTH - 2 * PAD)

    def time_text(self, ns: int) -> str:
        """Write a time for a tooltip."""
        if self.by_order:
            return f"{ns}."
        return f"{(ns - self.start) / self.scale:.3f} {self.unit}"

    def ticks(self) -> list[tuple[float, str]]:
        """Return where the axis is labelled, and how: about eight times."""
        most = self.length / self.scale
        step = max(_nice(most / 8), 1.0 if self.by_order or self.scale == 1 else 0.0)
        numbers = [index * step for index in range(int(most / step + 1e-9) + 1)]
        return [(self.x(int(self.start + number * self.scale)), f"{number:g}") for number in numbers]


def _nice(number: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(number))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= number * (1 - 1e-9))


class _Addresses:
    """Where an event stands from top to bottom: ranges of addresses to one scale, gaps between them not to any."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.ranges = _ranges(events)
        places = len({event.gpa for event in events} | {event.gpa + event.pages * HOST_PAGE for event in events})
        room = max(HEIGHT - (BAND + GAP) * len(self.ranges), 0)
        room = min(room, PLACE * (places - len(self.ranges) - 1))
        total = sum(end - start for start, end in self.ranges)
        self.heights = [BAND + room * (end - start) / total for start, end in self.ranges]
        self.tops = [0.0]
        for height in self.heights[:-1]:
            self.tops.append(self.tops[-1] + height + GAP)
        self.height = self.tops[-1] + self.heights[-1]
        self.indent = svg.advance(hex_(self.ranges[-1][1]), SMALL) + 8
        self._starts = [start for start, _ in self.ranges]

    def y(self, gpa: int) -> float:
        """Place a page."""
        index = bisect_right(self._starts, gpa) - 1
        start, end = self.ranges[index]
        length, height = end - start - HOST_PAGE, self.heights[index]
        if not length:
            return self.tops[index] + height / 2
        return self.tops[index] + PAD + (gpa - start) / length * (height - 2 * PAD)


def _ranges(events: Sequence[Event]) -> list[tuple[int, int]]:
    """Return the ranges of addresses where something happened, near ones as one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted({(event.gpa, event.gpa + event.pages * HOST_PAGE) for event in events}):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    gaps = sorted((right[0] - left[1] for left, right in pairwise(joined)), reverse=True)
    left_out, length = 0, joined[-1][1] - joined[0][0]
    # A gap is worth leaving out while it takes a good part of what would be drawn.
    while left_out < len(gaps) and left_out < RANGES - 1 and gaps[left_out] * 12 > length:
        length -= gaps[left_out]
        left_out += 1
    least = gaps[left_out - 1] if left_out else math.inf
    found = [joined[0]]
    for start, end in joined[1:]:
        if start - found[-1][1] >= least and len(found) <= left_out:
            found.append((start, end))
        else:
            found[-1] = found[-1][0], end
    return found


def _axes(times: _Times, addresses: _Addresses) -> str:
    left = addresses.indent
    parts = []
    for index, ((start, end), top, height) in enumerate(
        zip(addresses.ranges, addresses.tops, addresses.heights, strict=True)
    ):
        parts.append(f'<path d="M{num(left)} {num(top)}h{WIDTH}v{num(height)}h-{WIDTH}z" fill="#F1F1F1"/>')
        last = end - HOST_PAGE
        parts.append(svg.text(left - 6, addresses.y(start) + 3.5, hex_(start), size=SMALL, fill=FAINT, anchor="end"))
        if last > start and addresses.y(last) - addresses.y(start) > SMALL:
            parts.append(svg.text(left - 6, addresses.y(last) + 3.5, hex_(last), size=SMALL, fill=FAINT, anchor="end"))
        if index:
            gap = f"~ {size(start - addresses.ranges[index - 1][1])} where nothing happened ~"
            parts.append(svg.text(left + WIDTH / 2, top - 4.5, gap, size=SMALL, fill=FAINT, anchor="middle"))
    bottom = addresses.height
    lines = ""
    for x, said in times.ticks():
        lines += f"M{num(left + x)} {num(bottom)}v4"
        parts.append(svg.text(left + x, bottom + LINE, said, size=SMALL, fill=FAINT, anchor="middle"))
    parts.append(f'<path d="{lines}" stroke="{FAINT}"/>')
    what = "events in their order; times are not drawn" if times.by_order else f"time in {times.unit}"
    parts.append(svg.text(left + WIDTH / 2, bottom + 2 * LINE, what, size=SMALL, fill=FAINT, anchor="middle"))
    return "".join(parts)


def _events(events: Sequence[Event], times: _Times, addresses: _Addresses) -> str:
    """Draw the marks, those of a kind together; of marks at the same place one."""
    kinds: dict[str, dict[str, list[Event]]] = {kind: {} for kind in KINDS}
    for event in events:
        x = times.x(event.ns)
        first, last = addresses.y(event.gpa), addresses.y(event.gpa + (event.pages - 1) * HOST_PAGE)
        at = f"M{round(x, 1):g} {round(first, 1):g}"
        if last - first > 1:
            at += f"V{round(last, 1):g}M{round(x, 1):g} {round((first + last) / 2, 1):g}"
        kinds.setdefault(event.kind, {}).setdefault(at, []).append(event)
    titled = sum(map(len, kinds.values())) <= TITLES
    groups = []
    for kind, places in kinds.items():
        mark = _MARKS.get(kind, _OTHER)
        if titled:
            body = "".join(
                f'<path d="{at}{mark.path}">{svg.title(_tooltip(found, times))}</path>' for at, found in places.items()
            )
        else:
            body = f'<path d="{"".join(f"{at}{mark.path}" for at in places)}"/>'
        if places:
            groups.append(f"<g {mark.paint}>{body}</g>")
    return f'<g transform="translate({num(addresses.indent)} 0)">{"".join(groups)}</g>'


def _tooltip(events: Sequence[Event], times: _Times) -> str:
    first = events[0]
    where = span(first.gpa, first.pages * HOST_PAGE) if first.pages > 1 else hex_(first.gpa)
    more = f", and {len(events) - 1} more here" if len(events) > 1 else ""
    return f"{first.kind} {where} {times.time_text(first.ns)}{more}"


def _legend(events: Sequence[Event]) -> Drawing:
    counts: dict[str, int] = {}
    for event in events:
        counts[event.kind] = counts.get(event.kind, 0) + 1
    parts, x = [], 6.0
    for kind in (*KINDS, *sorted(counts.keys() - set(KINDS))):
        if count := counts.get(kind):
            mark = _MARKS.get(kind, _OTHER)
            said = f"{kind} {count:,}"
            parts.append(f'<path d="M{num(x)} 8{mark.path}" {mark.paint}/>{svg.text(x + 10, 12, said)}')
            x += 10 + svg.advance(said) + 22
    return Drawing(x, LINE, "".join(parts))


def _notes(notes: Sequence[str]) -> list[Drawing]:
    lines = [line for note in notes for line in svg.wrapped(note, WIDTH)]
    body = "".join(svg.text(0, index * LINE + TEXT, line, fill=FAINT) for index, line in enumerate(lines))
    return [Drawing(max(map(svg.advance, lines)), len(lines) * LINE, body)] if lines else []
