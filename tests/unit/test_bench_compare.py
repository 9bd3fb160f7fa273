# SPDX-License-Identifier: Apache-2.0
"""Two runs are compared only if that is meaningful, and a difference is reported only if the rounds show one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from pyvmm.bench import compare as compared
from pyvmm.bench.compare import SAME, compare
from pyvmm.bench.model import BenchError, Point, Run, Series
from pyvmm.bench.significance import rank_sum, signed_ranks
from pyvmm.reports.look import Look
from tests.unit import bench_samples as samples

np = pytest.importorskip("numpy")
scipy_stats = pytest.importorskip("scipy.stats")

ONE = samples.series([1.0, 2.0, 3.0])
STEADY = [100, 101, 99, 100.5, 99.5, 100.2, 99.8, 100.1, 99.9, 100.3, 99.7, 100.4]


def times(factor: float, series: Series, **changed: Any) -> Series:
    return replace(series, values=tuple(value * factor for value in series.values), **changed)


def only(comparison: compared.Comparison) -> compared.Difference:
    (difference,) = comparison.differences
    return difference


# ---- what may be compared ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAME)
def test_runs_of_different_machines_and_clocks_are_refused_with_the_difference(name: str) -> None:
    other = {**samples.ENVIRONMENT, name: "another"}
    with pytest.raises(BenchError, match=rf"not of the same {name} \(.* and 'another'\)"):
        compare(samples.run(ONE), samples.run(ONE, environment=other))


def test_compared_properties_may_differ_and_are_reported() -> None:
    other = {**samples.ENVIRONMENT, "kernel": "7.1.0", "mode": "nvhe", "pyvmm": "9.9"}
    found = compare(samples.run(ONE), samples.run(ONE, environment=other)).environment
    assert found == {"kernel": ("7.0.9-arm64", "7.1.0"), "mode": ("protected", "nvhe"), "pyvmm": ("0.1.0", "9.9")}


def test_compare_distinguishes_true_from_one() -> None:
    environments = [{**samples.ENVIRONMENT, "tcg": value} for value in (True, 1)]
    with pytest.raises(BenchError, match="tcg"):
        compare(*(samples.run(ONE, environment=each) for each in environments))


def test_series_are_matched_by_case_metric_and_point() -> None:
    point: Point = {"protection": "pkvm"}
    mine, theirs = replace(ONE, metric="mine"), replace(ONE, point=point)
    comparison = compare(samples.run(ONE, mine), samples.run(theirs, replace(ONE, unavailable="", notes={"a": 1})))
    assert only(comparison).a is ONE
    assert comparison.only_a == (mine,)
    assert comparison.only_b == (theirs,)


def test_a_series_without_values_is_in_one_run_only() -> None:
    comparison = compare(
        samples.run(ONE, replace(ONE, case="exit")), samples.run(ONE, samples.series([], case="exit", unavailable="no"))
    )
    assert [series.case for series in comparison.only_a] == ["exit"]


def test_runs_with_nothing_in_common_are_refused() -> None:
    with pytest.raises(BenchError, match="no series in common"):
        compare(samples.run(ONE), samples.run(replace(ONE, case="exit")))


def test_different_units_are_refused() -> None:
    with pytest.raises(BenchError, match="in ns, the other in bytes"):
        compare(samples.run(ONE), samples.run(replace(ONE, unit="bytes")))


# ---- verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "unit", "verdict"),
    [(1.05, "ns", "slower"), (0.95, "instructions", "faster"), (1.05, "bytes", "more"), (0.95, "count", "less")],
)
def test_a_difference_in_every_round_is_shown(factor: float, unit: str, verdict: str) -> None:
    a = samples.per_round(STEADY, unit=unit)
    found = only(compare(samples.run(a), samples.run(times(factor, a))))
    assert (found.verdict, found.test, found.rounds) == (verdict, "paired", (12, 12))
    assert found.ratio == pytest.approx(factor)
    assert found.low is not None
    assert found.ratio is not None
    assert found.high is not None
    assert found.low <= found.ratio <= found.high
    assert found.low == pytest.approx(factor, rel=0.02)
    assert found.p == 2.0**-11


def test_a_run_does_not_differ_from_itself() -> None:
    comparison = compare(samples.run(samples.per_round(STEADY)), samples.run(samples.per_round(STEADY)))
    assert (only(comparison).verdict, only(comparison).p, only(comparison).ratio) == ("no difference shown", 1.0, 1.0)
    assert not comparison.differs


def test_pairs_show_a_difference_that_drift_would_hide() -> None:
    drifting = [100 * 1.05**at for at in range(10)]
    a = samples.per_round(drifting, spread=0.001)
    b = samples.per_round([middle * 1.01 for middle in drifting], seed=2, spread=0.001)
    assert only(compare(samples.run(a), samples.run(b))).verdict == "slower"
    unpaired = replace(b, values=b.values[:-40], rounds=b.rounds[:-1])
    found = only(compare(samples.run(a), samples.run(unpaired)))
    assert (found.test, found.rounds, found.verdict) == ("unpaired", (10, 9), "no difference shown")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_rounds_are_inconclusive_however_large_the_difference(count: int) -> None:
    a = samples.per_round(STEADY[:count])
    found = only(compare(samples.run(a), samples.run(times(3, a))))
    assert (found.verdict, found.p, found.differs) == ("too few rounds to tell", None, False)
    assert found.ratio == pytest.approx(3)


def test_many_series_take_more_rounds() -> None:
    def runs(count: int) -> tuple[Run, Run]:
        a = [samples.per_round(STEADY[:8], point={"at": at}) for at in range(count)]
        return samples.run(*a), samples.run(*(times(1.5, each) for each in a))

    assert {each.verdict for each in compare(*runs(6)).differences} == {"slower"}
    comparison = compare(*runs(7))
    assert {each.verdict for each in comparison.differences} == {"too few rounds to tell"}
    assert "takes 9 rounds" in compared.text(comparison)


def test_the_correction_is_holms() -> None:
    middles = [[100.0] * 10] * 3
    moves: list[list[float]] = [[1] * 10, [1] * 9 + [-0.1], [1, -1] * 5]
    a = [samples.series(some, point={"at": at}, rounds=[1] * 10) for at, some in enumerate(middles)]
    b = [replace(each, values=tuple(100.0 + move for move in moves[at])) for at, each in enumerate(a)]
    found = compare(samples.run(*a), samples.run(*b)).differences
    assert [each.p for each in found] == [2**-9, 2 * 2**-9, 1.0]
    assert [each.corrected for each in found] == [3 * 2**-9, 2 * 2 * 2**-9, 1.0]


def test_measuring_again_into_the_same_file_adds_rounds() -> None:
    parts = [samples.per_round(STEADY[at : at + 3], seed=at) for at in (0, 3, 6)]
    warm = [replace(part, values=(1e9, *part.values), rounds=(1, *part.rounds), warmup=1) for part in parts]
    found = only(compare(samples.run(*warm), samples.run(*(times(0.9, each) for each in warm))))
    assert (found.rounds, found.verdict) == ((9, 9), "faster")


def test_values_without_rounds_count_as_independent_and_the_table_says_so() -> None:
    rng = np.random.default_rng(1)
    a, b = (samples.series(rng.normal(middle, 1, 80)) for middle in (100, 101))
    comparison = compare(samples.run(a), samples.run(b))
    assert (only(comparison).verdict, only(comparison).rounds) == ("slower", (80, 80))
    assert "values taken as independent" in compared.text(comparison)


def test_compare_handles_very_many_values() -> None:
    rng = np.random.default_rng(1)
    a = samples.series(rng.integers(90, 110, 65_536).astype(float))
    assert only(compare(samples.run(a), samples.run(a))).verdict == "no difference shown"


def test_a_median_of_zero_has_a_verdict_but_no_ratio() -> None:
    a, b = (samples.series([value] * 12, unit="count", rounds=[1] * 12) for value in (0.0, 1.0))
    found = only(compare(samples.run(a), samples.run(b)))
    assert (found.ratio, found.low, found.verdict) == (None, None, "more")


# ---- the statistical tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 6, 9])
def test_signed_ranks_are_exact_with_ties(n: int) -> None:
    moved = np.random.default_rng(n).integers(-3, 5, n).astype(float)
    moved[moved == 0] = 1
    ranks = scipy_stats.rankdata(abs(moved))
    seen = ranks[moved > 0].sum()
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=n)]
    wanted = min(2 * min(np.mean([s <= seen for s in sums]), np.mean([s >= seen for s in sums])), 1)
    assert signed_ranks(moved) == pytest.approx(wanted)
    assert signed_ranks(np.append(moved, [0.0, 0.0])) == pytest.approx(wanted)


def test_rank_sum_is_exact_with_ties() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.integers(0, 4, 5).astype(float), rng.integers(1, 6, 6).astype(float)
    ranks = scipy_stats.rankdata(np.concatenate((a, b)))
    sums = [sum(some) for some in itertools.combinations(ranks, 5)]
    seen = ranks[:5].sum()
    wanted = min(2 * min(np.mean([s <= seen for s in sums]), np.mean([s >= seen for s in sums])), 1)
    assert rank_sum(a, b) == pytest.approx(wanted)


def test_both_tests_agree_with_scipy_without_ties() -> None:
    rng = np.random.default_rng(8)
    for n in (6, 20, 150):
        a, b = rng.normal(0, 1, n), rng.normal(0.3, 1, n)
        assert signed_ranks(b - a) == pytest.approx(scipy_stats.wilcoxon(b - a).pvalue)
        exact = "exact" if n == 6 else "auto"
        assert rank_sum(a, b) == pytest.approx(scipy_stats.mannwhitneyu(a, b, method=exact).pvalue, rel=0.05)


def test_compare_takes_few_equal_runs_for_different() -> None:
    rng = np.random.default_rng(9)
    ps = [(signed_ranks(rng.normal(0, 1, 12)), rank_sum(*rng.normal(0, 1, (2, 8)))) for _ in range(300)]
    for p in zip(*ps, strict=True):
        assert 4 <= sum(each < 0.05 for each in p) <= 24


# ---- in words ----------------------------------------------------------------------------------------------------


def test_the_table_says_what_differs_and_by_how_much() -> None:
    a = samples.per_round(STEADY)
    same = samples.per_round(STEADY, point={"protection": "pkvm"})
    other = {**samples.ENVIRONMENT, "kernel": "7.1.0"}
    comparison = compare(
        samples.run(a, same, replace(ONE, metric="gone")), samples.run(times(1.1, a), same, environment=other)
    )
    said = compared.text(comparison)
    assert comparison.differs
    assert "QEMU TCG: times are relative only" in said
    assert "kernel: 7.0.9-arm64 -> 7.1.0" in said
    assert "only in A, 1: fault, gone, protection=none" in said
    assert "B against A: 1 slower, 1 no difference shown" in said
    (row,) = [line for line in said.splitlines() if line.endswith("slower")]
    assert row.split()[:2] == ["touch", "none"]
    assert "1.100" in row
    assert compared.to_json(comparison)["series"][0]["verdict"] == "slower"


def test_the_table_is_safe_and_fits() -> None:
    a = samples.hostile()
    said = compared.text(compare(a, a), Look(80, ascii=True))
    assert said.isascii()
    assert "\x1b" not in said
