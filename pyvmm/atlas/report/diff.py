# SPDX-License-Identifier: Apache-2.0
"""Compare two atlases: claims that only one has, different verdicts, and different evidence under the same verdict.

Times are never compared. Differences of the hosts are reported, but do not affect :attr:`Diff.same`. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from pyvmm.atlas.model import Atlas, Result
from pyvmm.atlas.report import wording
from pyvmm.experiment.record import TCG, Evidence, Picture, Value
from pyvmm.reports.look import PLAIN, Look
from pyvmm.reports.words import headline, one_line, shortened

MANY = 4
"""From this many claims with the same difference and reason, they are folded into one line."""


_REASON, _MAP = "reason", "page map: "


class Line(NamedTuple):
    """One different observation. None on the side that lacks it."""

    what: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True)
class Change:
    """A result of both that differs: in its verdict, or in ``lines``."""

    a: Result
    b: Result
    lines: tuple[Line, ...]

    @property
    def turned(self) -> bool:
        """Whether the verdict differs."""
        return self.a.verdict is not self.b.verdict


@dataclass(frozen=True, slots=True)
class Diff:
    """All differences of the atlases ``a`` and ``b``, in the order of ``a``'s run, then of ``b``'s."""

    a: Atlas
    b: Atlas
    host: dict[str, tuple[Value | None, Value | None]]
    only_a: tuple[Result, ...]
    only_b: tuple[Result, ...]
    verdicts: tuple[Change, ...]
    evidence: tuple[Change, ...]
    """Changes under the same verdict."""
    equal: int
    """The number of equal results."""

    @property
    def same(self) -> bool:
        """Whether both have the same claims, with the same verdicts, reasons and evidence."""
        return not (self.only_a or self.only_b or self.verdicts or self.evidence)


def compare(a: Atlas, b: Atlas) -> Diff:
    """Return the differences of two atlases."""
    in_a = {result.key: result for result in a.results}
    in_b = {result.key: result for result in b.results}
    changes = [Change(one, in_b[key], _lines(one, in_b[key])) for key, one in in_a.items() if key in in_b]
    changed = [change for change in changes if change.turned or change.lines]
    fields = dict.fromkeys([*a.host, *b.host])
    hosts = {field: (a.host.get(field), b.host.get(field)) for field in fields}
    return Diff(
        a,
        b,
        {field: (one, other) for field, (one, other) in hosts.items() if not _equal(one, other)},
        tuple(result for key, result in in_a.items() if key not in in_b),
        tuple(result for key, result in in_b.items() if key not in in_a),
        tuple(change for change in changed if change.turned),
        tuple(change for change in changed if not change.turned),
        len(changes) - len(changed),
    )


def to_json(diff: Diff) -> dict[str, Any]:
    """Return a diff as plain values."""
    return {
        "same": diff.same,
        "a": diff.a.host,
        "b": diff.b.host,
        "host": {field: list(pair) for field, pair in diff.host.items()},
        "only_a": [_named(result) | {"verdict": result.verdict.value} for result in diff.only_a],
        "only_b": [_named(result) | {"verdict": result.verdict.value} for result in diff.only_b],
        "verdicts": [
            _named(change.a) | {"a": change.a.verdict.value, "b": change.b.verdict.value, "lines": _plain(change.lines)}
            for change in diff.verdicts
        ],
        "evidence": [
            _named(change.a) | {"verdict": change.a.verdict.value, "lines": _plain(change.lines)}
            for change in diff.evidence
        ],
        "equal": diff.equal,
    }


def _named(result: Result) -> dict[str, Any]:
    return {"id": result.id, "group": result.group, "protection": result.protection, "backing": result.backing}


def _plain(lines: Iterable[Line]) -> list[dict[str, str | None]]:
    return [line._asdict() for line in lines]


# -- what was seen


def _equal(a: Value | None, b: Value | None) -> bool:
    # In Python True is 1; on a report they are "yes" and "1".
    return type(a) is type(b) and a == b


def _lines(a: Result, b: Result) -> tuple[Line, ...]:
    lines = [Line(_REASON, a.reason or None, b.reason or None)] if a.reason != b.reason else []
    lines += _paired(_seen(a.evidence), _seen(b.evidence))
    # Events depend on time: their order, and with several vCPUs their number.
    return (*lines, *_paired(_maps(a.pictures), _maps(b.pictures)))


def _paired(a: Mapping[tuple[str, int], str], b: Mapping[tuple[str, int], str]) -> list[Line]:
    keys = dict.fromkeys([*a, *b])
    return [Line(key[0], a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def _seen(evidence: Iterable[Evidence]) -> dict[tuple[str, int], str]:
    """Return observations by name; a number distinguishes equal names."""
    found: dict[tuple[str, int], str] = {}
    for each in evidence:
        wanted = "" if each.wanted is None else f" (wanted: {wording.value_text(each.wanted)})"
        found[_free(found, each.what)] = wording.value_text(each.saw) + (wanted if each.ok is False else "")
    return found


def _maps(pictures: Iterable[Picture]) -> dict[tuple[str, int], str]:
    found: dict[tuple[str, int], str] = {}
    for picture in pictures:
        runs = ", ".join(f"{pages} pages at {gpa:#x}: {entry:#x}" for gpa, pages, entry in picture.runs)
        found[_free(found, _MAP + picture.title)] = runs
    return found


def _free(found: Mapping[tuple[str, int], str], what: str) -> tuple[str, int]:
    number = 0
    while (what, number) in found:
        number += 1
    return what, number


# -- as text


def render(diff: Diff, look: Look = PLAIN, *, verbose: bool = False) -> str:
    """Return a diff as text, by group. Many equal differences are folded, unless ``verbose``."""
    return look.finish("\n".join(line.rstrip() for line in _Text(diff, look, verbose).lines()))


def summary(diff: Diff) -> str:
    """Return one line with the numbers of differences."""
    if diff.same:
        return f"The same in both: {diff.equal} results."
    parts = [
        (len(diff.verdicts), "verdict differs", "verdicts differ"),
        (len(diff.evidence), "result has other evidence", "results have other evidence"),
        (len(diff.only_a), "is only in A", "are only in A"),
        (len(diff.only_b), "is only in B", "are only in B"),
        (diff.equal, "is the same", "are the same"),
    ]
    return ", ".join(f"{count} {one if count == 1 else more}" for count, one, more in parts if count) + "."


class _Row(NamedTuple):
    """One different result. Rows with the same ``fold`` (a head, and a reason) may be folded into one line."""

    result: Result
    what: str
    more: list[str]
    fold: tuple[str, ...] | None


class _Text:
    def __init__(self, diff: Diff, look: Look, verbose: bool) -> None:
        self._diff, self._look, self._verbose = diff, look, verbose

    def lines(self) -> list[str]:
        """Return the whole text."""
        a, b = f"A: {headline(self._diff.a.host)}", f"B: {headline(self._diff.b.host)}"
        beside = len(a) + 4 + len(b) <= self._look.width
        lines = [self._look.paint(each, "1") for each in ([f"{a}    {b}"] if beside else [a, b])]
        lines += self._host()
        rows = self._ordered()
        folds: dict[tuple[str, ...], list[_Row]] = {}
        for row in rows:
            if row.fold and not self._verbose:
                folds.setdefault(row.fold, []).append(row)
        folded = {fold: some for fold, some in folds.items() if len({row.result.id for row in some}) >= MANY}
        for fold, some in folded.items():
            lines += self._folded(fold, some)
        return [*lines, *self._listed([row for row in rows if row.fold not in folded]), summary(self._diff)]

    def _host(self) -> list[str]:
        # The first line already has the fields that name the two.
        named = () if self._verbose else ("kernel", "mode", TCG)
        lines: list[str] = []
        for field, (a, b) in self._diff.host.items():
            if field not in named:
                what = wording.HOST.get(field, one_line(field))
                change = _change(
                    None if a is None else wording.value_text(a),
                    None if b is None else wording.value_text(b),
                    self._look,
                )
                lines += self._look.wrap(f"{what}: {change}", 3)
        return lines

    def _ordered(self) -> list[_Row]:
        """Return a row for each result that differs, groups and claims in the order of A's run, then of B's."""
        diff = self._diff
        rows = [_only(result, "A", diff.b) for result in diff.only_a]
        rows += [_only(result, "B", diff.a) for result in diff.only_b]
        rows += [self._changed(change) for change in (*diff.verdicts, *diff.evidence)]
        order: dict[object, int] = {}
        for each in (*diff.a.results, *diff.b.results):
            for key in ((each.group,), (each.group, each.id), each.key):
                order.setdefault(key, len(order))

        def rank(row: _Row) -> list[int]:
            return [order[key] for key in ((row.result.group,), (row.result.group, row.result.id), row.result.key)]

        return sorted(rows, key=rank)

    def _changed(self, change: Change) -> _Row:
        a, b = change.a, change.b
        what = f"{a.verdict.value} → {b.verdict.value}" if change.turned else f"{a.verdict.value}, but:"
        lines: list[Line] = list(change.lines)
        maps: list[Line] = []
        if not self._verbose:
            if not (a.evidence and b.evidence):
                # If one of the two has no evidence, report its reason, not the missing evidence.
                lines = [line for line in lines if line.what == _REASON] or lines
            maps = [line for line in lines if line.what.startswith(_MAP)]
            lines = [line for line in lines if line not in maps]
        more = [text for line in lines for text in self._line(line)]
        if maps:
            what_else = f"{len(maps)} page map{'s' if len(maps) > 1 else ''}"
            more += self._look.wrap(f"{'besides' if lines else 'differing'}: {what_else}", 9, "      ")
        reasons = a.reason or b.reason
        alone = change.turned or all(line.what == _REASON for line in change.lines)
        fold = ("change", a.protection, what, a.reason, b.reason) if reasons and alone else None
        return _Row(b, what, more, fold)

    def _line(self, line: Line) -> list[str]:
        if line.what == _REASON:
            sides = [f"{side}: {one_line(said)}" for side, said in (("A", line.a), ("B", line.b)) if said]
            return [text for said in sides for text in self._look.wrap(said, 9, "      ")]
        return self._look.wrap(f"{one_line(line.what)}: {_change(line.a, line.b, self._look)}", 9, "      ")

    def _folded(self, fold: tuple[str, ...], rows: list[_Row]) -> list[str]:
        claims = len({row.result.id for row in rows})
        if fold[0] == "change":
            head = f"{claims} claims in {one_line(fold[1])}: {rows[0].what}".removesuffix(", but:")
            more = rows[0].more if rows[0].what.endswith(", but:") else self._line(Line(_REASON, fold[3], fold[4]))
        else:
            head, more = f"{claims} claims {fold[1]}", []
        return [self._look.paint(one_line(head), "33"), *more]

    def _listed(self, rows: list[_Row]) -> list[str]:
        width = min(max((len(wording.name(row.result)) for row in rows), default=0), 40)
        place = max((len(wording.place(row.result)) for row in rows), default=0)
        lines: list[str] = []
        group = claim = None
        told: list[str] = []
        for row in rows:
            if row.result.group != group:
                group, claim = row.result.group, None
                lines.append(self._look.paint(one_line(group), "1"))
            name = wording.name(row.result) if row.result.id != claim else ""
            claim = row.result.id
            lines.append(f"  {name:<{width}}   {wording.place(row.result):<{place}}   {row.what}")
            if self._verbose or row.more != told:
                lines += [self._look.paint(each, "2") for each in row.more]
            told = row.more
        return lines


def _only(result: Result, side: str, other: Atlas) -> _Row:
    what = f"only in {side}: {result.verdict.value}"
    if (result.protection, result.backing) not in other.columns():
        return _Row(result, what, [], ("only", f"in {wording.place(result)}, where only {side} was run"))
    if all(each.id != result.id for each in other.results):
        return _Row(result, what, [], ("only", f"of {result.group} only in {side}"))
    return _Row(result, what, [], None)


def _change(a: str | None, b: str | None, look: Look) -> str:
    """Return the old and new value. Long values are shown only from their first difference."""
    a, b = (None if each is None else one_line(each) for each in (a, b))
    if a is not None and b is not None and len(a) + len(b) > look.width:
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
        start = max(a.rfind(" ", 0, same) + 1, 0)
        a, b = (f"…{each[start:]}" if start else each for each in (a, b))
    return " → ".join("nothing" if each is None else shortened(each, max(look.width, 40)) for each in (a, b))
