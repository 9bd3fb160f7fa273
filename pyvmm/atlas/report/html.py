# SPDX-License-Identifier: Apache-2.0
"""An atlas as one self-contained HTML file: verdicts by claim and place, which unfold to the evidence.

Pure. Foreign text is escaped, and a policy in the page allows only its own script. The text is ASCII, so it is the same
file in every encoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pyvmm.atlas.model import Atlas, Result
from pyvmm.atlas.report import evidence, style, wording
from pyvmm.atlas.report.figures import Figures
from pyvmm.atlas.report.wording import NOTHING_EXPECTED, Expected
from pyvmm.experiment.record import TCG, Verdict
from pyvmm.labenv import TCG_NOTE
from pyvmm.reports.escaping import escaped, escaped_prose, script_json
from pyvmm.reports.page import facts, file_name, page
from pyvmm.reports.words import headline, one_line, shortened
from pyvmm.terminal import clean

_FEW = 2
"""A claim with up to this many results unfolds them as well."""


def render(atlas: Atlas, expected: Expected = NOTHING_EXPECTED, headings: Mapping[str, str] | None = None) -> str:
    """Return the page. ``headings`` has the groups' subjects. Verdicts that differ from ``expected`` are outlined."""
    made = _Page(atlas, expected, headings or {})
    title = f"{headline(atlas.host)} - pyvmm atlas"
    return page(title, made.style(), style.SCRIPT, made.parts())


class _Anchors:
    """Gives every group, claim and result a unique anchor for links."""

    def __init__(self) -> None:
        self._taken: dict[str, object] = {}

    def of(self, names: list[str], what: object) -> str:
        """Return the unique anchor of ``what``, made of ``names`` joined by slashes."""
        # The page's own ids begin with an underscore, these do not.
        plain = re.sub(r"[^A-Za-z0-9._/-]+", "-", "/".join(names)).lstrip("_") or "-"
        anchor, number = plain, 1
        while self._taken.setdefault(anchor, what) != what:
            number += 1
            anchor = f"{plain}-{number}"
        return anchor


