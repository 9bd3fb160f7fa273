# SPDX-License-Identifier: Apache-2.0
"""The HTML report: one safe file with the whole atlas, in order."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given

from pyvmm.atlas.model import Atlas, Result
from pyvmm.atlas.report import html, style
from pyvmm.experiment.record import Evidence, Picture, Verdict
from pyvmm.reports.escaping import escaped_prose
from tests.unit import atlas_samples as samples

REALISTIC = samples.realistic()
VOID = {"meta", "link", "input", "wbr"}
OURS = {
    "html", "head", "meta", "title", "link", "style", "body", "header", "nav", "footer", "section", "fieldset",
    "legend", "label", "input", "h1", "h2", "small", "p", "dl", "dt", "dd", "div", "span", "a", "b", "i", "code",
    "button", "table", "thead", "tbody", "ul", "li", "tr", "th", "td", "details", "summary", "figure", "figcaption",
    "wbr", "script", "svg", "defs", "pattern", "path", "rect", "circle", "line", "text", "tspan", "g",
}  # fmt: skip


class Page(HTMLParser):
    """Parses a page, and fails if it is not well formed or has content that no report has."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts: list[list[Any]] = []  # the attributes and text of each element
        self.words: list[str] = []
        self.classes: list[tuple[str, Any, Any]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append([dict(attrs), ""])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen(tag, dict(attrs))

    def seen(self, tag: str, attrs: dict[str, Any]) -> None:
        assert tag in OURS
        assert not [name for name in attrs if name.startswith("on")]
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.classes += [(tag, attrs.get("class"), attrs.get("id"))]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts[-1][1] += data
        elif self.open[-1:] != ["style"]:
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    @property
    def text(self) -> str:
        return "".join(self.words)


def result(
    name: str = "share/kept",
    protection: str = "pkvm",
    backing: str = "memfd",
    verdict: Verdict = Verdict.HOLDS,
    reason: str = "",
    **more: Any,
) -> Result:
    group = name.partition("/")[0]
    return Result(name, group, "It is kept.", "thread", protection, backing, verdict, reason, **more)


def page(*results: Result, host: Mapping[str, bool | int | str] | None = None, **options: Any) -> Page:
    return Page(html.render(Atlas(dict(host or {}), results), **options))


# ---- harmless ----------------------------------------------------------------------------------------------------


@samples.arbitrary
@given(samples.atlases)
def test_the_page_of_any_atlas_is_well_formed_and_its_data_are_the_atlas(some: Atlas) -> None:
    source = html.render(some)
    assert source.isascii()
    parsed = Page(source)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert {link[1:] for link in parsed.links if link.startswith("#") and link != "#"} <= set(parsed.ids)
    assert all(re.match(r"#|https?://|data:,$", link) for link in parsed.links)
    (attrs, data), (_, script) = parsed.scripts
    assert attrs == {"type": "application/json", "id": "_json"}
    assert Atlas.from_json(json.loads(data)) == some
    assert script == style.SCRIPT


def test_hostile_texts_are_shown_literally() -> None:
    parsed = Page(html.render(samples.nasty()))
    assert len(parsed.scripts) == 2
    assert Atlas.from_json(json.loads(parsed.scripts[0][1])) == samples.nasty()
    for text in samples.NASTY:
        if text.isprintable():
            assert text in parsed.text
    assert "\\x1b[31mred" in parsed.text
    assert "\\u202egnp.exe" in parsed.text


def test_the_page_allows_only_its_own_script() -> None:
    source = html.render(REALISTIC)
    digest = b64encode(hashlib.sha256(style.SCRIPT.encode()).digest()).decode()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', source)
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy
    assert f"<script>{style.SCRIPT}</script>" in source


def test_the_page_loads_nothing_from_elsewhere() -> None:
    source = html.render(REALISTIC)
    assert re.findall(r"\bsrc=|@import|url\((?!#)|<iframe|<object|<embed|<img", source) == []


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("see https://a.example/x?a=1&b=2.", 'see <a href="https://a.example/x?a=1&amp;b=2" {}>{}</a>.'),
        ("(http://a.example/)", '(<a href="http://a.example/" {}>{}</a>)'),
        ('"https://a.example/<b>"', '&quot;<a href="https://a.example/" {}>{}</a>&lt;b&gt;&quot;'),
        ("javascript:alert(1) //a.example ftp://a.example", None),
        ("arch/arm64/kvm/mmu.c:1908, f()", "<code>arch/arm64/kvm/mmu.c:1908</code>, f()"),
    ],
)
def test_only_web_addresses_become_links(said: str, wanted: str | None) -> None:
    made = escaped_prose(said)
    url = re.search(r'href="([^"]*)"', made)
    if wanted is None:
        assert made == said
    elif url is None:
        assert made == wanted
    else:
        assert made == wanted.format('rel="noopener noreferrer"', url[1])


# ---- what is on it -----------------------------------------------------------------------------------------------


