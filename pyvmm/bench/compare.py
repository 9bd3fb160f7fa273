# SPDX-License-Identifier: Apache-2.0
"""Compare two runs of the same benchmark: the ratio of medians, its significance, and a verdict.

Series are matched by case, point and metric. If both have the same number of rounds, the rounds are pairs, as from two
builds measured in turns. Pairs are tested by Wilcoxon's signed ranks on the rounds' medians. Otherwise Mann and
Whitney's rank sum is used, and the result is marked as unpaired. Both tests are exact, with ties, for usual numbers of
rounds. p is corrected by Holm's method over all series of a comparison. Pure functions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from pyvmm.bench import statistics
from pyvmm.bench.model import BenchError, Run, Series, Value
from pyvmm.bench.report import groups, table
from pyvmm.bench.significance import rank_sum, signed_ranks
from pyvmm.experiment.record import TCG
from pyvmm.labenv import TCG_NOTE
from pyvmm.reports.look import PLAIN, Look
from pyvmm.reports.words import one_line

if TYPE_CHECKING:
    from pyvmm.bench.statistics import Floats

ALPHA: Final = 0.05
SLOWER, FASTER, MORE, LESS = "slower", "faster", "more", "less"
SAME_AS, TOO_FEW = "no difference shown", "too few rounds to tell"
PAIRED, UNPAIRED, UNPAIRED_VALUES = "paired", "unpaired", "unpaired, values taken as independent"

SAME: Final = ("machine", "cpu", "cpus", TCG, "emulator", "counts", "page size")
"""The environment fields that must be equal in two comparable runs."""

_TIMES = ("ns", "instructions")
_VERDICTS: Final = (SLOWER, FASTER, MORE, LESS, SAME_AS, TOO_FEW)
_COLOURS: Final = {SLOWER: "31", MORE: "31", FASTER: "32", LESS: "32", TOO_FEW: table.DIM}


@dataclass(frozen=True, slots=True)
class Difference:
    """The comparison of one series in the runs ``a`` and ``b``."""

    a: Series
    b: Series
    test: str
    """PAIRED, UNPAIRED or UNPAIRED_VALUES."""
    rounds: tuple[int, int]
    """The number of compared medians of rounds (values, for UNPAIRED_VALUES), of each run."""
    ratio: float | None
    """Median of b divided by the median of a; None if that is 0."""
    low: float | None
    """Of the ratio's bootstrap interval."""
    high: float | None
    p: float | None
    """None with too few rounds for a p below ALPHA."""
    corrected: float | None = None
    """p by Holm's method."""
    verdict: str = TOO_FEW

    @property
    def differs(self) -> bool:
        """Whether a difference is shown."""
        return self.verdict not in (SAME_AS, TOO_FEW)


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

    @property
    def differs(self) -> bool:
        """Whether any series is shown to differ."""
        return any(each.differs for each in self.differences)


def compare(a: Run, b: Run) -> Comparison:
    """Compare two runs.

    Raises BenchError if they are of different machines or clocks, and thus not comparable, or have no common series.
    """
    statistics.require()
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
        tuple(_corrected([_difference(in_a[key], in_b[key]) for key in both])),
        tuple(series for key, series in in_a.items() if key not in in_b),
        tuple(series for key, series in in_b.items() if key not in in_a),
    )


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values, without the runs."""

    def named(series: Series) -> dict[str, Any]:
        return {"case": series.case, "point": series.point, "metric": series.metric, "clock": series.clock}

    return {
        "differs": comparison.differs,
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
        kind = each.test if each.test == PAIRED else UNPAIRED
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
    tests = {each.test for each in comparison.differences}
    said = "B/A: ratio of the medians; p: corrected for the number of tests (Holm)"
    said += "; paired: Wilcoxon's signed ranks on the rounds' medians" if PAIRED in tests else ""
    said += "; unpaired: Mann-Whitney on the rounds' medians" if UNPAIRED in tests else ""
    if UNPAIRED_VALUES in tests:
        said += "; unpaired, where no rounds are told: Mann-Whitney on values taken as independent"
    if any(each.verdict == TOO_FEW for each in comparison.differences):
        said += f"; to tell takes {_needed(len(comparison.differences))} rounds in both for as many series as these"
    return said


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


def _difference(a: Series, b: Series) -> Difference:
    import numpy as np

    if a.unit != b.unit:
        raise BenchError(f"{a.case}, {a.metric}: one run has it in {a.unit}, the other in {b.unit}")
    parts_a, parts_b = statistics.rounds(a), statistics.rounds(b)
    if not a.rounds and not b.rounds:
        test, units_a, units_b = UNPAIRED_VALUES, parts_a[0], parts_b[0]
    else:
        units_a, units_b = (np.array([np.median(part) for part in parts]) for parts in (parts_a, parts_b))
        test = PAIRED if len(parts_a) == len(parts_b) else UNPAIRED
    if test == PAIRED:
        p = signed_ranks(units_b - units_a)
        moved = float(np.median(units_b - units_a)) or float((units_b - units_a).mean())
    else:
        p = rank_sum(units_a, units_b)
        moved = float(np.median(units_b) - np.median(units_a)) or float(units_b.mean() - units_a.mean())
    ratio, low, high = _ratio(parts_a, parts_b, paired=test == PAIRED)
    if ratio is not None and ratio != 1:
        moved = ratio - 1
    up, down = (SLOWER, FASTER) if a.unit in _TIMES else (MORE, LESS)
    word = up if moved > 0 else down if moved < 0 else SAME_AS
    sizes = len(units_a), len(units_b)
    return Difference(a, b, test, sizes, ratio, low, high, p if _least(test, sizes) < ALPHA else None, verdict=word)


def _least(test: str, rounds: tuple[int, int]) -> float:
    """Return the smallest p that this number of rounds can give."""
    one, other = rounds
    if test == PAIRED:
        return 2.0 ** (1 - one)
    # For very many rounds the number of choices exceeds a float, and does not matter.
    return 2 / math.comb(one + other, one) if one + other <= 1000 else 2 / math.comb(1000, min(one, other, 500))


def _needed(tests: int) -> int:
    """Return the number of pairs of rounds needed to show a difference in one of this many series."""
    return next(count for count in range(1, 1000) if 2.0 ** (1 - count) * tests < ALPHA)


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


def _corrected(differences: Sequence[Difference]) -> Iterable[Difference]:
    """Correct p for multiple tests, and withdraw verdicts that are no longer significant."""
    tested = sorted(each.p for each in differences if each.p is not None)
    corrected: dict[float, float] = {}
    highest = 0.0
    for rank, p in enumerate(tested):
        highest = max(highest, min((len(tested) - rank) * p, 1.0))
        corrected.setdefault(p, highest)
    for each in differences:
        holm = None if each.p is None else corrected[each.p]
        verdict = each.verdict
        if holm is None or holm >= ALPHA:
            able = _least(each.test, each.rounds) * max(len(tested), 1) < ALPHA
            verdict = SAME_AS if able else TOO_FEW
        yield replace(each, corrected=holm, verdict=verdict)
