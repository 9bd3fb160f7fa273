# SPDX-License-Identifier: Apache-2.0
"""A run from its plan to its lines: what is measured in which order, and that no result is lost."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pyvmm.bench import case as cases
from pyvmm.bench import model
from pyvmm.bench.case import Case
from pyvmm.bench.collect import Collector, Plan, measure, sides
from pyvmm.errors import UsageError
from tests.unit import bench_samples as samples

STATES = ("cold", "populated", "mapped")


def huge_is_cold(point: model.Point) -> str:
    return "huge pages are cold" if point["backing"] == "thp" and point["state"] != "cold" else ""


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register two cases and an environment that are quick to measure. The second case always refuses."""
    axes = {"protection": ("none", "pkvm"), "state": STATES, "backing": ("memfd", "thp")}
    some = [
        Case(
            "fault", "says", axes, lambda bench: bench.keep("touch", [[9.0], [1.0, 2.0]]), ("state",), (), huge_is_cold
        ),
        Case(
            "exit",
            "says",
            {"protection": ("none",), "cpus": (1, 2)},
            lambda bench: bench.cannot("no"),
            (),
            (),
            lambda _: "",
        ),
    ]
    monkeypatch.setattr(cases, "all_cases", lambda: {case.name: case for case in some})
    monkeypatch.setattr("pyvmm.experiment.environment.conditions", lambda: dict(samples.ENVIRONMENT))


def counted(plan: Plan) -> Counter[str]:
    return Counter(step.case.name for step in plan.steps())


def test_all_is_the_star_of_every_case_and_quick_is_less() -> None:
    assert counted(Plan()) == {"fault": 8, "exit": 2}
    assert counted(Plan(quick=True)) == {"fault": 6, "exit": 1}
    assert counted(Plan(("exit",))) == {"exit": 2}


def test_chosen_axes_are_combined_for_named_cases_and_narrow_the_other_cases() -> None:
    axes = {"state": ["mapped", "cold"], "protection": ["none"]}
    named = Plan(("fault", "exit"), axes).steps()
    assert [(step.case.name, step.point.get("state")) for step in named] == [
        ("fault", "mapped"),
        ("fault", "cold"),
        ("exit", None),
    ]
    assert counted(Plan(axes=axes)) == {"fault": 3, "exit": 2}  # the star has thp only with cold pages
    assert counted(Plan(axes={"cpus": ["2"]})) == {"fault": 8, "exit": 1}


