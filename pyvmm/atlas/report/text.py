# SPDX-License-Identifier: Apache-2.0
"""An atlas for the terminal: a line as each result comes, a table at the end, and everything of one result.

Pure functions; text that others wrote (reasons, evidence, what a crashed process said) cannot act on the terminal.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

from pyvmm.atlas.model import Atlas, Result
from pyvmm.experiment.record import Verdict
from pyvmm.reports import words
from pyvmm.reports.words import NOTHING_EXPECTED, Expected

_COLOURS = {Verdict.HOLDS: "32", Verdict.FAILS: "31", Verdict.UNTOLD: "33", Verdict.CRASHED: "35;1"}
_BOLD, _DIM, _LOUD = "1", "2", "31;1"

_ASCII = str.maketrans({"✓": "+", "✗": "x", "·": ".", "…": "~", "→": "->", "×": "x"})  # noqa: RUF001
_SURPRISE = "*"
_REASON = 400
"""Characters of a reason in the list below the table; the process that crashed may have said much."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the terminal can show."""

    width: int = 80
    colours: bool = False
    ascii: bool = False
    """Its encoding is not UTF-8: nothing but ASCII is written."""

    @classmethod
    def of(cls, stream: TextIO) -> Look:
        """Ask a stream what it can show; what is no terminal gets 100 columns."""
        utf8 = (stream.encoding or "").lower().replace("-", "").replace("_", "") in ("utf8", "cp65001")
        tty = stream.isatty()
        width = max(shutil.get_terminal_size((100, 24)).columns, 40) if tty else 100
        return cls(width, tty and not os.environ.get("NO_COLOR"), not utf8)

    def paint(self, text: str, code: str) -> str:
        """Colour ``text`` if there are colours."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours and text else text

    def finish(self, text: str) -> str:
        """Return ``text`` as this terminal can show it."""
        return text.translate(_ASCII).encode("ascii", "backslashreplace").decode() if self.ascii else text

    def wrap(self, text: str, indent: int, first: str = "") -> list[str]:
        """Fill lines with ``text``, all indented, the first one after ``first``."""
        filled = textwrap.wrap(
            text,
            max(self.width, indent + 20),
            initial_indent=first.ljust(indent),
            subsequent_indent=" " * indent,
            break_long_words=True,
            break_on_hyphens=False,
        )
        return filled or [first.rstrip()]


PLAIN = Look()


def line(result: Result, look: Look = PLAIN, expected: Expected = NOTHING_EXPECTED) -> str:
    """Return one line for a result that has just come."""
    verdict = result.verdict
    mark = verdict.mark + (_SURPRISE if words.surprises(result, expected) else " ")
    # Most of the line is for the names: claims' ids are long, and the reasons are told in full below the table.
    id_width = max(30, look.width - 54)
    where = f"{words.full_name(result):<{id_width}} {words.place(result)}".ljust(id_width + 21) + " "
    what = verdict.value
    if words.surprises(result, expected):
        what += f", expected: {expected[result.key].value}"
    if result.reason:
        what += f": {result.reason}"
    what = words.shortened(what, max(look.width - len(where) - 2, 14))
    return look.finish(f"{look.paint(mark, _COLOURS[verdict])}{where}{look.paint(what, _COLOURS[verdict])}")


def table(
    atlas: Atlas, look: Look = PLAIN, expected: Expected = NOTHING_EXPECTED, headings: Mapping[str, str] | None = None
) -> str:
    """Return all verdicts: a row a claim, a column a protection and backing; then the reasons, each once.

    ``headings`` says what a group is about.
    """
    columns = _Columns(atlas, look)
    lines = [*columns.head(look)]
    for group, results in atlas.groups().items():
        about = words.one_line((headings or {}).get(group, ""))
        lines.append(look.paint(words.one_line(group), _BOLD) + (f"  {look.paint(about, _DIM)}" if about else ""))
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
    """Return what the marks mean, with how many there are."""
    parts = [
        f"{look.paint(verdict.mark, _COLOURS[verdict])} {words.counted(verdict, count)}"
        for verdict, count in atlas.counts().items()
    ]
    return look.finish("   ".join(parts))


def _reasons(atlas: Atlas, verdict: Verdict, look: Look) -> list[str]:
    lines: list[str] = []
    for folded in words.fold(atlas.results, verdict):
        reason = words.shortened(folded.reason or "no reason given", _REASON)
        lines += look.wrap(reason, 9, f"{len(folded.results):>6}×  ")  # noqa: RUF001
        names = words.some(folded.results)
        lines += [look.paint(each, _DIM) for each in look.wrap(names, 9)]
    head = look.paint(f"{verdict.mark} {verdict.value}", _COLOURS[verdict])
    return ["", head, *lines] if lines else []


def _surprises(atlas: Atlas, look: Look, expected: Expected) -> list[str]:
    found = [result for result in atlas.results if words.surprises(result, expected)]
    if not expected:
        return []
    if not found:
        known = sum(result.key in expected for result in atlas.results)
        return ["", f"{known} of {len(atlas.results)} verdicts were expected, and each is as expected."]
    lines = ["", look.paint(f"{_SURPRISE} not as expected", _LOUD)]
    for result in found:
        where = f"{words.full_name(result)}  {words.place(result)}  "
        lines += look.wrap(f"{where}expected: {expected[result.key].value}; is: {result.verdict.value}", 4)
    return lines


class _Columns:
    """Where the columns of the table are: under backings' names where these fit, else under a letter each."""

    def __init__(self, atlas: Atlas, look: Look) -> None:
        pairs = [(protection, backing) for protection, some in words.columns(atlas).items() for backing in some]
        self._letters = _letters([backing for _, backing in pairs])
        longest = max((len(words.name(result)) for result in atlas.results), default=0) + 4
        self._full = longest + self._place(pairs, full=True) <= look.width
        wide = self._place(pairs, full=self._full)
        self._names = longest if longest + wide <= look.width else max(look.width - wide, 16)

    def _place(self, pairs: list[tuple[str, str]], *, full: bool) -> int:
        """Find each column's start behind the names; returns the width of all."""
        self._starts: dict[tuple[str, str], int] = {}
        self._tops: dict[str, int] = {}
        end = at = 0
        for protection, backing in pairs:
            if protection not in self._tops:
                at = max(end + 1, at + 1) if self._tops else 0
                self._tops[protection] = at
                end = at + len(words.one_line(protection)) + 1
            self._starts[protection, backing] = at
            at += (len(words.one_line(backing)) if full else 1) + 1
        return max(end, at)

    def head(self, look: Look) -> list[str]:
        """Return the lines above the table."""
        tops = _at({at: words.one_line(protection) for protection, at in self._tops.items()})
        backs = {
            at: words.one_line(backing) if self._full else self._letters[backing]
            for (_, backing), at in self._starts.items()
        }
        indent = " " * self._names
        return [look.paint((indent + tops).rstrip(), _BOLD), indent + _at(backs)]

    def row(self, results: Mapping[tuple[str, str], Result], look: Look, expected: Expected) -> str:
        """Return a claim's line."""
        line = words.shortened(words.name(next(iter(results.values()))), self._names - 3)
        line = f"  {line:<{self._names - 2}}"
        at = 0
        for pair, start in self._starts.items():
            result = results.get(pair)
            if result is None:
                cell, code = "·", _DIM
            else:
                surprise = words.surprises(result, expected)
                cell = result.verdict.mark + (_SURPRISE if surprise else "")
                code = _COLOURS[result.verdict] + (";7" if surprise else "")
            line += " " * (start - at) + look.paint(cell, code)
            at = start + len(cell)
        return line

    def legend(self) -> list[str]:
        """Say what the letters stand for, if there are any."""
        if self._full or not self._letters:
            return []
        return ["   ".join(f"{letter} {words.one_line(backing)}" for backing, letter in self._letters.items())]


