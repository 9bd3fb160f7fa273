# SPDX-License-Identifier: Apache-2.0
"""The statistics of a series are right, also for few values."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from typing import Any

import pytest
from numpy import float64

from pyvmm.bench import statistics
from pyvmm.bench.model import BenchError, Series
from pyvmm.errors import HostError
from tests.unit import bench_samples as samples

np = pytest.importorskip("numpy")
scipy_stats = pytest.importorskip("scipy.stats")


def of(values: list[float | float64] | range | tuple[float, ...], **more: Any) -> statistics.Summary:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return statistics.summary(samples.series(values, **more))


def test_an_empty_series_has_no_statistics() -> None:
    assert of([]) == statistics.Summary(0, 0)


def test_one_value_is_its_own_median_and_has_no_interval() -> None:
    one = of([5.0])
    assert (one.n, one.median, one.minimum, one.maximum, one.mean) == (1, 5, 5, 5, 5)
    assert (one.low, one.high, one.p90, one.outliers) == (None, None, None, 0)


def test_the_interval_of_two_values_has_both_ends_and_is_marked_as_of_few() -> None:
    two = of([1.0, 2.0])
    assert (two.median, two.low, two.high) == (1.5, 1, 2)
    assert two.few


@pytest.mark.parametrize("rounds", [(), (50, 50), (1,) * 100, (0, 100)])
def test_all_statistics_of_equal_values_are_that_value(rounds: tuple[int, ...]) -> None:
    said = of([0.1] * 100, rounds=rounds)
    told = (said.minimum, said.low, said.median, said.mean, said.high, said.p90, said.p99, said.maximum)
    assert set(told) == {0.1}
    assert said.outliers == 0


@pytest.mark.parametrize(("n", "known"), [(9, 0), (10, 1), (99, 1), (100, 2), (999, 2), (1000, 3)])
def test_percentiles_need_enough_values(n: int, known: int) -> None:
    said, names = of(range(n)), ["p90", "p99", "p999"]
    assert [name for name in names if getattr(said, name) is not None] == names[:known]


def test_percentiles_agree_with_numpy() -> None:
    values = list(np.random.default_rng(1).lognormal(7, 1, 1234))
    said = of(values)
    assert (said.p90, said.p99, said.p999) == tuple(np.quantile(values, (0.9, 0.99, 0.999)))


def test_warm_up_is_left_out_and_its_round_with_it() -> None:
    made = samples.series([9e9, 9e9, 9e9, 1.0, 2.0, 3.0, 4.0], warmup=3, rounds=(2, 3, 2))
    assert [list(part) for part in statistics.rounds(made)] == [[1, 2], [3, 4]]
    said = statistics.summary(made)
    assert (said.n, said.rounds, said.maximum) == (4, 2, 4)


def test_outliers_are_counted_and_kept() -> None:
    said = of([10.0, 11.0, 12.0, 13.0] * 5 + [1000.0, 2000.0])
    assert said.outliers == 2
    assert (said.n, said.maximum) == (22, 2000)


def test_a_value_on_the_fence_is_not_an_outlier() -> None:
    values = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    fence = of(values).fence
    assert fence == 6 + 3 * 4
    # The quartiles stay: a value above them replaces another one above them.
    assert of([*values[:-1], fence]).outliers == 0
    assert of([*values[:-1], fence + 0.1]).outliers == 1


@pytest.mark.parametrize("n", [7, 8, 50, 301])
def test_the_interval_of_independent_values_agrees_with_the_bootstrap(n: int) -> None:
    """pyvmm draws ranks, scipy whole samples. The ends are the same order statistics, or adjacent ones."""
    values = np.sort(np.random.default_rng(n).normal(100, 15, n))
    said = of(list(values))
    theirs = scipy_stats.bootstrap((values,), np.median, n_resamples=9999, method="percentile").confidence_interval
    for ours, other in ((said.low, theirs.low), (said.high, theirs.high)):
        assert abs(np.searchsorted(values, ours) - np.searchsorted(values, other)) <= max(1, 0.02 * n)


def test_samples_of_rounds_equal_samples_assembled_by_hand() -> None:
    rng = np.random.default_rng(3)
    parts = [rng.integers(0, 9, size).astype(float) for size in (1, 4, 7, 2, 12)]
    weights = statistics.draws(len(parts))
    wanted = [
        np.median(np.concatenate([np.tile(part, times) for part, times in zip(parts, row, strict=True)]))
        for row in weights
    ]
    assert statistics.drawn_medians(parts, weights).tolist() == wanted


def width(of: statistics.Summary) -> float:
    assert of.low is not None
    assert of.high is not None
    return of.high - of.low


def test_different_rounds_widen_the_interval() -> None:
    shifted = samples.per_round([100, 104, 108, 112, 116, 120, 124, 128], 200, spread=0.005)
    of_rounds, of_values = statistics.summary(shifted), of(shifted.values)
    assert width(of_rounds) > 3 * width(of_values)
    assert (of_rounds.few, of_rounds.rounds) == (False, 8)


def test_the_interval_contains_the_median_as_often_as_it_claims() -> None:
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(200):
        said = statistics.summary(samples.series(rng.lognormal(0, 1, 60)))
        assert said.low is not None
        assert said.high is not None
        held += said.low <= 1 <= said.high
    assert 180 <= held <= 198


def test_the_same_series_gives_the_same_statistics() -> None:
    made = samples.per_round([100, 101, 103, 99, 98, 100, 102])
    first = statistics.summary(made)
    statistics._summarised.cache_clear()
    assert statistics.summary(made) == first


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (samples.series([1.0, "2 apples"]), "no numbers"),
        (samples.series([1.0, None]), "numbers"),
        (samples.series([1.0, [2.0]]), "no numbers"),
        (samples.series([1.0, float("nan")]), "finite"),
        (samples.series([1.0, float("inf")]), "finite"),
        (samples.series([1.0, 2.0], rounds=(1, 2)), "add up"),
        (samples.series([1.0, 2.0], rounds=(3, -1)), "add up"),
    ],
)
def test_damaged_series_are_refused_by_name(made: Series, why: str) -> None:
    with pytest.raises(BenchError, match=f"fault, touch: .*{why}"):
        statistics.summary(made)


def test_the_error_names_a_missing_package_and_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else found(name))
    with pytest.raises(HostError, match=r"need scipy, which") as error:
        statistics.require()
    assert statistics.summary(samples.series([1.0])).median == 1.0  # with numpy alone
    assert f"{sys.executable} -m pip install scipy" in (error.value.hint or "")