@pytest.mark.parametrize(
    ("plan", "words", "hint"),
    [
        (Plan(("fualt",)), "no case is called 'fualt'", "nearest: fault"),
        (Plan(axes={"stat": ["cold"]}), "an axis 'stat'", "nearest: state"),
        (Plan(("exit",), versus=("state", "cold")), "has an axis 'state'", "known are protection, cpus"),
        (Plan(("fault",), {"state": ["clod"]}), "state of fault is never 'clod'", "nearest: cold"),
        (Plan(axes={"state": ["clod"]}), "state is never 'clod' in any case", "nearest: cold"),
        (Plan(("fault",), versus=("state", "clod")), "state of fault is never 'clod'", "nearest: cold"),
        (Plan(("fault",), {"state": ["mapped"], "backing": ["thp"]}), "huge pages are cold", None),
        (Plan(("fault",), {"backing": ["thp"]}, versus=("state", "mapped")), "huge pages are cold", None),
        (Plan(("fault",), {"state": ["cold"]}, versus=("state", "cold")), "every point has state=cold already", None),
    ],
)
def test_requests_that_cannot_be_measured_are_refused_with_the_nearest_name(
    plan: Plan, words: str, hint: str | None
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        plan.steps()
    assert hint is None or hint in (caught.value.hint or "")


def test_two_sides_take_turns_and_alternate_in_who_begins() -> None:
    steps = Plan(("fault",), {"protection": ["pkvm"]}, versus=("state", "mapped"), turns=3).steps()
    assert [(step.turn, step.side, step.point["state"]) for step in steps] == [
        (0, "A", "cold"),
        (0, "B", "mapped"),
        (1, "B", "mapped"),
        (1, "A", "cold"),
        (2, "A", "cold"),
        (2, "B", "mapped"),
    ]


def test_points_whose_other_side_is_invalid_are_left_out() -> None:
    plan = Plan(versus=("state", "mapped"), turns=1)
    assert counted(plan) == {"fault": 8}
    assert all(step.point["backing"] == "memfd" for step in plan.steps())
    assert counted(Plan(versus=("protection", "pkvm"), turns=1)) == {"fault": 8}


def test_every_line_is_passed_on_as_it_comes_and_together_they_are_a_run() -> None:
    said: list[str] = []
    measure(Plan(axes={"protection": ["none"]}), said.append, peers=lambda: [samples.series([1.0], case="peer")])
    assert all(line.endswith("\n") for line in said)
    assert ["done" in json.loads(line) for line in said[1:]] == [False, True] * 6 + [False, False]
    run = model.parse(said, "a")
    assert run.environment == samples.ENVIRONMENT
    assert run.asked["points"] == 6
    assert run.end is not None
    assert [each.values or each.unavailable for each in run.series] == [(9, 1, 2)] * 4 + ["no"] * 2 + [(1,)]


def collector(file: io.TextIOWrapper | None = None) -> tuple[Collector, list[Any]]:
    progress = []
    return Collector(file, "a.jsonl", lambda *told: progress.append(told)), progress


def test_a_collector_counts_points_and_keeps_its_results(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "w") as file:
        taker, progress = collector(file)
        assert taker.run() is None
        said: list[str] = []

        def take(line: str) -> None:
            taker.take(line)
            said.append(line)
            # The file has all results so far, and is a valid run whatever happens next.
            assert (tmp_path / "a.jsonl").read_text() == "".join(said)

        measure(Plan(("exit",)), take)
    assert progress == [(1, 2, "exit none"), (2, 2, "exit none")]
    assert taker.run() == model.read(str(tmp_path / "a.jsonl"))
    assert taker.failed is None


def test_a_full_disk_loses_only_the_file() -> None:
    file = open("/dev/full", "w")  # noqa: SIM115
    taker, progress = collector(file)
    measure(Plan(("exit",)), taker.take)
    run = taker.run()
    assert run is not None
    assert len(run.series) == 2
    assert len(progress) == 2
    assert taker.failed is not None
    assert "a.jsonl cannot be written: No space left on device" in taker.failed.message
    with pytest.raises(OSError, match="No space"):
        file.close()


# -- sides


def by_turns(*some: tuple[str, int, list[int]]) -> model.Run:
    """Return a run in turns, of (side, turn, values)."""
    found = [
        samples.series(
            values,
            point={"protection": "none", "state": {"A": "cold", "B": "mapped"}[side]},
            rounds=[1, 2],
            warmup=1,
            notes={"side": side, "turn": turn, "pair": "cold / mapped"},
            unavailable="" if values else "it crashed",
        )
        for side, turn, values in some
    ]
    return model.Run(samples.ENVIRONMENT, {"versus": ["state", "mapped"]}, tuple(found))


def test_each_turn_is_a_round_of_its_side_without_the_compared_axis() -> None:
    run = by_turns(("A", 0, [9, 1, 2]), ("B", 0, [9, 5, 6]), ("B", 1, [9, 7, 8]), ("A", 1, [9, 3, 4]))
    [a], [b] = (side.series for side in sides(run))
    assert (a.values, b.values) == ((1, 2, 3, 4), (5, 6, 7, 8))
    assert a.rounds == b.rounds == (2, 2)
    assert (a.warmup, b.warmup, a.point, b.point) == (0, 0, *[{"protection": "none", "state": "cold / mapped"}] * 2)


def test_several_points_compared_with_the_same_one_stay_separate() -> None:
    said: list[str] = []
    measure(Plan(("fault",), {"state": ["cold", "populated"]}, versus=("state", "mapped"), turns=2), said.append)
    for side in sides(model.parse(said, "a")):
        assert [each.point["state"] for each in side.series] == ["cold / mapped", "populated / mapped"]
        assert [each.rounds for each in side.series] == [(2, 2), (2, 2)]


def test_a_turn_that_one_side_lacks_makes_no_pair() -> None:
    run = by_turns(("A", 0, []), ("B", 0, [9, 5, 6]), ("B", 1, [9, 7, 8]), ("A", 1, [9, 3, 4]), ("A", 2, [9, 1, 1]))
    [a], [b] = (side.series for side in sides(run))
    assert (a.values, b.values, a.unavailable) == ((3, 4), (7, 8), "")


def test_a_side_that_was_never_measured_says_why() -> None:
    [a], [b] = (side.series for side in sides(by_turns(("A", 0, []), ("B", 0, [9, 5, 6]))))
    assert (a.values, a.unavailable, b.values) == ((), "it crashed", (5, 6))


def test_a_run_of_one_side_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="only one side") as caught:
        sides(samples.run())
    assert "--versus" in (caught.value.hint or "")
