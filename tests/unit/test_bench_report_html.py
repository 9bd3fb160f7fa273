# SPDX-License-Identifier: Apache-2.0
"""The HTML report: one safe file with the whole report, including the results."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode, b64encode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pyvmm.bench.model import BenchError, Run
from pyvmm.bench.report import embedded, html
from tests.unit import bench_samples as samples

pytest.importorskip("numpy")
pytest.importorskip("matplotlib")

from pyvmm.bench.report import plot, style

VOID = {"meta", "link", "wbr"}
OURS = {
    "html", "head", "meta", "title", "link", "style", "body", "header", "nav", "footer", "section", "h1", "h2", "h3",
    "small", "p", "dl", "dt", "dd", "div", "span", "a", "b", "code", "table", "thead", "tbody", "tr", "th", "td",
    "details", "summary", "figure", "figcaption", "script", "svg", "g", "path", "text", "tspan", "defs", "use",
    "clippath", "rect", "image",
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
        self.styles: list[str] = []
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
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "xlink:href")]
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        words = ("title", "aria-label", "download")
        self.links += re.findall(r"url\(([^)]*)\)", " ".join(attrs[name] or "" for name in attrs if name not in words))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts[-1][1] += data
        elif self.open[-1:] == ["style"]:
            self.styles.append(data)
        else:
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        # matplotlib repeats a text in a comment between elements. The text must not end the comment.
        assert "--" not in data
        assert ">" not in data

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


REALISTIC, HOSTILE = samples.realistic(24), samples.hostile()


@pytest.fixture(scope="module")
def source() -> str:
    return html.render(REALISTIC)


@pytest.fixture(scope="module")
def hostile() -> str:
    return html.render(HOSTILE)


def small(**more: Any) -> Run:
    return samples.run(samples.series([1.0, 2.0, 3.0], **more))


# ---- harmless ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["source", "hostile"])
def test_a_page_is_well_formed_and_loads_nothing(which: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(which)
    parsed = Page(source)
    assert source.isascii()
    assert len(set(parsed.ids)) == len(parsed.ids)
    inside = {link[1:] for link in parsed.links if link.startswith("#") and link != "#"}
    assert inside <= set(parsed.ids)
    assert all(re.match(r"#|data:,$|data:image/png;base64,", link) for link in parsed.links)
    assert len(parsed.styles) == 1
    assert not re.search(r"@import|url\(", parsed.styles[0])
    assert [attrs.get("id") for attrs, _ in parsed.scripts] == ["_data", None]
    assert parsed.scripts[1][1] == style.SCRIPT


def test_hostile_texts_are_shown_literally(hostile: str) -> None:
    said = Page(hostile).text
    for text in samples.HOSTILE:
        if text.isprintable():
            assert text in said
    assert "\\x1b[31mred" in said
    assert "\\u202egnp.exe" in said


def test_the_page_allows_only_its_own_script(source: str) -> None:
    digest = b64encode(hashlib.sha256(style.SCRIPT.encode()).digest()).decode()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', source)
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy


def test_colour_codes_in_texts_are_not_replaced() -> None:
    document = f'<svg viewBox="0 0 1 1"><text style="fill: {plot.INK}" id="a">{plot.INK} id="a"</text></svg>'
    inlined = plot.inline(document, "f1", "x")
    assert 'style="fill: var(--ink)"' in inlined
    assert f'>{plot.INK} id="a"</text>' in inlined


def test_the_same_run_gives_the_same_page() -> None:
    assert html.render(small()) == html.render(small())


# ---- what is on it -----------------------------------------------------------------------------------------------


def test_the_page_shows_the_whole_environment(source: str) -> None:
    said = Page(source).text
    for name, value in samples.ENVIRONMENT.items():
        assert name in said
        assert ({True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)) in said
    assert "171.3" in said


def test_a_run_under_tcg_is_marked_at_the_top_in_every_table_and_every_figure(source: str) -> None:
    said = Page(source).text
    tables, figures = source.count('<table class="numbers">'), source.count("<figure>")
    assert figures > 20
    assert said.count("QEMU TCG: times are relative only") == 1 + tables + figures
    assert "relative only" not in Page(html.render(small_on_hardware())).text


def small_on_hardware() -> Run:
    return replace(small(), environment={**samples.ENVIRONMENT, "tcg": False})


def test_unavailable_series_are_shown_with_the_reason(source: str) -> None:
    assert "not available: no EL2 trace: the kernel has no remotes/hypervisor" in Page(source).text


def test_the_page_says_if_a_run_was_cut_off_or_is_empty() -> None:
    said = Page(html.render(replace(samples.run(), end=None))).text
    assert "Cut off" in said
    assert "nothing was measured" in said


# ---- the results inside ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["source", "hostile"])
def test_the_results_in_the_page_can_be_read_back(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(request.getfixturevalue(which))
    assert embedded.read_html(tmp_path / "a.html") == {"source": REALISTIC, "hostile": HOSTILE}[which]


def test_long_results_are_compressed_and_can_be_read_back(tmp_path: Path) -> None:
    long = samples.run(samples.series([float(at % 997) for at in range(300_000)]))
    element = embedded.element(long)
    assert len(element) < len(samples.text(long)) / 3
    (tmp_path / "a.html").write_text(element)
    assert embedded.read_html(tmp_path / "a.html") == long


def packed(**data: Any) -> str:
    return f'<script type="application/json" id="_data">{json.dumps(data)}</script>'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<p>hello</p>", "is not a benchmark report"),
        (packed(encoding="zip", lines=""), "does not know"),
        (packed(lines=""), "damaged"),
        (packed(encoding="deflate+base64", lines="!"), "damaged"),
        (packed(encoding="deflate+base64", lines="aGVsbG8="), "damaged"),
        (packed(encoding="deflate+base64", lines=7), "damaged"),
        (packed(encoding="plain", lines="{}"), "format"),
        ('<script type="application/json" id="_data">[</script>', "damaged"),
        ('<script type="application/json" id="_data">[]</script>', "damaged"),
    ],
)
def test_damaged_reports_and_other_files_are_refused(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(text)
    with pytest.raises(BenchError, match=rf"a\.html.*{why}"):
        embedded.read_html(tmp_path / "a.html")


def test_results_that_unpack_to_too_much_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_SHORT", 0)
    (tmp_path / "a.html").write_text(embedded.element(small()))
    assert embedded.read_html(tmp_path / "a.html") == small()
    monkeypatch.setattr(embedded, "_MOST", 100)
    with pytest.raises(BenchError, match="longer than can be"):
        embedded.read_html(tmp_path / "a.html")


def test_the_error_names_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"none\.html cannot be read: No such file"):
        embedded.read_html(tmp_path / "none.html")
    (tmp_path / "binary.html").write_bytes(b64decode("/////w=="))
    with pytest.raises(BenchError, match="it is not text"):
        embedded.read_html(tmp_path / "binary.html")
