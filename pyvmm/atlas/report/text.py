# SPDX-License-Identifier: Apache-2.0
"""An atlas for the terminal: a line per result as it comes, a table at the end, and the details of a result.

Pure functions. Foreign text (reasons, evidence, output of a crashed process) cannot control the terminal.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from pyvmm.atlas.model import Atlas, Result
from pyvmm.atlas.report import wording
from pyvmm.atlas.report.wording import NOTHING_EXPECTED, Expected
from pyvmm.experiment.record import Verdict
from pyvmm.reports.look import PLAIN, Look
from pyvmm.reports.words import one_line, shortened
from pyvmm.terminal import clean

_COLOURS = {Verdict.HOLDS: "32", Verdict.FAILS: "31", Verdict.UNTOLD: "33", Verdict.CRASHED: "35;1"}
_BOLD, _DIM, _LOUD = "1", "2", "31;1"

_SURPRISE = "*"
_REASON = 400
"""Maximum characters of a reason in the list below the table: a crashed process may have a long one."""


def line(result: Result, look: Look = PLAIN, expected: Expected = NOTHING_EXPECTED) -> str:
    """Return one line for a new result."""
    verdict = result.verdict
    mark = verdict.mark + (_SURPRISE if wording.surprises(result, expected) else " ")
    # Most of the line is for names: claim ids are long, and reasons are listed below the table.
    id_width = max(30, look.width - 54)
    where = f"{wording.full_name(result):<{id_width}} {wording.place(result)}".ljust(id_width + 21) + " "
    what = verdict.value
    if wording.surprises(result, expected):
        what += f", expected: {expected[result.key].value}"
    if result.reason:
        what += f": {result.reason}"
    what = shortened(what, max(look.width - len(where) - 2, 14))
    return look.finish(f"{look.paint(mark, _COLOURS[verdict])}{where}{look.paint(what, _COLOURS[verdict])}")


def table(
    atlas: Atlas, look: Look = PLAIN, expected: Expected = NOTHING_EXPECTED, headings: Mapping[str, str] | None = None
) -> str:
    """Return all verdicts: a row per claim, a column per protection and backing; then the reasons, each once.

    ``headings`` has the groups' subjects.
    """
    columns = _Columns(atlas, look)
    lines = [*columns.head(look)]
    for group, results in atlas.groups().items():
        about = one_line((headings or {}).get(group, ""))
        lines.append(look.paint(one_line(group), _BOLD) + (f"  {look.paint(about, _DIM)}" if about else ""))
        rows: dict[str, dict[tuple[str, str], Result]] = {}
        for result in results:
            rows.setdefault(result.id, {})[result.protection, result.backing] = result
        lines += [columns.row(row, look, expected) for row in rows.values()]
    lines += ["", legend(atlas, look), *columns.legend()]
    for verdict in (Verdict.CRASHED, Verdict.UNTOLD):
        lines += _reasons(atlas, verdict, look)
    lines += _surprises(atlas, look, expected)
    return look.finish("\n".join(each.rstrip() for each in lines))


def legend(atlas: Atlas, look: Look = PLAIN) -> str:
    """Return the legend of the marks, with their counts."""
    parts = [
        f"{look.paint(verdict.mark, _COLOURS[verdict])} {wording.counted(verdict, count)}"
        for verdict, count in atlas.counts().items()
    ]
    return look.finish("   ".join(parts))


def _reasons(atlas: Atlas, verdict: Verdict, look: Look) -> list[str]:
    lines: list[str] = []
    for folded in wording.fold(atlas.results, verdict):
        reason = shortened(folded.reason or "no reason given", _REASON)
        lines += look.wrap(reason, 9, f"{len(folded.results):>6}×  ")  # noqa: RUF001
        names = wording.some(folded.results)
        lines += [look.paint(each, _DIM) for each in look.wrap(names, 9)]
    head = look.paint(f"{verdict.mark} {verdict.value}", _COLOURS[verdict])
    return ["", head, *lines] if lines else []


def _surprises(atlas: Atlas, look: Look, expected: Expected) -> list[str]:
    found = [result for result in atlas.results if wording.surprises(result, expected)]
    if not expected:
        return []
    if not found:
        known = sum(result.key in expected for result in atlas.results)
        return ["", f"{known} of {len(atlas.results)} verdicts were expected, and each is as expected."]
    lines = ["", look.paint(f"{_SURPRISE} not as expected", _LOUD)]
    for result in found:
        where = f"{wording.full_name(result)}  {wording.place(result)}  "
        lines += look.wrap(f"{where}expected: {expected[result.key].value}; is: {result.verdict.value}", 4)
    return lines


class _Columns:
    """The columns of the table: under the backings' names if these fit, else under a letter each."""

    def __init__(self, atlas: Atlas, look: Look) -> None:
        pairs = [(protection, backing) for protection, some in wording.columns(atlas).items() for backing in some]
        self._letters = _letters([backing for _, backing in pairs])
        longest = max((len(wording.name(result)) for result in atlas.results), default=0) + 4
        self._full = longest + self._place(pairs, full=True) <= look.width
        wide = self._place(pairs, full=self._full)
        self._names = longest if longest + wide <= look.width else max(look.width - wide, 16)

    def _place(self, pairs: list[tuple[str, str]], *, full: bool) -> int:
        """Set each column's start after the names. Returns the total width."""
        self._starts: dict[tuple[str, str], int] = {}
        self._tops: dict[str, int] = {}
        end = at = 0
        for protection, backing in pairs:
            if protection not in self._tops:
                at = max(end + 1, at + 1) if self._tops else 0
                self._tops[protection] = at
                end = at + len(one_line(protection)) + 1
            self._starts[protection, backing] = at
            at += (len(one_line(backing)) if full else 1) + 1
        return max(end, at)

    def head(self, look: Look) -> list[str]:
        """Return the lines above the table."""
        tops = _at({at: one_line(protection) for protection, at in self._tops.items()})
        backs = {
            at: one_line(backing) if self._full else self._letters[backing] for (_, backing), at in self._starts.items()
        }
        indent = " " * self._names
        return [look.paint((indent + tops).rstrip(), _BOLD), indent + _at(backs)]

    def row(self, results: Mapping[tuple[str, str], Result], look: Look, expected: Expected) -> str:
        """Return a claim's line."""
        line = shortened(wording.name(next(iter(results.values()))), self._names - 3)
        line = f"  {line:<{self._names - 2}}"
        at = 0
        for pair, start in self._starts.items():
            result = results.get(pair)
            if result is None:
                cell, code = "·", _DIM
            else:
                surprise = wording.surprises(result, expected)
                cell = result.verdict.mark + (_SURPRISE if surprise else "")
                code = _COLOURS[result.verdict] + (";7" if surprise else "")
            line += " " * (start - at) + look.paint(cell, code)
            at = start + len(cell)
        return line

    def legend(self) -> list[str]:
        """Return the legend of the letters, if any."""
        if self._full or not self._letters:
            return []
        return ["   ".join(f"{letter} {one_line(backing)}" for backing, letter in self._letters.items())]


