# SPDX-License-Identifier: Apache-2.0
"""Compare two runs of the same benchmark: the ratio of medians, its significance, and a verdict.

Series are matched by case, point and metric. The medians of their rounds are compared. Two runs are unpaired: Welch's t
tests them. The sides of a run that measured in turns are pairs: Wilcoxon's signed ranks test them. Values without
rounds are taken as independent: Mann and Whitney's rank sum tests them. One value that its case knows to repeat is
compared without a test. Benjamini and Hochberg's method (false discovery rate) corrects p over the tested series.
Series with the same values on both sides are not tested, nor those of too few rounds. Pure functions.

Counts that differ by no more than the margin of one, in every round of both sides, are the same. Else a series differs
if its corrected p is below ALPHA and its ratio is beyond the margin. It is the same if the ratio's interval lies within
the margin. Else the comparison cannot tell, and says how many rounds would.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from pyvmm.bench import statistics
from pyvmm.bench.model import BenchError, Run, Series, Value
from pyvmm.bench.report import groups, style, table
from pyvmm.bench.significance import FLOOR, rank_sum, signed_ranks, welch
from pyvmm.experiment.record import TCG
from pyvmm.labenv import TCG_NOTE
from pyvmm.reports.escaping import escaped
from pyvmm.reports.look import PLAIN, Look
from pyvmm.reports.page import page
from pyvmm.reports.words import one_line

if TYPE_CHECKING:
    from pyvmm.bench.statistics import Floats

ALPHA: Final = 0.05
SLOWER, FASTER, MORE, LESS = "slower", "faster", "more", "less"
SAME_AS, UNDECIDED = "the same", "cannot tell"
MARGIN: Final = 0.01
"""Medians of two boots differ by as much without a cause, even where time counts instructions."""
FEWEST: Final = 4
"""With fewer rounds than this on each side, chance alone separates them in one of 20 comparisons or more."""
MOST: Final = 1000
"""More rounds than this are not recommended."""
_POWER: Final = 2.8
"""Standard errors that a difference must be large to be shown in 8 of 10 comparisons."""
PAIRED, UNPAIRED, UNPAIRED_VALUES = "paired", "unpaired", "unpaired, values taken as independent"
REPEATING = "one value, which repeats"

SAME: Final = ("machine", "cpu", "cpus", TCG, "emulator", "counts", "page size")
"""The environment fields that must be equal in two comparable runs."""

_TIMES = ("ns", "instructions")
_VERDICTS: Final = (SLOWER, FASTER, MORE, LESS, SAME_AS, UNDECIDED)
_COLOURS: Final = {SLOWER: "31", MORE: "31", FASTER: "32", LESS: "32", UNDECIDED: table.DIM}


@dataclass(frozen=True, slots=True)
class Difference:
    """The comparison of one series in the runs ``a`` and ``b``."""

    a: Series
    b: Series
    test: str
    """PAIRED, UNPAIRED, UNPAIRED_VALUES or REPEATING."""
    rounds: tuple[int, int]
    """The number of compared medians of rounds (values, for UNPAIRED_VALUES), of each run."""
    ratio: float | None
    """Median of b divided by the median of a; None if that is 0."""
    low: float | None
    """Of the ratio's bootstrap interval."""
    high: float | None
    p: float | None
    """None where there is no test: the same values on both sides, or too few rounds."""
    corrected: float | None = None
    """p by Benjamini and Hochberg's method."""
    verdict: str = UNDECIDED
    needed: int | None = None
    """About how many rounds on each side would show a difference beyond the margin; None unless it cannot tell."""

    @property
    def differs(self) -> bool:
        """Whether a difference is shown."""
        return self.verdict not in (SAME_AS, UNDECIDED)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of two runs: common series, and series of only one."""

    a: Run
    b: Run
    environment: dict[str, tuple[Value, Value]]
    """Allowed differences of the environments."""
    differences: tuple[Difference, ...]
    only_a: tuple[Series, ...]
    only_b: tuple[Series, ...]
    """Series that the other run lacks, or has without values."""
    margin: float = MARGIN

    @property
    def undecided(self) -> bool:
        """Whether the comparison cannot tell of any series."""
        return any(each.verdict == UNDECIDED for each in self.differences)

    @property
    def differs(self) -> bool:
        """Whether any series is shown to differ."""
        return any(each.differs for each in self.differences)


def compare(a: Run, b: Run, *, paired: bool = False, margin: float = MARGIN) -> Comparison:
    """Compare two runs. ``paired`` says that their rounds were measured in turns, as those of ``sides`` are.

    A ratio of medians within ``margin`` of 1 counts as no difference. Raises BenchError if they are of different
    machines or clocks, and thus not comparable, or have no common series.
    """
    statistics.require("numpy", "scipy")
    _refuse(a, b)
    in_a, in_b = ({series.key: series for series in statistics.merged(run.series)} for run in (a, b))
    both = [key for key in in_a if key in in_b]
    if not both:
        raise BenchError(
            "the two runs have no series in common: there is nothing to compare",
            hint="measure the same cases at the same points for both",
        )
    told = dict.fromkeys([*a.environment, *b.environment])
    changed = {name: (a.environment.get(name), b.environment.get(name)) for name in told}
    return Comparison(
        a,
        b,
        {name: pair for name, pair in changed.items() if not _equal(*pair)},
        tuple(_decided([_difference(in_a[key], in_b[key], paired) for key in both], margin)),
        tuple(series for key, series in in_a.items() if key not in in_b),
        tuple(series for key, series in in_b.items() if key not in in_a),
        margin,
    )


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values, without the runs."""

    def named(series: Series) -> dict[str, Any]:
        return {"case": series.case, "point": series.point, "metric": series.metric, "clock": series.clock}

    return {
        "differs": comparison.differs,
        "undecided": comparison.undecided,
        "margin": comparison.margin,
        "environment": {name: list(pair) for name, pair in comparison.environment.items()},
        "series": [
            named(each.a)
            | {
                "unit": each.a.unit,
                "per": each.a.per,
                "a": statistics.summary(each.a).median,
                "b": statistics.summary(each.b).median,
                "ratio": each.ratio,
                "low": each.low,
                "high": each.high,
                "test": each.test,
                "rounds": list(each.rounds),
                "p": each.p,
                "corrected": each.corrected,
                "verdict": each.verdict,
                "needed": each.needed,
            }
            for each in comparison.differences
        ],
        "only_a": [named(series) for series in comparison.only_a],
        "only_b": [named(series) for series in comparison.only_b],
    }


