# SPDX-License-Identifier: Apache-2.0
"""An atlas as JUnit XML: what passes, what fails, and that any atlas gives valid XML."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.atlas.model import Atlas, Result
from pyvmm.atlas.report import junit
from pyvmm.experiment.record import Evidence, Verdict
from tests.unit import atlas_samples as samples

HOLDS, FAILS, UNTOLD, CRASHED = Verdict
REALISTIC = samples.realistic()
EXPECTED = st.dictionaries(st.sampled_from([result.key for result in REALISTIC.results]), st.sampled_from(Verdict))


def result(verdict: Verdict = HOLDS, reason: str = "", **more: Any) -> Result:
    return Result("share/kept", "share", "It is kept.", "thread", "pkvm", "memfd", verdict, reason, **more)


@pytest.mark.parametrize(
    ("verdict", "expected", "wanted"),
    [
        (HOLDS, None, "passed"),
        (FAILS, None, "passed"),
        (UNTOLD, None, "skipped"),
        (CRASHED, None, "error"),
        (HOLDS, HOLDS, "passed"),
        (FAILS, FAILS, "passed"),
        (UNTOLD, UNTOLD, "skipped"),
        (CRASHED, CRASHED, "passed"),
        (HOLDS, FAILS, "failure"),
        (FAILS, HOLDS, "failure"),
        (HOLDS, UNTOLD, "failure"),
        (HOLDS, CRASHED, "failure"),
        (UNTOLD, HOLDS, "failure"),
        (UNTOLD, FAILS, "failure"),
        (CRASHED, HOLDS, "error"),
        (CRASHED, UNTOLD, "error"),
    ],
)
def test_each_verdict_is_a_pass_a_failure_an_error_or_a_skip(
    verdict: Verdict, expected: Verdict | None, wanted: str
) -> None:
    one = result(verdict)
    assert junit.outcome(one, {} if expected is None else {one.key: expected}) == wanted


def test_a_case_has_place_verdict_and_reason() -> None:
    evidence = (Evidence("a load faults", True, True), Evidence("kB locked", 8, 16), Evidence("page", "0x8100_0000"))
    one = result(FAILS, "for\nthis", evidence=evidence, times={"seconds": 1.25})
    root = ET.fromstring(junit.render(Atlas({"kernel": "7.3", "tcg": True}, (one,)), {one.key: HOLDS}))
    assert root.tag == "testsuites"
    assert root.get("name") == "pyvmm atlas: 7.3 (qemu tcg)"
    [suite] = root.iter("testsuite")
    assert {name: suite.get(name) for name in ("name", "tests", "failures", "errors", "skipped", "time")} == {
        "name": "share",
        "tests": "1",
        "failures": "1",
        "errors": "0",
        "skipped": "0",
        "time": "1.250",
    }
    assert {each.get("name"): each.get("value") for each in suite.iter("property")} == {
        "kernel": "7.3",
        "QEMU TCG": "yes",
    }
    [case] = suite.iter("testcase")
    assert case.attrib == {"classname": "share", "name": "kept[pkvm-memfd]", "time": "1.250"}
    [failure] = case.iter("failure")
    assert failure.get("message") == "holds was expected; does not hold: for this"
    assert failure.get("type") == "fails"
    assert case.findtext("system-out") == (
        "It is kept.\nverdict: does not hold\nreason: for\nthis\nok  a load faults: yes\n"
        "NO  kB locked: 8 (wanted: 16)\n--  page: 0x8100_0000"
    )


def test_groups_are_suites_and_results_cases_in_the_order_of_the_run() -> None:
    root = ET.fromstring(junit.render(REALISTIC))
    assert [suite.get("name") for suite in root] == list(samples.SAYS)
    assert [f"{case.get('classname')}/{case.get('name')}" for case in root.iter("testcase")] == [
        f"{one.id}[{one.protection}-{one.backing}]" for one in REALISTIC.results
    ]
    assert {suite.get("timestamp") for suite in root} == {REALISTIC.times["date"]}


@samples.arbitrary
@given(EXPECTED)
def test_the_counts_are_those_of_the_cases(expected: dict[tuple[str, str, str], Verdict]) -> None:
    root = ET.fromstring(junit.render(REALISTIC, expected))
    for element in (root, *root.iter("testsuite")):
        cases = list(element.iter("testcase"))
        assert element.get("tests") == str(len(cases))
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert element.get(attribute) == str(sum(case.find(tag) is not None for case in cases))


@samples.arbitrary
@given(samples.atlases)
def test_the_document_of_any_atlas_can_be_parsed(some: Atlas) -> None:
    said = junit.render(some)
    assert said.isascii()
    root = ET.fromstring(said)
    assert len(list(root.iter("testcase"))) == len(some.results)


def test_hostile_texts_are_written_literally() -> None:
    told = [each.text or "" for each in ET.fromstring(junit.render(samples.nasty())).iter("system-out")]
    for text, said in zip(samples.NASTY, told, strict=True):
        assert said.startswith(" ".join(text.split()) if text.isprintable() else "")
    assert any("\\x00\\x01\\ufffe" in said for said in told)


def test_an_empty_atlas_gives_a_document() -> None:
    assert ET.fromstring(junit.render(Atlas({}, ()))).get("tests") == "0"
