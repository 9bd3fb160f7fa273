# SPDX-License-Identifier: Apache-2.0
"""What a run of the tests says of its labs. The labs are fake."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests import labtier
from tests.labtier import Labs, Tiers

TESTS = ["tests/pkvm/test_a.py::test", "tests/pkvm/test_b.py::test", "tests/pkvm/test_c.py::test"]


class FakeLab:
    """A lab whose ``story`` tells, read by read, what becomes of it: its attributes' new values, or nothing yet."""

    stories: list[list[dict[str, Any]]]

    def __init__(self, _config: object, nodeids: list[str]) -> None:
        self.nodeids = nodeids
        self.title: str | None = None
        self.ended: str | None = None
        self.finished: set[str] = set()
        self._story = self.stories.pop(0)

    @property
    def left(self) -> bool:
        return not self.finished.issuperset(self.nodeids)

    def read(self) -> bool:
        news = self._story.pop(0) if self._story else {}
        for name, value in news.items():
            setattr(self, name, value)
        return bool(news)

    def taken(self, nodeid: str) -> list[str]:
        return [f"report of {nodeid}"]


def summary(monkeypatch: pytest.MonkeyPatch, *stories: list[dict[str, Any]]) -> list[str]:
    """Replay every test from labs with these stories. Return what the summary says."""
    monkeypatch.setattr(FakeLab, "stories", list(stories), raising=False)
    monkeypatch.setattr(labtier, "InnerPytest", FakeLab)
    labs = Labs(None, TESTS)  # type: ignore[arg-type]
    labs.wait_for_first()
    labs.add_second()
    for nodeid in TESTS:
        item: Any = SimpleNamespace(nodeid=nodeid)
        reports: list[Any] = list(labs.reports(item))
        assert reports == [f"report of {nodeid}"]
    tiers = Tiers(None)  # type: ignore[arg-type]
    tiers._labs = labs
    monkeypatch.setattr(tiers, "_forwarded", dict.fromkeys(TESTS))
    said: list[str] = []
    reporter: Any = SimpleNamespace(write_line=said.append)
    tiers.pytest_terminal_summary(reporter)
    return said


UP: dict[str, Any] = {"title": "7.3 under QEMU"}
FIRST: list[dict[str, Any]] = [UP, {}, {"finished": {TESTS[0]}}, {"finished": set(TESTS[:2])}, {"finished": set(TESTS)}]
RAN = "pkvm tier: 3 tests ran in the lab: 7.3 under QEMU"


def test_summary_says_in_one_line_that_the_second_lab_never_came_up(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"ended": "the lab's process ended with status 1:\nno memory\nmore\neven more"}
    assert summary(monkeypatch, FIRST.copy(), [failed]) == [
        RAN,
        "pkvm tier: one lab ran them all, as a second one did not come up: "
        "the lab's process ended with status 1: no memory",
    ]


@pytest.mark.parametrize(
    "second",
    [[UP, {"finished": {TESTS[2]}}], [], [UP, {"finished": {TESTS[2], TESTS[1]}}, {"ended": "it is done"}]],
    ids=["up", "still starting", "done"],
)
def test_summary_says_nothing_of_a_second_lab_without_a_fault(
    second: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert summary(monkeypatch, FIRST.copy(), second) == [RAN]