def text(comparison: Comparison, look: Look = PLAIN) -> str:
    """Return a comparison for the terminal: allowed differences, a row per series, and a summary."""
    lines = [f"A: {groups.host(comparison.a)}", f"B: {groups.host(comparison.b)}"]
    if groups.is_relative(comparison.a):
        lines.append(look.paint(f"== {TCG_NOTE} ".ljust(min(look.width, 60), "="), table.STRIPE))
    for name, pair in comparison.environment.items():
        lines += look.wrap(f"{one_line(name)}: {groups.value_text(pair[0])} -> {groups.value_text(pair[1])}", 4, "  ")
    for case in dict.fromkeys(each.a.case for each in comparison.differences):
        lines += ["", *_rows([each for each in comparison.differences if each.a.case == case], look)]
    for name, only in (("A", comparison.only_a), ("B", comparison.only_b)):
        if only:
            some = "; ".join(_name(series) for series in only[:3]) + ("; …" if len(only) > 3 else "")
            lines += ["", *look.wrap(f"only in {name}, {len(only)}: {some}", 4)]
    verdicts = Counter(each.verdict for each in comparison.differences)
    total = ", ".join(f"{verdicts[word]} {word}" for word in _VERDICTS if verdicts[word])
    lines += ["", look.paint(f"B against A: {total}", table.BOLD)]
    lines += [look.paint(each, table.DIM) for each in look.wrap(_note(comparison), 0)]
    shown = "\n".join(each.rstrip() for each in lines)
    return look.finish(shown.replace("µ", "u") if look.ascii else shown)


