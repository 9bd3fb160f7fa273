# SPDX-License-Identifier: Apache-2.0
"""An atlas as JUnit XML, for CI systems: one suite per group, one case per result.

A case passes if its verdict is the expected one, or if none is expected and it has one. Pure. The text is ASCII, and
characters that XML cannot hold are written out.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable
from typing import Final

from pyvmm.atlas.model import Atlas, Result
from pyvmm.atlas.report import wording
from pyvmm.atlas.report.wording import NOTHING_EXPECTED, Expected
from pyvmm.experiment.record import Verdict
from pyvmm.reports.words import headline, one_line, shortened
from pyvmm.terminal import clean

PASSED: Final = "passed"
FAILURE: Final = "failure"
SKIPPED: Final = "skipped"
ERROR: Final = "error"


def outcome(result: Result, expected: Expected = NOTHING_EXPECTED) -> str:
    """Return a result's test outcome: PASSED, FAILURE, SKIPPED or ERROR."""
    wanted = expected.get(result.key)
    if result.verdict is Verdict.CRASHED:
        return PASSED if wanted is Verdict.CRASHED else ERROR
    if wanted is not None and wanted is not result.verdict:
        return FAILURE
    return SKIPPED if result.verdict is Verdict.UNTOLD else PASSED


def render(atlas: Atlas, expected: Expected = NOTHING_EXPECTED) -> str:
    """Return the document."""
    root = ET.Element("testsuites", name=f"pyvmm atlas: {headline(atlas.host)}")
    _count(root, atlas.results, expected)
    for group, results in atlas.groups().items():
        suite = ET.SubElement(root, "testsuite", name=one_line(group))
        _count(suite, results, expected)
        if atlas.times.get("date"):
            suite.set("timestamp", one_line(str(atlas.times["date"])))
        properties = ET.SubElement(suite, "properties")
        for what, value in wording.host_facts(atlas):
            ET.SubElement(properties, "property", name=what, value=one_line(value))
        for result in results:
            _case(suite, result, expected)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="us-ascii").decode()}\n'


def _count(element: ET.Element, results: Iterable[Result], expected: Expected) -> None:
    results = list(results)
    counts = Counter(outcome(result, expected) for result in results)
    element.set("tests", str(len(results)))
    element.set("failures", str(counts[FAILURE]))
    element.set("errors", str(counts[ERROR]))
    element.set("skipped", str(counts[SKIPPED]))
    element.set("time", _seconds(sum(wording.seconds(result.times) or 0.0 for result in results)))


def _case(suite: ET.Element, result: Result, expected: Expected) -> None:
    name = f"{wording.name(result)}[{one_line(result.protection)}-{one_line(result.backing)}]"
    case = ET.SubElement(suite, "testcase", classname=one_line(result.group), name=name)
    case.set("time", _seconds(wording.seconds(result.times) or 0.0))
    kind = outcome(result, expected)
    if kind != PASSED:
        message = result.verdict.value + (f": {result.reason}" if result.reason else "")
        message = shortened(message, 300)
        if kind == FAILURE:
            message = f"{expected[result.key].value} was expected; {message}"
        element = ET.SubElement(case, kind, message=message)
        if kind != SKIPPED:
            element.set("type", result.verdict.name.lower())
            element.text = clean(result.reason)
    ET.SubElement(case, "system-out").text = _said(result)


def _said(result: Result) -> str:
    lines = [one_line(result.says), f"verdict: {result.verdict.value}"]
    if result.reason:
        lines.append(f"reason: {clean(result.reason)}")
    for each in result.evidence:
        mark = {True: "ok", False: "NO", None: "--"}[each.ok]
        wanted = f" (wanted: {wording.value_text(each.wanted)})" if each.ok is False and each.wanted is not None else ""
        lines.append(f"{mark}  {clean(each.what)}: {wording.value_text(each.saw)}{wanted}")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.3f}"