def _letters(backings: list[str]) -> dict[str, str]:
    """Give each backing a character of its own, one of its name if there is one left."""
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
    """Return everything of one result but its pictures, over several lines."""
    head = f"{result.verdict.mark} {words.full_name(result)}  {words.place(result)}  {result.verdict.value}"
    lines = [look.paint(head, _COLOURS[result.verdict])]
    if words.surprises(result, expected):
        lines.append(look.paint(f"  {_SURPRISE} expected: {expected[result.key].value}", _LOUD))
    lines += look.wrap(words.one_line(result.says), 2)
    if result.reason:
        for number, each in enumerate(words.clean(result.reason).split("\n")):
            lines += look.wrap(each, 10, "  because " if number == 0 else "")
    lines += _evidence(result, look)
    timed = [f"{took:g} s"] if (took := words.seconds(result.times)) is not None else []
    timed += [f"{what}: {count} ticks" for what, count in words.ticks(result).items()]
    if timed:
        lines += look.wrap(", ".join(timed), 10, "  took")
    if result.events:
        counts = ", ".join(f"{count} {kind}" for kind, count in words.count_events(result.events).items())
        lines += look.wrap(counts, 10, "  events")
    if result.origin:
        lines += look.wrap(words.one_line(result.origin), 10, "  origin")
    return look.finish("\n".join(each.rstrip() for each in lines))


def _evidence(result: Result, look: Look) -> list[str]:
    marks = {True: ("ok", "32"), False: ("NO", "31"), None: ("--", _DIM)}
    longest = max((len(words.one_line(words.said(each.saw))) for each in result.evidence), default=0)
    room = max(look.width // 2, look.width - longest - 30)
    room = min(max((len(words.one_line(each.what)) for each in result.evidence), default=0), room)
    lines: list[str] = []
    for each in result.evidence:
        word, code = marks[each.ok]
        saw = words.one_line(words.said(each.saw))
        if each.ok is False:
            saw += f"   wanted: {words.one_line(words.wanted(each))}"
        what = textwrap.wrap(words.one_line(each.what), max(room, 1), break_on_hyphens=False) or [""]
        values = textwrap.wrap(saw, max(look.width - room - 8, 20)) or [""]
        what += [""] * (len(values) - len(what))
        values += [""] * (len(what) - len(values))
        for number, (left, right) in enumerate(zip(what, values, strict=True)):
            mark = look.paint(word, code) if number == 0 else "  "
            lines.append(f"  {mark}  {left:<{room}}  {right}")
    return lines