def html(comparison: Comparison) -> str:
    """Return a comparison as a page of one table, its text."""
    title = f"{groups.host(comparison.a)} and {groups.host(comparison.b)} - pyvmm bench compare"
    shown = escaped(text(comparison, Look(200)))
    return page(
        title, style.CSS, "", ['<header><p class="kicker">pyvmm bench compare</p></header>', f"<pre>{shown}</pre>"]
    )


def _rows(some: Sequence[Difference], look: Look) -> list[str]:
    columns, base = groups.columns_of([each.a.point for each in some])
    names = [name if name else "differs in" for name in columns]
    rows = []
    for each in some:
        medians = [statistics.summary(series).median for series in (each.a, each.b)]
        scale = groups.scale_of(each.a.unit, [median for median in medians if median is not None])
        ratio = "-" if each.ratio is None else f"{each.ratio:.3f}"
        interval = "" if each.low is None or each.high is None else f"[{each.low:.3f}, {each.high:.3f}]"
        p = "-" if each.corrected is None else f"{each.corrected:.3f}" if each.corrected >= 0.001 else "<0.001"
        kind = {PAIRED: PAIRED, REPEATING: "-"}.get(each.test, UNPAIRED)
        rows.append(
            [
                one_line(each.a.metric),
                *groups.cells_of(each.a.point, columns, base),
                *map(scale.show, medians),
                one_line(scale.unit),
                ratio,
                interval,
                "x".join(map(str, sorted(set(each.rounds)))),
                kind,
                p,
                each.verdict,
            ]
        )
    head = ["metric", *names, "A", "B", "unit", "B/A", "95 % CI", "rounds", "test", "p", "verdict"]
    drawn = table.grid(head, rows, 1 + len(names))
    # In a narrow terminal, the least important columns are dropped first.
    for name in ("test", "rounds", "95 % CI", "unit"):
        if max(map(len, drawn)) > look.width:
            at = head.index(name)
            head = head[:at] + head[at + 1 :]
            rows = [row[:at] + row[at + 1 :] for row in rows]
            drawn = table.grid(head, rows, 1 + len(names))
    lines = [look.paint(one_line(some[0].a.case), table.BOLD)]
    if base:
        lines += [look.paint(each, table.DIM) for each in look.wrap("at " + groups.point_of(base), 4, "    ")]
    lines.append(look.paint(drawn[0], table.DIM))
    return lines + [look.paint(drawn[at], _COLOURS.get(each.verdict, "")) for at, each in enumerate(some, 1)]


def _name(series: Series) -> str:
    return one_line(f"{series.case}, {series.metric}, {groups.point_of(series.point)}")


def _note(comparison: Comparison) -> str:
    tests = {each.test for each in comparison.differences if each.p is not None}
    margin = f"{comparison.margin * 100:g} %"
    said = (
        f"B/A: ratio of the medians; the same: the ratio's interval lies within {margin} of 1, or the values are equal"
    )
    said += "; p: corrected for the number of tests (Benjamini-Hochberg)" if tests else ""
    said += "; paired: Wilcoxon's signed ranks on the rounds' medians" if PAIRED in tests else ""
    said += "; unpaired: Welch's t on the rounds' medians" if UNPAIRED in tests else ""
    if UNPAIRED_VALUES in tests:
        said += "; unpaired, where no rounds are told: Mann-Whitney on values taken as independent"
    if any(each.test == REPEATING for each in comparison.differences):
        said += "; test -: one value, which its case knows to repeat"
    return said + "".join(f"; {each}" for each in _advice(comparison, margin))


