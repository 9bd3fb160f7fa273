# SPDX-License-Identifier: Apache-2.0
"""Two runs are compared only if that is meaningful, and a difference is reported only if the rounds show one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from pyvmm.bench import compare as compared
from pyvmm.bench.compare import SAME, compare
from pyvmm.bench.model import REPEATS, BenchError, Point, Run, Series
from pyvmm.bench.significance import FLOOR, rank_sum, signed_ranks, welch
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
    assert (found.verdict, found.test, found.rounds) == (verdict, "unpaired", (12, 12))
    assert found.ratio == pytest.approx(factor)
    assert found.low is not None
    assert found.ratio is not None
    assert found.high is not None
    assert found.low <= found.ratio <= found.high
    assert found.low == pytest.approx(factor, rel=0.02)
    assert found.p is not None
    assert found.p < 1e-6


def test_a_run_is_the_same_as_itself_however_much_it_varies() -> None:
    noisy = samples.run(samples.per_round([50, 100, 200, 400, 10, 5]), samples.series([3.0], metric="once"))
    comparison = compare(noisy, noisy)
    assert [each.verdict for each in comparison.differences] == ["the same", "the same"]
    assert [each.p for each in comparison.differences] == [None, None]
    assert not comparison.differs
    assert not comparison.undecided


def test_series_with_equal_values_are_left_out_of_the_correction() -> None:
    moved = samples.per_round(STEADY[:6])
    constant = [samples.series([7.0] * 6, point={"at": at}, rounds=[1] * 6) for at in range(500)]
    found = compare(samples.run(moved, *constant), samples.run(times(1.5, moved), *constant)).differences[0]
    assert found.corrected == found.p


@pytest.mark.parametrize("factor", [1.05, 3.0, 0.95])
def test_the_default_rounds_show_a_difference_in_every_one_of_many_series(factor: float) -> None:
    a = [samples.per_round(STEADY[:6], point={"at": at}, seed=at) for at in range(66)]
    comparison = compare(samples.run(*a), samples.run(*(times(factor, each) for each in a)))
    assert {each.verdict for each in comparison.differences} == {"slower" if factor > 1 else "faster"}


def test_the_default_rounds_show_the_one_difference_among_many_series() -> None:
    def side(seed: int, factor: float) -> Run:
        a = [samples.per_round(STEADY[:6], 400, point={"at": at}, seed=seed + at, spread=0.005) for at in range(66)]
        return samples.run(*(times(factor if at == 30 else 1, each) for at, each in enumerate(a)))

    verdicts = [each.verdict for each in compare(side(0, 1), side(100, 1.05)).differences]
    assert verdicts == ["the same"] * 30 + ["slower"] + ["the same"] * 35


def test_the_default_rounds_show_a_difference_of_values_that_never_vary() -> None:
    a = samples.series([16_031.0] * 6, unit="instructions", rounds=[1] * 6)
    b = replace(a, values=(14_007.0,) * 6)
    assert only(compare(samples.run(a), samples.run(b))).verdict == "faster"


@pytest.mark.parametrize(("margin", "verdict"), [(0.01, "the same"), (0.001, "slower")])
def test_a_difference_within_the_margin_counts_as_none(margin: float, verdict: str) -> None:
    a = samples.series([100.0] * 6, rounds=[1] * 6)
    b = replace(a, values=(100.5,) * 6)
    assert only(compare(samples.run(a), samples.run(b), margin=margin)).verdict == verdict


def test_one_disturbed_round_hides_no_difference() -> None:
    a = samples.series([100.0, 100.1, 99.9, 100.0, 250.0, 100.2], rounds=[1] * 6)
    assert only(compare(samples.run(a), samples.run(times(1.05, a)))).verdict == "slower"


@pytest.mark.parametrize(("unit", "verdict"), [("count", "the same"), ("ns", "cannot tell")])
def test_counts_near_zero_are_the_same(unit: str, verdict: str) -> None:
    a, b = (
        samples.series(each, unit=unit, rounds=[1] * 6)
        for each in ([0.001, 0.0, 0.004, 0.002, 0.0, 0.003], [0.002, 0.001, 0.0, 0.005, 0.001, 0.0])
    )
    assert only(compare(samples.run(a), samples.run(b))).verdict == verdict


def test_pairs_show_a_difference_that_drift_would_hide() -> None:
    drifting = [100 * 1.05**at for at in range(10)]
    a = samples.per_round(drifting, spread=0.001)
    b = samples.per_round([middle * 1.02 for middle in drifting], seed=2, spread=0.001)
    found = only(compare(samples.run(a), samples.run(b), paired=True))
    assert (found.test, found.verdict) == ("paired", "slower")
    found = only(compare(samples.run(a), samples.run(b)))
    assert (found.test, found.rounds, found.verdict) == ("unpaired", (10, 10), "cannot tell")


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_with_few_rounds_it_cannot_tell_and_says_how_many_would(count: int, paired: bool) -> None:
    a = samples.per_round(STEADY[:count], spread=0.0001)
    comparison = compare(samples.run(a), samples.run(times(3, a)), paired=paired)
    found = only(comparison)
    assert (found.verdict, found.p, found.differs) == ("cannot tell", None, False)
    assert comparison.undecided
    assert found.ratio == pytest.approx(3)
    assert found.needed is not None
    option = "--turns" if paired else "--rounds"
    said = " ".join(compared.text(comparison).split())
    assert f"to tell a difference of 1 % in 1 of them, measure with {option} {found.needed}" in said


def test_the_number_of_rounds_that_it_says_is_enough() -> None:
    def runs(rounds: int, factor: float) -> tuple[Run, Run]:
        rng = np.random.default_rng(rounds)
        a, b = (rng.normal(100, 2, rounds) for _ in range(2))
        return tuple(samples.run(samples.series(each, rounds=[1] * rounds)) for each in (a, b * factor))  # type: ignore[return-value]

    few = only(compare(*runs(6, 1)))
    assert (few.verdict, few.needed is not None and 20 < few.needed < 400) == ("cannot tell", True)
    assert few.needed is not None
    assert only(compare(*runs(4 * few.needed, 1.02))).verdict == "slower"


def test_values_that_vary_too_much_get_other_advice() -> None:
    a = samples.series([100.0, 900.0, 3.0, 5000.0, 20.0, 1.0], rounds=[1] * 6)
    b = replace(a, values=(200.0, 400.0, 7.0, 2000.0, 90.0, 3.0))
    assert "1,000 rounds would not tell 1 %: count instructions" in " ".join(
        compared.text(compare(samples.run(a), samples.run(b))).split()
    )


def test_the_correction_is_of_the_false_discovery_rate() -> None:
    moves: list[list[float]] = [[1] * 10, [1] * 9 + [-0.1], [1, -1] * 5]
    a = [samples.series([100.0] * 10, point={"at": at}, rounds=[1] * 10) for at in range(3)]
    b = [replace(each, values=tuple(100.0 + move for move in moves[at])) for at, each in enumerate(a)]
    found = compare(samples.run(*a), samples.run(*b), paired=True).differences
    assert [each.p for each in found] == [2**-9, 2 * 2**-9, 1.0]
    assert [each.corrected for each in found] == pytest.approx([3 * 2**-9, 3 / 2 * 2 * 2**-9, 1.0])


def test_measuring_again_into_the_same_file_adds_rounds() -> None:
    parts = [samples.per_round(STEADY[at : at + 3], seed=at) for at in (0, 3, 6)]
    warm = [replace(part, values=(1e9, *part.values), rounds=(1, *part.rounds), warmup=1) for part in parts]
    found = only(compare(samples.run(*warm), samples.run(*(times(0.9, each) for each in warm))))
    assert (found.rounds, found.verdict) == ((9, 9), "faster")


def test_values_without_rounds_count_as_independent_and_the_table_says_so() -> None:
    rng = np.random.default_rng(1)
    a, b = (samples.series(rng.normal(middle, 1, 80)) for middle in (100, 102))
    comparison = compare(samples.run(a), samples.run(b))
    assert (only(comparison).verdict, only(comparison).rounds) == ("slower", (80, 80))
    assert "values taken as independent" in " ".join(compared.text(comparison).split())


def test_compare_handles_very_many_values() -> None:
    rng = np.random.default_rng(1)
    a = samples.series(rng.integers(90, 110, 65_536).astype(float))
    assert only(compare(samples.run(a), samples.run(a))).verdict == "the same"


def test_a_median_of_zero_has_a_verdict_but_no_ratio() -> None:
    a, b = (samples.series([value] * 12, unit="count", rounds=[1] * 12) for value in (0.0, 1.0))
    found = only(compare(samples.run(a), samples.run(b)))
    assert (found.ratio, found.low, found.verdict) == (None, None, "more")


# ---- values that are measured once ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, "the same"), (1.009, "the same"), (1.05, "more"), (0.95, "less"), (1.02, "cannot tell")],
)
def test_one_value_that_repeats_is_compared_without_a_test(factor: float, verdict: str) -> None:
    a = samples.series([15e6], unit="bytes", rounds=[1], notes={REPEATS: 0.03 if factor == 1.02 else 0.01})
    comparison = compare(samples.run(a), samples.run(times(factor, a)))
    assert (only(comparison).verdict, only(comparison).p) == (verdict, None)
    said = " ".join(compared.text(comparison).split())
    assert "test -: one value, which its case knows to repeat" in said
    assert ("bench sweep" in said) == (verdict == "cannot tell")


def test_rounds_are_not_advised_for_what_is_measured_once() -> None:
    once = samples.series([15e6], unit="bytes", rounds=[1])
    several = samples.series([100.0, 101.0, 90.0], metric="several", rounds=[1] * 3)
    a = samples.run(once, several)
    comparison = compare(a, samples.run(*(times(1.05, each) for each in a.series)))
    assert [each.verdict for each in comparison.differences] == ["cannot tell"] * 2
    said = " ".join(compared.text(comparison).split())
    assert "for 1 that a run measures once, whatever --rounds says, use bench sweep with repeat = 6" in said
    assert "in 1 of them, measure with --rounds" in said


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


def test_welch_agrees_with_scipy_and_takes_no_sample_for_constant() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(100, 2, 6), rng.normal(102, 4, 8)
    assert welch(a, b) == pytest.approx(scipy_stats.ttest_ind(a, b, equal_var=False, trim=0.2).pvalue)
    assert welch(np.full(6, 100.0), np.full(6, 100.0 * (1 + FLOOR / 10))) > 0.5
    assert welch(np.full(6, 100.0), np.full(6, 105.0)) < 1e-6
    assert welch(np.zeros(6), np.zeros(6)) == 1.0


def test_both_tests_agree_with_scipy_without_ties() -> None:
    rng = np.random.default_rng(8)
    for n in (6, 20, 150):
        a, b = rng.normal(0, 1, n), rng.normal(0.3, 1, n)
        assert signed_ranks(b - a) == pytest.approx(scipy_stats.wilcoxon(b - a).pvalue)
        exact = "exact" if n == 6 else "auto"
        assert rank_sum(a, b) == pytest.approx(scipy_stats.mannwhitneyu(a, b, method=exact).pvalue, rel=0.05)


def test_compare_takes_few_equal_runs_for_different() -> None:
    rng = np.random.default_rng(9)
    ps = [
        (signed_ranks(rng.normal(0, 1, 12)), rank_sum(*rng.normal(0, 1, (2, 8))), welch(*rng.normal(99, 1, (2, 6))))
        for _ in range(300)
    ]
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
    assert "B against A: 1 slower, 1 the same" in said
    (row,) = [line for line in said.splitlines() if line.endswith("slower")]
    assert row.split()[:2] == ["touch", "none"]
    assert "1.100" in row
    assert compared.to_json(comparison)["series"][0]["verdict"] == "slower"


def test_the_table_is_safe_and_fits() -> None:
    a = samples.hostile()
    said = compared.text(compare(a, a), Look(80, ascii=True))
    assert said.isascii()
    assert "\x1b" not in said
