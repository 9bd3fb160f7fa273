# SPDX-License-Identifier: Apache-2.0
"""An atlas as one HTML file that needs nothing else: verdicts by claim and place, unfolding into all that was seen.

Pure: data to text. Whatever others wrote is escaped, and a policy in the page lets no script run but the page's own.
The text is ASCII, so that it is the same file in whatever encoding it is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping
from html import escape

from pyvmm.atlas.model import Atlas, Result
from pyvmm.atlas.report.figures import Figures
from pyvmm.experiment.record import Verdict
from pyvmm.reports import style, words
from pyvmm.reports.words import NOTHING_EXPECTED, Expected

_URL = re.compile(r"https?://[^\s<>\"'`\\]+[^\s<>\"'`\\.,;:!?)\]}]")
_SOURCE = re.compile(
    r"\b(?:arch|virt|mm|fs|kernel|include|drivers|lib|tools|Documentation)/[\w./+-]+\.(?:[chS]|rst)\b(?::\d+)?"
)
_FEW = 2
"""Results of one claim that are unfolded with it."""


def render(atlas: Atlas, expected: Expected = NOTHING_EXPECTED, headings: Mapping[str, str] | None = None) -> str:
    """Return the page. ``headings`` says what a group is about; verdicts other than ``expected`` are outlined."""
    page = _Page(atlas, expected, headings or {})
    return "\n".join(page.parts()).encode("ascii", "xmlcharrefreplace").decode()


def text(said: str) -> str:
    """Return ``said`` as HTML text that means nothing else, in an attribute too."""
    return escape(words.clean(said), quote=True)


def prose(said: str) -> str:
    """Return ``said`` as HTML, with addresses of pages made links and names of source files set as code."""
    parts, end = [], 0
    said = words.clean(said)
    for match in _URL.finditer(said):
        url = escape(match[0], quote=True)
        parts += [_with_code(said[end : match.start()]), f'<a href="{url}" rel="noopener noreferrer">{url}</a>']
        end = match.end()
    return "".join([*parts, _with_code(said[end:])])


def _with_code(said: str) -> str:
    parts, end = [], 0
    for match in _SOURCE.finditer(said):
        parts += [escape(said[end : match.start()]), f"<code>{escape(match[0])}</code>"]
        end = match.end()
    return "".join([*parts, escape(said[end:])])


def embedded(atlas: Atlas) -> str:
    """Return the atlas as JSON that may stand in a script element: nothing in it can end or open an element."""
    said = json.dumps(atlas.to_json(), separators=(",", ":"))
    return said.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class _Anchors:
    """Gives every group, claim and result a name of its own that a link can point at."""

    def __init__(self) -> None:
        self._taken: dict[str, object] = {}

    def of(self, names: list[str], what: object) -> str:
        """Return the anchor of ``what``, made of ``names`` joined by slashes; another thing's is another."""
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
        self._columns = words.columns(atlas)
        self._places = [(protection, backing) for protection, some in self._columns.items() for backing in some]
        self._first = {(protection, some[0]) for protection, some in self._columns.items()}
        self._anchors = _Anchors()
        self._figures = Figures(text)

    def parts(self) -> Iterable[str]:
        """Give the page, piece by piece."""
        body = [*self._header(), *self._choices(), *self._reasons()]
        for group, results in self._atlas.groups().items():
            body += self._group(group, results)
        kinds = [words.SHORT[verdict] for verdict, count in self._atlas.counts().items() if count]
        sizes = [len(backings) for backings in self._columns.values()]
        digest = b64encode(hashlib.sha256(style.SCRIPT.encode()).digest()).decode()
        yield "<!doctype html>"
        yield '<html lang="en"><head><meta charset="utf-8">'
        yield (
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            f"img-src data:; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'\">"
        )
        yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
        yield f"<title>{text(words.headline(self._atlas.host))} - pyvmm atlas</title>"
        yield '<link rel="icon" href="data:,">'
        yield f"<style>{style.CSS}{style.columns(sizes)}{style.filters(kinds)}</style>"
        yield f"</head><body>{self._figures.definitions()}"
        yield from body
        yield from self._footer()
        yield f'<script type="application/json" id="_json">{embedded(self._atlas)}</script>'
        yield f"<script>{style.SCRIPT}</script>"
        yield "</body></html>\n"

    # -- above the claims

    def _header(self) -> Iterable[str]:
        host = self._atlas.host
        kernel = words.one_line(str(host["kernel"])) if host.get("kernel") else ""
        mode = words.one_line(str(host["mode"])) if host.get("mode") else ""
        yield '<header><p class="kicker">pyvmm atlas</p>'
        title = f"What {f'Linux {kernel}' if kernel else 'this kernel'} does with guest memory"
        yield f"<h1>{text(title)}{text(f', KVM in {mode} mode') if mode else ''}</h1>"
        if host.get("emulated") is True:
            yield '<p class="stripe">Emulated by QEMU (TCG): times are relative only.</p>'
        facts = "".join(f"<dt>{text(what)}</dt><dd>{text(value)}</dd>" for what, value in words.host_facts(self._atlas))
        yield f'</header><div class="top"><dl class="facts">{facts}</dl>'
        yield from self._contents()
        yield "</div>"

    def _contents(self) -> Iterable[str]:
        found = [verdict for verdict, count in self._atlas.counts().items() if count]
        marks = "".join(f'<th scope="col" title="{verdict.value}">{verdict.mark}</th>' for verdict in found)
        yield f'<nav><table class="toc"><thead><tr><td></td>{marks}</tr></thead><tbody>'
        for group, results in self._atlas.groups().items():
            numbers = "".join(_number(sum(result.verdict is verdict for result in results)) for verdict in found)
            about = text(self._headings.get(group, ""))
            link = f'<a href="#{self._anchors.of([group], (group,))}">{text(group)}</a>'
            yield f'<tr><th scope="row">{link} {about}</th>{numbers}</tr>'
        yield "</tbody></table></nav>"

    def _choices(self) -> Iterable[str]:
        yield '<fieldset class="filter"><legend>Show</legend>'
        yield f'<label><input type="radio" name="_only" checked>all {len(self._atlas.results)} results</label>'
        for verdict, count in self._atlas.counts().items():
            if count:
                short = words.SHORT[verdict]
                yield f'<label><input type="radio" name="_only" id="_only-{short}">'
                yield f'<span class="v {short}">{verdict.mark}</span>{words.counted(verdict, count)}</label>'
        yield "</fieldset>"
        yield '<p class="tools"><span>Unfold a claim for its origin and evidence; a verdict leads to its own.</span>'
        if any(words.surprises(result, self._expected) for result in self._atlas.results):
            yield "<span>A heavy frame: the verdict is not the expected one.</span>"
        yield '<span class="js"><button id="_unfold">unfold all</button> &middot; '
        yield '<button id="_fold">fold all</button></span></p>'

    def _reasons(self) -> Iterable[str]:
        for verdict in (Verdict.CRASHED, Verdict.UNTOLD):
            folded = words.fold(self._atlas.results, verdict)
            if folded:
                count = sum(len(each.results) for each in folded)
                few = "for one reason" if len(folded) == 1 else f"for {len(folded)} reasons"
                title = f"{verdict.mark} {words.counted(verdict, count)}, {few}"
                yield f'<details class="reasons"><summary>{title}</summary><ul>'
                for _, reason, results in folded:
                    why = text(words.shortened(reason or "no reason given", 400))
                    yield f"<li>{len(results)}&times; {why}<small>{text(words.some(results))}</small></li>"
                yield "</ul></details>"

    def _footer(self) -> Iterable[str]:
        yield "<footer><p>"
        name = text(self._file_name())
        yield f'<span class="js"><a id="_data" href="#" download="{name}">Download the results</a> as JSON: </span>'
        yield "they are in this page's source, in the element <code>_json</code>. "
        yield "<code>pyvmm atlas diff A.json B.json</code> compares two kernels.</p></footer>"

    def _file_name(self) -> str:
        kernel = re.sub(r"[^\w.+-]+", "-", str(self._atlas.host.get("kernel", ""))).strip("-.")
        return f"atlas-{kernel}.json" if kernel else "atlas.json"

    # -- the claims

    def _group(self, group: str, results: list[Result]) -> Iterable[str]:
        anchor, about = self._anchors.of([group], (group,)), self._headings.get(group, "")
        yield '<section class="group">'
        tops = "".join(
            f'<b class="first" style="grid-column:span {len(backings)}">{_breakable(protection)}</b>'
            for protection, backings in self._columns.items()
        )
        seconds = "".join(f"<span{self._edge(place)}>{_breakable(place[1])}</span>" for place in self._places)
        small = f" <small>{text(about)}</small>" if about else ""
        title = f'<h2 id="{anchor}"><a href="#{anchor}">{text(group)}</a>{small}</h2>'
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
        has = " ".join(f"has-{short}" for short in dict.fromkeys(words.SHORT[result.verdict] for result in results))
        yield f'<details class="claim {has}" id="{self._claim_anchor(first)}"><summary class="grid">'
        what = f"<b>{text(words.name(first))}</b> <span>{text(first.says)}</span>"
        yield f'<span class="what">{what}</span>{cells}</summary>'
        yield '<div class="body">'
        for origin in dict.fromkeys(result.origin for result in results if result.origin):
            yield f'<p class="origin">{prose(origin)}</p>'
        places = sorted(at, key=self._places.index)
        for place in places:
            yield from self._result(at[place], unfolded=len(at) <= _FEW)
        yield "</div></details>"

    def _claim_anchor(self, result: Result) -> str:
        return self._anchors.of([result.group, words.name(result)], (result.group, result.id))

    def _anchor(self, result: Result) -> str:
        names = [result.group, words.name(result), result.protection, result.backing]
        return self._anchors.of(names, (result.group, *result.key))

    def _cell(self, place: tuple[str, str], result: Result | None) -> str:
        edge = " first" if place in self._first else ""
        if result is None:
            return f'<span class="not{edge}">&middot;</span>'
        short, title = words.SHORT[result.verdict], words.place(result)
        title += f": {result.verdict.value}"
        if words.surprises(result, self._expected):
            edge += " odd"
            title += f", expected: {self._expected[result.key].value}"
        if result.reason:
            title += f": {words.shortened(result.reason, 120)}"
        return (
            f'<a class="v {short}{edge}" href="#{self._anchor(result)}" title="{text(title)}">'
            f"<i>{text(words.place(result))} </i>{result.verdict.mark}<small>{short}</small></a>"
        )

    def _result(self, result: Result, *, unfolded: bool) -> Iterable[str]:
        anchor, verdict = self._anchor(result), result.verdict
        yield f'<details class="result" id="{anchor}"{" open" if unfolded else ""}><summary>'
        yield f'<span class="v {words.SHORT[verdict]}">{verdict.mark}</span><b>{text(words.place(result))}</b>'
        odd = ""
        if words.surprises(result, self._expected):
            odd = f" <b>(expected: {self._expected[result.key].value})</b>"
        yield f"<span>{verdict.value}{odd}</span>"
        why = words.shortened(result.reason, 160)
        because = f'<span class="why">{text(why)}</span>' if why else ""
        yield f'{because}<a href="#{anchor}">#</a></summary><div>'
        if why != words.clean(result.reason):
            yield f'<p class="because">{prose(result.reason)}</p>'
        yield from _evidence(result)
        yield from self._times(result)
        yield from self._figures.of(result, anchor)
        yield "</div></details>"

    def _times(self, result: Result) -> Iterable[str]:
        took = words.seconds(result.times)
        parts = [f"<b>{took:g} s</b> in all"] if took is not None else []
        parts += [f"{text(what)}: <b>{text(count)}</b> ticks" for what, count in words.ticks(result).items()]
        if parts:
            yield f'<p class="times">{", ".join(parts)}</p>'


def _evidence(result: Result) -> Iterable[str]:
    if not result.evidence:
        return
    yield '<table class="evidence"><thead><tr><th></th><th>what</th><th>seen</th><th>wanted</th></tr></thead><tbody>'
    for each in result.evidence:
        kind, mark = {True: ("ok", Verdict.HOLDS.mark), False: ("no", Verdict.FAILS.mark), None: ("told", "")}[each.ok]
        wanted = "" if each.wanted is None else words.said(each.wanted)
        values = "".join(f'<td class="value">{text(value)}</td>' for value in (words.said(each.saw), wanted))
        yield f'<tr class="{kind}"><td>{mark}</td><td>{text(each.what)}</td>{values}</tr>'
    yield "</tbody></table>"


def _number(count: int) -> str:
    return f"<td>{count}</td>" if count else '<td class="nil">0</td>'


def _breakable(name: str) -> str:
    """Return a column's name that may be broken behind an underscore."""
    return text(words.one_line(name)).replace("_", "_<wbr>")