class _Page:
    def __init__(self, atlas: Atlas, expected: Expected, headings: Mapping[str, str]) -> None:
        self._atlas, self._expected, self._headings = atlas, expected, headings
        self._columns = wording.columns(atlas)
        self._places = [(protection, backing) for protection, some in self._columns.items() for backing in some]
        self._first = {(protection, some[0]) for protection, some in self._columns.items()}
        self._anchors = _Anchors()
        self._figures = Figures(escaped)

    def parts(self) -> Iterable[str]:
        """Yield the page's body, piece by piece."""
        body = [*self._header(), *self._choices(), *self._reasons()]
        for group, results in self._atlas.groups().items():
            body += self._group(group, results)
        yield self._figures.definitions()
        yield from body
        yield from self._footer()
        yield f'<script type="application/json" id="_json">{script_json(self._atlas.to_json())}</script>'

    def style(self) -> str:
        """Return the page's style sheet."""
        kinds = [wording.SHORT[verdict] for verdict, count in self._atlas.counts().items() if count]
        sizes = [len(backings) for backings in self._columns.values()]
        return f"{style.CSS}{style.columns(sizes)}{style.filters(kinds)}"

    # -- above the claims

    def _header(self) -> Iterable[str]:
        host = self._atlas.host
        kernel = one_line(str(host["kernel"])) if host.get("kernel") else ""
        mode = one_line(str(host["mode"])) if host.get("mode") else ""
        yield '<header><p class="kicker">pyvmm atlas</p>'
        title = f"What {f'Linux {kernel}' if kernel else 'this kernel'} does with guest memory"
        yield f"<h1>{escaped(title)}{escaped(f', KVM in {mode} mode') if mode else ''}</h1>"
        if host.get(TCG) is True:
            yield f'<p class="stripe">{TCG_NOTE}.</p>'
        listed = facts(wording.host_facts(self._atlas))
        yield f'</header><div class="top"><dl class="facts">{listed}</dl>'
        yield from self._contents()
        yield "</div>"

    def _contents(self) -> Iterable[str]:
        found = [verdict for verdict, count in self._atlas.counts().items() if count]
        marks = "".join(f'<th scope="col" title="{verdict.value}">{verdict.mark}</th>' for verdict in found)
        yield f'<nav><table class="toc"><thead><tr><td></td>{marks}</tr></thead><tbody>'
        for group, results in self._atlas.groups().items():
            numbers = "".join(_number(sum(result.verdict is verdict for result in results)) for verdict in found)
            about = escaped(self._headings.get(group, ""))
            link = f'<a href="#{self._anchors.of([group], (group,))}">{escaped(group)}</a>'
            yield f'<tr><th scope="row">{link} {about}</th>{numbers}</tr>'
        yield "</tbody></table></nav>"

    def _choices(self) -> Iterable[str]:
        yield '<fieldset class="filter"><legend>Show</legend>'
        yield f'<label><input type="radio" name="_only" checked>all {len(self._atlas.results)} results</label>'
        for verdict, count in self._atlas.counts().items():
            if count:
                short = wording.SHORT[verdict]
                yield f'<label><input type="radio" name="_only" id="_only-{short}">'
                yield f'<span class="v {short}">{verdict.mark}</span>{wording.counted(verdict, count)}</label>'
        yield "</fieldset>"
        yield '<p class="tools"><span>Unfold a claim for its origin and evidence; a verdict leads to its own.</span>'
        if any(wording.surprises(result, self._expected) for result in self._atlas.results):
            yield "<span>A heavy frame: the verdict is not the expected one.</span>"
        yield '<span class="js"><button id="_unfold">unfold all</button> &middot; '
        yield '<button id="_fold">fold all</button></span></p>'

    def _reasons(self) -> Iterable[str]:
        for verdict in (Verdict.CRASHED, Verdict.UNTOLD):
            folded = wording.fold(self._atlas.results, verdict)
            if folded:
                count = sum(len(each.results) for each in folded)
                few = "for one reason" if len(folded) == 1 else f"for {len(folded)} reasons"
                title = f"{verdict.mark} {wording.counted(verdict, count)}, {few}"
                yield f'<details class="reasons"><summary>{title}</summary><ul>'
                for _, reason, results in folded:
                    why = escaped(shortened(reason or "no reason given", 400))
                    yield f"<li>{len(results)}&times; {why}<small>{escaped(wording.some(results))}</small></li>"
                yield "</ul></details>"

    def _footer(self) -> Iterable[str]:
        yield "<footer><p>"
        name = escaped(file_name("atlas", self._atlas.host.get("kernel"), ".json"))
        yield f'<span class="js"><a id="_data" href="#" download="{name}">Download the results</a> as JSON: </span>'
        yield "they are in this page's source, in the element <code>_json</code>. "
        yield "<code>pyvmm atlas diff A.json B.json</code> compares two kernels.</p></footer>"

    # -- the claims

    def _group(self, group: str, results: list[Result]) -> Iterable[str]:
        anchor, about = self._anchors.of([group], (group,)), self._headings.get(group, "")
        yield '<section class="group">'
        tops = "".join(
            f'<b class="first" style="grid-column:span {len(backings)}">{_breakable(protection)}</b>'
            for protection, backings in self._columns.items()
        )
        seconds = "".join(f"<span{self._edge(place)}>{_breakable(place[1])}</span>" for place in self._places)
        small = f" <small>{escaped(about)}</small>" if about else ""
        title = f'<h2 id="{anchor}"><a href="#{anchor}">{escaped(group)}</a>{small}</h2>'
        yield f'<div class="grid head">{title}{tops}{seconds}</div>'
        claims: dict[str, list[Result]] = {}
        for result in results:
            claims.setdefault(result.id, []).append(result)
        for same in claims.values():
            yield from self._claim(same)
        yield "</section>"

    def _edge(self, place: tuple[str, str]) -> str:
        return ' class="first"' if place in self._first else ""

    def _claim(self, results: list[Result]) -> Iterable[str]:
        first = results[0]
        at = {(result.protection, result.backing): result for result in results}
        cells = "".join(self._cell(place, at.get(place)) for place in self._places)
        has = " ".join(f"has-{short}" for short in dict.fromkeys(wording.SHORT[result.verdict] for result in results))
        yield f'<details class="claim {has}" id="{self._claim_anchor(first)}"><summary class="grid">'
        what = f"<b>{escaped(wording.name(first))}</b> <span>{escaped(first.says)}</span>"
        yield f'<span class="what">{what}</span>{cells}</summary>'
        yield '<div class="body">'
        for origin in dict.fromkeys(result.origin for result in results if result.origin):
            yield f'<p class="origin">{escaped_prose(origin)}</p>'
        places = sorted(at, key=self._places.index)
        for place in places:
            yield from self._result(at[place], unfolded=len(at) <= _FEW)
        yield "</div></details>"

    def _claim_anchor(self, result: Result) -> str:
        return self._anchors.of([result.group, wording.name(result)], (result.group, result.id))

    def _anchor(self, result: Result) -> str:
        names = [result.group, wording.name(result), result.protection, result.backing]
        return self._anchors.of(names, (result.group, *result.key))

    def _cell(self, place: tuple[str, str], result: Result | None) -> str:
        edge = " first" if place in self._first else ""
        if result is None:
            return f'<span class="not{edge}">&middot;</span>'
        short, title = wording.SHORT[result.verdict], wording.place(result)
        title += f": {result.verdict.value}"
        if wording.surprises(result, self._expected):
            edge += " odd"
            title += f", expected: {self._expected[result.key].value}"
        if result.reason:
            title += f": {shortened(result.reason, 120)}"
        return (
            f'<a class="v {short}{edge}" href="#{self._anchor(result)}" title="{escaped(title)}">'
            f"<i>{escaped(wording.place(result))} </i>{result.verdict.mark}<small>{short}</small></a>"
        )

    def _result(self, result: Result, *, unfolded: bool) -> Iterable[str]:
        anchor, verdict = self._anchor(result), result.verdict
        yield f'<details class="result" id="{anchor}"{" open" if unfolded else ""}><summary>'
        yield f'<span class="v {wording.SHORT[verdict]}">{verdict.mark}</span><b>{escaped(wording.place(result))}</b>'
        odd = ""
        if wording.surprises(result, self._expected):
            odd = f" <b>(expected: {self._expected[result.key].value})</b>"
        yield f"<span>{verdict.value}{odd}</span>"
        why = shortened(result.reason, 160)
        because = f'<span class="why">{escaped(why)}</span>' if why else ""
        yield f'{because}<a href="#{anchor}">#</a></summary><div>'
        if why != clean(result.reason):
            yield f'<p class="because">{escaped_prose(result.reason)}</p>'
        yield evidence.table(result)
        yield from self._times(result)
        yield from self._figures.of(result, anchor)
        yield "</div></details>"

    def _times(self, result: Result) -> Iterable[str]:
        took = wording.seconds(result.times)
        parts = [f"<b>{took:g} s</b> in all"] if took is not None else []
        parts += [f"{escaped(what)}: <b>{escaped(count)}</b> ticks" for what, count in wording.ticks(result).items()]
        if parts:
            yield f'<p class="times">{", ".join(parts)}</p>'


def _number(count: int) -> str:
    return f"<td>{count}</td>" if count else '<td class="nil">0</td>'


def _breakable(name: str) -> str:
    """Return a column's name that may be broken after an underscore."""
    return escaped(one_line(name)).replace("_", "_<wbr>")