def _advice(comparison: Comparison, margin: str) -> Iterable[str]:
    """Say what would decide the series that the comparison cannot tell of."""
    undecided = [each for each in comparison.differences if each.verdict == UNDECIDED]
    once = [each for each in undecided if each.a.once or each.b.once]
    if once:
        yield (
            f"for {len(once)} that a run measures once, whatever --rounds says, use bench sweep with "
            f"repeat = {statistics.FEW}"
        )
    for paired, option in ((False, "--rounds"), (True, "--turns")):
        open_ = [each for each in undecided if each not in once and paired == (each.test == PAIRED)]
        able = [each.needed for each in open_ if each.needed is not None and each.needed <= MOST]
        if able:
            yield f"to tell a difference of {margin} in {len(able)} of them, measure with {option} {max(able)}"
        if len(able) < len(open_):
            yield (
                f"{len(open_) - len(able)} vary so much that {MOST:,} rounds would not tell {margin}: count "
                "instructions (--lab-icount), keep the machine idle, or choose a larger --margin"
            )


# -- matching series


def _refuse(a: Run, b: Run) -> None:
    differ = [
        f"{name} ({_said(a.environment.get(name))} and {_said(b.environment.get(name))})"
        for name in SAME
        if not _equal(a.environment.get(name), b.environment.get(name))
    ]
    if differ:
        raise BenchError(
            f"the two runs cannot be compared, they are not of the same {', '.join(differ)}",
            hint="measure both on one machine with the same clock, in turns for small differences",
        )


def _said(value: Value) -> str:
    return "not told" if value is None else repr(value)


def _equal(one: Value, other: Value) -> bool:
    # In Python True is 1; in an environment they are not the same.
    return type(one) is type(other) and one == other


def _difference(a: Series, b: Series, paired: bool) -> Difference:
    """Return the comparison of two series, without the verdict."""
    if a.unit != b.unit:
        raise BenchError(f"{a.case}, {a.metric}: one run has it in {a.unit}, the other in {b.unit}")
    parts_a, parts_b = statistics.rounds(a), statistics.rounds(b)
    units_a, units_b = _compared(a, b)
    if a.repeats and b.repeats:
        test = REPEATING
    elif not a.rounds and not b.rounds:
        test = UNPAIRED_VALUES
    else:
        test = PAIRED if paired and len(parts_a) == len(parts_b) else UNPAIRED
    ratio, low, high = _ratio(parts_a, parts_b, paired=test == PAIRED)
    sizes = len(units_a), len(units_b)
    p = None
    if test != REPEATING and not _are_equal(a, b) and min(sizes) >= _fewest(test):
        p = {PAIRED: _signed, UNPAIRED: welch, UNPAIRED_VALUES: rank_sum}[test](units_a, units_b)
    return Difference(a, b, test, sizes, ratio, low, high, p)


def _signed(a: Floats, b: Floats) -> float:
    return signed_ranks(b - a)


def _compared(a: Series, b: Series) -> tuple[Floats, Floats]:
    """Return what is compared of two series: the medians of their rounds, or values where neither tells of rounds."""
    import numpy as np

    parts_a, parts_b = statistics.rounds(a), statistics.rounds(b)
    if not a.rounds and not b.rounds:
        return parts_a[0], parts_b[0]
    return np.array([np.median(part) for part in parts_a]), np.array([np.median(part) for part in parts_b])


def _are_equal(a: Series, b: Series) -> bool:
    import numpy as np

    return np.array_equal(np.sort(statistics.values(a)), np.sort(statistics.values(b)))


def _fewest(test: str) -> int:
    """Return the number of rounds on each side from which a test can show a difference."""
    return statistics.FEW if test == PAIRED else FEWEST