def _letters(backings: list[str]) -> dict[str, str]:
    """Give each backing a unique character, from its name if possible."""
    letters: dict[str, str] = {}
    spare = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    for backing in dict.fromkeys(backings):
        own = [each for each in backing.lower() if each in spare]
        letters[backing] = next((each for each in [*own, *spare] if each not in letters.values()), "#")
    return letters


def _at(texts: Mapping[int, str]) -> str:
    line = ""
    for start, text in texts.items():
        line = line.ljust(start) + text
    return line


def details(result: Result, look: Look = PLAIN, expected: Expected = NOTHING_EXPECTED) -> str:
    """Return the details of one result, without pictures, in several lines."""
    head = f"{result.verdict.mark} {wording.full_name(result)}  {wording.place(result)}  {result.verdict.value}"
    lines = [look.paint(head, _COLOURS[result.verdict])]
    if wording.surprises(result, expected):
        lines.append(look.paint(f"  {_SURPRISE} expected: {expected[result.key].value}", _LOUD))
    lines += look.wrap(one_line(result.says), 2)
    if result.reason:
        for number, each in enumerate(clean(result.reason).split("\n")):
            lines += look.wrap(each, 10, "  because " if number == 0 else "")
    lines += _evidence(result, look)
    timed = [f"{took:g} s"] if (took := wording.seconds(result.times)) is not None else []
    timed += [f"{what}: {count} ticks" for what, count in wording.ticks(result).items()]
    if timed:
        lines += look.wrap(", ".join(timed), 10, "  took")
    if result.events:
        counts = ", ".join(f"{count} {kind}" for kind, count in wording.count_events(result.events).items())
        lines += look.wrap(counts, 10, "  events")
    if result.origin:
        lines += look.wrap(one_line(result.origin), 10, "  origin")
    return look.finish("\n".join(each.rstrip() for each in lines))


def _evidence(result: Result, look: Look) -> list[str]:
    marks = {True: ("ok", "32"), False: ("NO", "31"), None: ("--", _DIM)}
    longest = max((len(one_line(wording.value_text(each.saw))) for each in result.evidence), default=0)
    room = max(look.width // 2, look.width - longest - 30)
    room = min(max((len(one_line(each.what)) for each in result.evidence), default=0), room)
    lines: list[str] = []
    for each in result.evidence:
        word, code = marks[each.ok]
        saw = one_line(wording.value_text(each.saw))
        if each.ok is False:
            saw += f"   wanted: {one_line(wording.wanted(each))}"
        what = textwrap.wrap(one_line(each.what), max(room, 1), break_on_hyphens=False) or [""]
        values = textwrap.wrap(saw, max(look.width - room - 8, 20)) or [""]
        what += [""] * (len(values) - len(what))
        values += [""] * (len(what) - len(values))
        for number, (left, right) in enumerate(zip(what, values, strict=True)):
            mark = look.paint(word, code) if number == 0 else "  "
            lines.append(f"  {mark}  {left:<{room}}  {right}")
    return lines