def test_the_head_names_the_host() -> None:
    text = Page(html.render(REALISTIC)).text
    for fact in (
        "What Linux 7.3.4+deb13-arm64 does with guest memory, KVM in protected mode",
        "QEMU TCG: times are relative only.",
        "Neoverse-N1",
        "0.2.0",
        "2026-11-24T06:01:11+00:00",
        "aarch64",
    ):
        assert fact in text


def test_only_a_host_under_tcg_has_the_warning_stripe() -> None:
    assert "relative only" not in page(result(), host={"kernel": "7.3", "tcg": False}).text
    assert "relative only" not in page(result()).text


def test_groups_claims_and_results_have_anchors_in_the_order_of_the_run() -> None:
    parsed = Page(html.render(REALISTIC))
    groups = [id for tag, _, id in parsed.classes if tag == "h2"]
    claims = [id for tag, kind, id in parsed.classes if tag == "details" and kind.startswith("claim")]
    results = [id for tag, kind, id in parsed.classes if tag == "details" and kind == "result"]
    assert groups == list(samples.SAYS)
    assert claims == samples.claim_ids()
    assert sorted(results) == sorted(f"{one.id}/{one.protection}/{one.backing}" for one in REALISTIC.results)
    assert "#ownership/host-load" in {f"#{id}" for id in claims}


def test_every_verdict_links_to_its_result() -> None:
    parsed = Page(html.render(REALISTIC))
    cells = [kind.split()[1] for tag, kind, _ in parsed.classes if tag == "a" and kind and kind.startswith("v ")]
    assert len(cells) == len(REALISTIC.results)
    assert {f"#{one.id}/{one.protection}/{one.backing}" for one in REALISTIC.results} <= set(parsed.links)


def test_similar_names_have_different_anchors() -> None:
    parsed = page(result("share/a b"), result("share/a-b"), result("share/a?b"), replace(result("a-b"), group="share"))
    assert {"share/a-b", "share/a-b-2", "share/a-b-3", "share/a-b-4"} <= set(parsed.ids)


def test_a_result_tells_reason_evidence_and_times() -> None:
    evidence = (Evidence("a load faults", True, True), Evidence("kB locked", 8, 16), Evidence("page", "0x8100_0000"))
    times = {"seconds": 1.5, "ticks": {"touch": 99}}
    one = result(verdict=Verdict.FAILS, reason="for this", evidence=evidence, times=times)
    text = page(one).text
    for fact in ("It is kept.", "thread", "for this", "a load faults", "yes", "kB locked", "16", "1.5 s", "99"):
        assert fact in text


def test_reasons_are_gathered_above_the_claims() -> None:
    untold = [result(f"share/c{each}", verdict=Verdict.UNTOLD, reason="no pKVM") for each in range(9)]
    text = page(*untold, result("share/x", verdict=Verdict.CRASHED, reason="SIGBUS")).text
    assert "! 1 crashed, for one reason1\u00d7 SIGBUSpkvm/memfd: share/x" in text.replace("\n", "")
    assert "9\u00d7 no pKVMpkvm/memfd: share/c0, share/c1, share/c2 and 6 more" in text.replace("\n", "")


def test_a_long_reason_is_shown_whole() -> None:
    assert "x " * 300 + "end" in page(result(verdict=Verdict.CRASHED, reason="x " * 300 + "end")).text


def test_few_results_unfold_with_their_claim_and_many_stay_folded() -> None:
    assert html.render(Atlas({}, (result(), result(backing="thp")))).count(" open>") == 2
    assert html.render(Atlas({}, tuple(result(backing=each) for each in "abc"))).count(" open>") == 0


def test_unexpected_results_are_marked() -> None:
    source = html.render(Atlas({}, (result(),)), {result().key: Verdict.FAILS})
    assert "holds, expected: does not hold" in source
    assert "(expected: does not hold)" in source
    assert "expected" not in html.render(Atlas({}, (result(),)), {result().key: Verdict.HOLDS})


def test_headings_say_what_groups_are_about() -> None:
    assert Page(html.render(REALISTIC, headings=samples.HEADINGS)).text.count("What conversions do to contents") == 2


def test_equal_page_maps_are_drawn_once() -> None:
    maps = (Picture("before", [(0x8000_0000, 16, 1)]), Picture("after", [(0x8000_0000, 16, 2)]))
    source = html.render(Atlas({}, (result(pictures=maps), result(backing="thp", pictures=maps))))
    assert source.count("<figure>") == 1
    assert 'the same as those of <a href="#share/kept/pkvm/memfd">share/kept pkvm/memfd</a>' in source


def test_impossible_page_maps_are_not_drawn() -> None:
    text = page(result(pictures=(Picture("odd", [(0x8000_0001, 1, 1)]),))).text
    assert "The page maps cannot be drawn: " in text


def test_a_page_of_a_few_hundred_results_with_pictures_stays_small() -> None:
    assert len(REALISTIC.results) > 250
    assert all(one.pictures for one in REALISTIC.results if one.verdict in (Verdict.HOLDS, Verdict.FAILS))
    assert len(html.render(REALISTIC)) < 3_000_000


def test_an_empty_atlas_gives_a_page() -> None:
    assert "all 0 results" in page().text