def _ratio(a: list[Floats], b: list[Floats], *, paired: bool) -> tuple[float | None, float | None, float | None]:
    """Return the ratio of the medians with its interval, for which rounds of pairs are drawn together."""
    import numpy as np

    median_a, median_b = (float(np.median(np.concatenate(parts))) for parts in (a, b))
    if paired and len(a) > 1:
        weights = statistics.draws(len(a))
        drawn_a, drawn_b = (statistics.drawn_medians(parts, weights) for parts in (a, b))
    else:
        drawn_a, drawn_b = statistics.drawn_medians(a), statistics.drawn_medians(b, seed=statistics.SEED + 1)
    if median_a == 0 or (drawn_a == 0).any():
        return (median_b / median_a if median_a else None), None, None
    low, high = statistics.interval(drawn_b / drawn_a)
    return median_b / median_a, low, high


def _decided(differences: Sequence[Difference], margin: float) -> Iterable[Difference]:
    """Correct p for the number of tests, and decide."""
    from scipy.stats import false_discovery_control

    tested = [each.p for each in differences if each.p is not None]
    corrected = iter(false_discovery_control(tested) if tested else ())
    for each in differences:
        done = replace(each, corrected=None if each.p is None else float(next(corrected)))
        verdict = _verdict(done, margin)
        needed = _needed(done, margin, len(tested)) if verdict == UNDECIDED else None
        yield replace(done, verdict=verdict, needed=needed)


def _verdict(each: Difference, margin: float) -> str:
    if _are_equal(each.a, each.b) or _are_near_counts(each, margin):
        return SAME_AS
    moved = math.inf if each.ratio is None else abs(each.ratio - 1)
    shown = each.corrected is not None and each.corrected < ALPHA
    if each.test == REPEATING:
        shown = moved > max(each.a.repeats, each.b.repeats)
    if shown and moved > margin:
        up, down = (SLOWER, FASTER) if each.a.unit in _TIMES else (MORE, LESS)
        return up if _moved(each) > 0 else down
    if each.test == REPEATING:
        return SAME_AS if moved <= margin else UNDECIDED
    if min(each.rounds) >= statistics.FEW and each.low is not None and each.high is not None:
        return SAME_AS if 1 - margin <= each.low and each.high <= 1 + margin else UNDECIDED
    return UNDECIDED


def _are_near_counts(each: Difference, margin: float) -> bool:
    """Whether all are counts of nearly the same number, such as 0.002 and 0.003 exits an access."""
    import numpy as np

    counted = np.concatenate(_compared(each.a, each.b))
    enough = min(each.rounds) >= statistics.FEW
    return each.a.unit == "count" and enough and float(np.ptp(counted)) <= margin


def _moved(each: Difference) -> float:
    """Return the direction of a difference: of the medians, or of the means where the medians are equal."""
    import numpy as np

    if each.ratio is not None and each.ratio != 1:
        return each.ratio - 1
    a, b = _compared(each.a, each.b)
    return float(np.median(b) - np.median(a)) or float(b.mean() - a.mean())


def _needed(each: Difference, margin: float, tests: int) -> int:
    """Return about how many rounds (values, where none are told) on each side would show a difference of ``margin``."""
    import numpy as np

    a, b = _compared(each.a, each.b)
    least = statistics.FEW
    if each.test == PAIRED:
        # Ranks of n pairs give no p below 2 / 2**n, and the correction multiplies it by the number of tests at most.
        least = max(least, math.ceil(math.log2(2 * max(tests, 1) / ALPHA)))
        spread = float((b - a).std(ddof=1)) if len(a) > 1 else 0.0
    else:
        spread = math.hypot(*(float(side.std(ddof=1)) if len(side) > 1 else 0.0 for side in (a, b)))
    middle = abs(float(np.median(a))) or abs(float(a.mean())) or abs(float(b.mean()))
    spread = max(spread, FLOOR * middle)
    wanted = math.ceil((_POWER * spread / (margin * middle)) ** 2) if margin and middle else MOST + 1
    measured = min(each.rounds)
    return max(least, wanted, 2 * measured if measured >= least else 0)
