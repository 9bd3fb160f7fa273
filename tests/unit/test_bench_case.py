# SPDX-License-Identifier: Apache-2.0
"""Cases choose their points: a star around the base unless axes are given, and only points that make sense."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from pyvmm.bench.case import Case, all_cases, select
from pyvmm.bench.model import Point, Value
from pyvmm.errors import UsageError
from pyvmm.experiment.registry import nearest

AXES: dict[str, tuple[Value, ...]] = {"protection": ("none", "pkvm"), "state": ("cold", "mapped"), "cpus": (1, 2)}


def no_pairs_under_pkvm(point: Point) -> str:
    return "pkvm has no pairs" if (point["protection"], point["cpus"]) == ("pkvm", 2) else ""


CASE = Case("fault", "says", AXES, lambda _: None, ("state",), ({"state": "mapped", "cpus": 2},), no_pairs_under_pkvm)


def point(protection: str = "none", state: str = "cold", cpus: int = 1) -> Point:
    return {"protection": protection, "state": state, "cpus": cpus}


def test_a_star_varies_one_axis_at_a_time_in_every_protection() -> None:
    found = CASE.points()
    assert len(found) == 6
    for each in (
        point(),
        point(state="mapped"),
        point(cpus=2),
        point(state="mapped", cpus=2),
        point("pkvm"),
        point("pkvm", "mapped"),
    ):
        assert each in found
    assert CASE.points(quick=True) == [point(*both) for both in itertools.product(("none", "pkvm"), ("cold", "mapped"))]
    assert replace(CASE, axes={"size": (1, 2)}, nonsense=lambda _: "", extra=()).points() == [{"size": 1}, {"size": 2}]


def test_chosen_values_are_combined_except_invalid_combinations() -> None:
    found = CASE.cross({"protection": ["pkvm", "none"], "cpus": ["1", "2"]})
    assert found == [point("pkvm"), point(), point(cpus=2)]
    with pytest.raises(UsageError, match="nothing of fault to measure: pkvm has no pairs"):
        CASE.cross({"protection": ["pkvm"], "cpus": [2]})


@pytest.mark.parametrize("typed", ["4", 4])
def test_a_number_axis_takes_values_beyond_the_listed_ones(typed: int | str) -> None:
    assert CASE.check({"cpus": typed}) == point(cpus=4)


@pytest.mark.parametrize(
    ("axis", "value", "words", "hint"),
    [
        ("stat", "cold", "fault has no axis 'stat'", "the nearest: state"),
        ("xyz", "cold", "fault has no axis 'xyz'", "known are protection, state, cpus"),
        ("state", "clod", "state of fault is never 'clod'", "the nearest: cold"),
        ("state", None, "state of fault is never None", "known are cold, mapped"),
        *(("cpus", bad, f"cpus of fault is a number above 0, not {bad!r}", None) for bad in ("", "0", -1, "two", 1.5)),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(
    axis: str, value: float | str | None, words: str, hint: str | None
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        CASE.check({axis: value})
    assert caught.value.hint == hint


def test_cases_are_found_by_name_in_the_order_asked_for_and_once() -> None:
    assert [each.name for each in select(["share", "exit", "share"])] == ["share", "exit"]
    assert select([]) == list(all_cases().values())
    with pytest.raises(UsageError, match="no case is called 'shaer'") as caught:
        select(["exit", "shaer"])
    assert caught.value.hint == "the nearest: share"
    assert nearest("", ["a", "b"]) == "known are a, b"


@pytest.mark.parametrize("case", all_cases().values(), ids=lambda case: case.name)
def test_every_case_gives_only_points_that_make_sense(case: Case) -> None:
    points, quick = case.points(), case.points(quick=True)
    assert points
    assert bool(quick) == (case.quick is not None)
    for some in (points, quick):
        assert len({tuple(each.items()) for each in some}) == len(some)
    for each in points:
        assert case.check(each) == each
        assert list(each) == list(case.axes)
    varied = {axis: {each[axis] for each in points} for axis in case.axes}
    assert all(varied[axis] >= set(values) for axis, values in case.axes.items())
    assert all(any(extra.items() <= each.items() for each in points) for extra in case.extra)
    assert set(case.quick or ()) <= set(case.axes)
