# SPDX-License-Identifier: Apache-2.0
"""The figures of the HTML report: page maps before and after each step, and the timeline of events.

:mod:`pyvmm.observe` draws them. This module adds them to a page, equal ones only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pyvmm.atlas.model import Result
from pyvmm.atlas.report import wording
from pyvmm.errors import UsageError
from pyvmm.experiment.record import Picture
from pyvmm.observe import mapsvg, timesvg
from pyvmm.observe.pagemap import PageMap
from pyvmm.observe.timeline import Event
from pyvmm.reports.words import one_line


class Figures:
    """The figures of one page; ``text`` escapes."""

    def __init__(self, text: Callable[[str], str]) -> None:
        self._text = text
        self._drawn: dict[object, tuple[str, str]] = {}

    def definitions(self) -> str:
        """Return the shared definitions, which the page needs before the first figure."""
        return mapsvg.svg_defs()

    def of(self, result: Result, anchor: str) -> Iterable[str]:
        """Return a result's figures. ``anchor`` is their place in the page."""
        if result.pictures:
            key = tuple((picture.title, tuple(picture.runs)) for picture in result.pictures)
            yield self._once(key, result, anchor, lambda: self._maps(result.pictures), "page maps")
        if result.events:
            yield _timeline(result)

    def _once(self, key: object, result: Result, anchor: str, draw: Callable[[], str], what: str) -> str:
        if key in self._drawn:
            where, place = self._drawn[key]
            link = f'<a href="#{where}">{self._text(place)}</a>'
            return f'<p class="times">The {what} are the same as those of {link}.</p>'
        self._drawn[key] = anchor, wording.full_name(result) + " " + wording.place(result)
        return draw()

    def _maps(self, pictures: tuple[Picture, ...]) -> str:
        try:
            steps = [(one_line(picture.title), PageMap.from_runs(picture.runs)) for picture in pictures]
        except UsageError as error:
            return f'<p class="times">The page maps cannot be drawn: {self._text(error.message)}.</p>'
        return f"<figure>{mapsvg.svg_steps(steps, inline=True)}</figure>"


def _timeline(result: Result) -> str:
    """Draw the events: by time if all times are known, else in their order."""
    at = wording.when(result)
    numbered = zip(at or [event.order for event in result.events], result.events, strict=True)
    events = [Event(number, one_line(event.kind), max(event.gpa, 0), max(event.pages, 1)) for number, event in numbered]
    return f"<figure>{timesvg.svg_timeline(events, by_order=not at, inline=True)}</figure>"
