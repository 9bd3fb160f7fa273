# SPDX-License-Identifier: Apache-2.0
"""An atlas on the terminal: legible, in order, and safe."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.atlas.model import Atlas, Result
from pyvmm.atlas.report import text, wording
from pyvmm.experiment.record import Evidence, Verdict
from pyvmm.reports.look import Look
from pyvmm.terminal import clean
from tests.unit import atlas_samples as samples

REALISTIC = samples.realistic()
EXPECTED = st.dictionaries(st.sampled_from([result.key for result in REALISTIC.results]), st.sampled_from(Verdict))


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


def atlas(*results: Result) -> Atlas:
    return Atlas({}, results)


def bare(colourful: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", colourful)


# ---- harmless text -----------------------------------------------------------------------------------------------


@samples.arbitrary
@given(samples.texts)
def test_cleaned_text_has_no_control_characters(said: str) -> None:
    cleaned = clean(said)
    cleaned.encode()
    assert all(each.isprintable() or each in "\n\t" or each.isspace() for each in cleaned)
    assert clean(cleaned) == cleaned


def test_cleaning_escapes_what_it_removes() -> None:
    assert clean("a\x1b[31mb\u202ec\x00\r\n\td\ud800é") == "a\\x1b[31mb\\u202ec\\x00\\r\n\td\\ud800é"


@samples.arbitrary
@given(samples.results, st.integers(40, 200))
def test_no_text_in_a_result_controls_the_terminal(one: Result, width: int) -> None:
    for said in (text.line(one, Look(width)), text.details(one, Look(width)), text.table(atlas(one), Look(width))):
        assert all(each.isprintable() or each == "\n" or each.isspace() for each in said)
        said.encode()
    assert "\n" not in text.line(one, Look(width))


@samples.arbitrary
@given(samples.atlases)
def test_a_terminal_without_utf8_gets_ascii(some: Atlas) -> None:
    look = Look(ascii=True)
    said = [text.table(some, look), text.legend(some, look)]
    said += [text.line(one, look) + text.details(one, look) for one in some.results]
    assert all(each.isascii() for each in said)


@samples.arbitrary
@given(samples.atlases)
def test_colours_change_only_the_colours(some: Atlas) -> None:
    colourful = Look(colours=True)
    assert bare(text.table(some, colourful)) == text.table(some)
    for one in some.results:
        assert bare(text.line(one, colourful)) == text.line(one)
        assert bare(text.details(one, colourful)) == text.details(one)


# ---- a line a result ---------------------------------------------------------------------------------------------


def test_a_line_has_mark_claim_place_verdict_and_reason() -> None:
    one = result(verdict=Verdict.UNTOLD, reason="no such\nkernel")
    said = text.line(one, Look(120))
    assert said.split() == ["?", "share/kept", "pkvm/memfd", "cannot", "be", "told:", "no", "such", "kernel"]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_lines_fit_the_terminal_and_keep_the_verdict(width: int) -> None:
    for one in REALISTIC.results:
        said = text.line(one, Look(width))
        assert len(said) <= width
        assert one.verdict.value in said


def test_a_line_says_what_was_expected_instead() -> None:
    one = result()
    assert "expected: crashed" in text.line(one, Look(120), {one.key: Verdict.CRASHED})
    assert "expected" not in text.line(one, Look(120), {one.key: Verdict.HOLDS})


# ---- the table ---------------------------------------------------------------------------------------------------


def test_the_table_fits_eighty_columns() -> None:
    assert max(map(len, text.table(REALISTIC, headings=samples.HEADINGS).splitlines())) <= 80


def test_the_table_has_every_claim_once_in_the_order_of_the_run() -> None:
    lines = text.table(REALISTIC).splitlines()
    rows = [line.split()[0] for line in lines[: lines.index("")] if line.startswith("  ") and line[2] != " "]
    assert rows == [each.partition("/")[2] for each in samples.claim_ids()]


def test_the_table_puts_each_verdict_under_its_place() -> None:
    lines = text.table(
        atlas(
            result("share/a", "pkvm", "memfd", Verdict.FAILS),
            result("share/a", "none", "memfd"),
            result("share/b", "none", "thp", Verdict.UNTOLD, "why"),
            result("share/c", "pkvm", "memfd", Verdict.CRASHED, "how"),
        )
    ).splitlines()
    assert lines[:6] == [
        "     none       pkvm",
        "     memfd thp  memfd",
        "share",
        "  a  ✓     ·    ✗",
        "  b  ·     ?    ·",
        "  c  ·     ·    !",
    ]


def test_each_backing_has_a_distinct_letter_if_names_do_not_fit() -> None:
    said = text.table(REALISTIC)
    assert "m memfd   t thp   h hugetlb   g guest_memfd   p private" in said
    assert "m memfd" not in text.table(REALISTIC, Look(160))
    assert text._letters(["memfd", "mem", "m", "md", "", "-"]) == {
        "memfd": "m",
        "mem": "e",
        "m": "a",
        "md": "d",
        "": "b",
        "-": "c",
    }


def test_groups_have_their_headings() -> None:
    assert "share  What a share and an unshare do" in text.table(REALISTIC, headings=samples.HEADINGS)


def test_the_legend_counts_the_verdicts() -> None:
    found = atlas(result(), result("share/b", verdict=Verdict.FAILS), result("share/c"))
    assert text.legend(found) == "✓ 2 hold   ✗ 1 does not hold   ? 0 cannot be told   ! 0 crashed"


def test_a_reason_is_printed_once_with_its_count() -> None:
    many = [result(f"share/c{number}", verdict=Verdict.UNTOLD, reason="no pKVM") for number in range(9)]
    lines = text.table(atlas(*many, result("share/x", verdict=Verdict.UNTOLD, reason="other"))).splitlines()
    assert lines[-5:] == [
        "? cannot be told",
        "     9×  no pKVM",  # noqa: RUF001
        "         pkvm/memfd: share/c0, share/c1, share/c2 and 6 more",
        "     1×  other",  # noqa: RUF001
        "         pkvm/memfd: share/x",
    ]


def test_claims_with_different_reasons_by_place_are_printed_with_the_places() -> None:
    some = [result("share/a"), result("share/a", "none"), result("share/b")]
    assert wording.some(some) == "share/a (pkvm/memfd, none/memfd), share/b (pkvm/memfd)"


@samples.arbitrary
@given(EXPECTED)
def test_unexpected_results_are_marked_and_listed(expected: dict[tuple[str, str, str], Verdict]) -> None:
    said = text.table(REALISTIC, Look(120), expected)
    wrong = [one for one in REALISTIC.results if one.key in expected and expected[one.key] is not one.verdict]
    table, _, rest = said.partition("\n\n")
    assert table.count("*") == len(wrong)
    assert rest.count("expected: ") == len(wrong)
    assert ("each is as expected" in rest) == (bool(expected) and not wrong)


def test_an_empty_atlas_gives_a_table() -> None:
    assert "0 hold" in text.table(atlas())


# ---- everything of one result ------------------------------------------------------------------------------------


def test_details_have_everything_of_a_result() -> None:
    evidence = (Evidence("the page", "0x8100_0000"), Evidence("it faults", True, True), Evidence("kB locked", 8, 16))
    times = {"seconds": 0.25, "ticks": {"touch": 1234}}
    one = result(verdict=Verdict.FAILS, reason="why\nnot", evidence=evidence, times=times)
    assert text.details(one, Look(), {one.key: Verdict.HOLDS}).splitlines() == [
        "✗ share/kept  pkvm/memfd  does not hold",
        "  * expected: holds",
        "  It is kept.",
        "  because why",
        "          not",
        "  --  the page   0x8100_0000",
        "  ok  it faults  yes",
        "  NO  kB locked  8   wanted: 16",
        "  took    0.25 s, touch: 1234 ticks",
        "  origin  thread",
    ]


def test_details_count_events() -> None:
    assert "events  1 slot, " in text.details(next(one for one in REALISTIC.results if one.events))


def test_details_fit_eighty_columns() -> None:
    for one in REALISTIC.results:
        assert max(map(len, text.details(one).splitlines())) <= 80


# ---- what a terminal can show ------------------------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("encoding", "ascii"), [("utf-8", False), ("UTF8", False), ("latin-1", True), ("ascii", True)])
def test_only_a_utf8_stream_gets_characters_beyond_ascii(encoding: str, ascii: bool) -> None:
    assert Look.of(io.TextIOWrapper(io.BytesIO(), encoding)).ascii is ascii


def test_output_has_colours_and_the_terminals_width_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "93")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Look.of(Terminal(io.BytesIO(), "utf-8")) == Look(93, True, False)
    assert Look.of(io.TextIOWrapper(io.BytesIO(), "utf-8")) == Look(100, False, False)


def test_a_user_can_switch_colours_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Look.of(Terminal(io.BytesIO(), "utf-8")).colours
