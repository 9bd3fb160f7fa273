# SPDX-License-Identifier: Apache-2.0
"""What a notebook shows of an atlas's result: one harmless element with the evidence and the pictures."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser

import pytest

from pyvmm.atlas.model import Result
from pyvmm.experiment.record import Event, Evidence, Picture, Verdict
from tests.unit import atlas_samples as samples

RESULT = Result(
    "share/kept",
    "share",
    "A share keeps contents.",
    "",
    "pkvm",
    "memfd",
    Verdict.HOLDS,
    evidence=(Evidence("the host reads", 42, 42), Evidence("it took", "a <share>")),
    pictures=(Picture("before", [(0x8000_0000, 16, 1)]), Picture("after", [(0x8000_0000, 16, 2)])),
    events=(Event(0, "share", 0x8000_0000, 1),),
)
VOID = {"wbr"}


class Fragment(HTMLParser):
    """Parses a piece of HTML. Fails where an element is not closed, or where there is more than one."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.roots = 0
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert (self.open, self.roots) == ([], 1)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.roots += not self.open
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_result_shows_its_verdict_evidence_and_pictures() -> None:
    shown = Fragment(RESULT._repr_html_())
    text = " ".join(shown.words)
    for said in ("share/kept", "pkvm/memfd", "✓ holds", "A share keeps contents.", "the host reads", "42", "a <share>"):
        assert said in text
    assert shown.tags.count("figure") == 2  # the maps of both steps, and the timeline
    assert shown.tags.count("pattern") > 4


def test_result_without_evidence_shows_the_reason_and_no_table() -> None:
    untold = Result("a/b", "a", "It is so.", "", "none", "memfd", Verdict.UNTOLD, "see https://example.org/x")
    shown = Fragment(untold._repr_html_())
    assert "? cannot be told" in " ".join(shown.words)
    assert "a" in shown.tags
    assert not {"table", "figure", "svg"} & set(shown.tags)


@pytest.mark.parametrize("result", samples.nasty().results, ids=lambda result: repr(result.id)[:20])
def test_foreign_text_runs_nothing(result: Result) -> None:
    shown = Fragment(result._repr_html_())
    assert not {"script", "style", "iframe", "img", "object", "link"} & set(shown.tags)
    assert not [name for name in shown.attributes if name.startswith("on") or name == "src"]


def test_results_are_read_without_what_shows_them() -> None:
    code = "import sys, pyvmm.atlas.model; print([m for m in sys.modules if m.startswith('pyvmm.atlas.report')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
