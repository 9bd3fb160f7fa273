# SPDX-License-Identifier: Apache-2.0
"""Tests of two samples, all two-sided. Pure; numpy and scipy are loaded on use.

The two rank tests are exact for as few values as rounds are, with the ties that a clock's ticks make. Welch's test
shows a difference of many series at once with fewer rounds, because its p has no least value.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np

    from pyvmm.bench.statistics import Floats

FLOOR: Final = 0.001
"""The least spread (standard deviation by mean) that :func:`welch` assumes: constant samples do not vary by nothing."""

TRIMMED: Final = 0.2
"""The share of values that :func:`welch` leaves out at each end."""

_EXACT_PAIRS: Final = 100
_EXACT_BOTH: Final = 60
"""Up to this many values are tested exactly. The time grows with their fourth power."""


def signed_ranks(differences: Floats) -> float:
    """Return Wilcoxon's p that the differences of pairs are as often above as below 0; pairs without one do not count.

    Exact, with ties, for up to 100 of them: every sign is as likely as the other, whatever the ranks are.
    """
    import numpy as np

    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    if len(moved) > _EXACT_PAIRS:
        from scipy.stats import wilcoxon

        return float(wilcoxon(moved, method="auto").pvalue)  # not exact for so many
    ranks = _doubled_ranks(np.abs(moved))
    chances = np.ones(1)
    for rank in ranks:
        longer = np.zeros(len(chances) + rank)
        longer[: len(chances)] += chances / 2
        longer[rank:] += chances / 2
        chances = longer
    return _two_sided(chances, int(ranks[moved > 0].sum()))


def rank_sum(a: Floats, b: Floats) -> float:
    """Return Mann and Whitney's p that values of ``a`` are as often above as below those of ``b``.

    Exact, with ties, for up to 60 values of both: every choice of which are of ``a`` is as likely as another.
    """
    import numpy as np

    values = np.concatenate((a, b))
    if (values == values[0]).all():
        return 1.0
    if len(values) > _EXACT_BOTH:
        from scipy.stats import mannwhitneyu

        return float(mannwhitneyu(a, b, method="asymptotic").pvalue)
    ranks = _doubled_ranks(values)
    ways = np.zeros((len(a) + 1, int(ranks.sum()) + 1))
    ways[0, 0] = 1
    for rank in ranks:
        ways[1:, rank:] += ways[:-1, : ways.shape[1] - rank].copy()
    return _two_sided(ways[-1] / math.comb(len(values), len(a)), int(ranks[: len(a)].sum()))


def welch(a: Floats, b: Floats) -> float:
    """Return p that the trimmed means of ``a`` and ``b``, two values or more each, are equal: Welch's test by Yuen.

    A fifth of the values is left out at each end, so that a disturbed round among six hides little.
    """
    from scipy.stats import ttest_ind_from_stats

    sides = [_trimmed(each) for each in (a, b)]
    scale = max(abs(mean) for mean, _, _ in sides)
    if not scale:
        return 1.0
    (mean_a, std_a, kept_a), (mean_b, std_b, kept_b) = sides
    stds = max(std_a, FLOOR * scale), max(std_b, FLOOR * scale)
    return float(ttest_ind_from_stats(mean_a, stds[0], kept_a, mean_b, stds[1], kept_b, equal_var=False).pvalue)


def _trimmed(values: Floats) -> tuple[float, float, int]:
    """Return the trimmed mean, the deviation that goes with it (of the winsorized values), and how many are kept."""
    import numpy as np

    ordered = np.sort(values)
    out = int(TRIMMED * len(ordered))
    kept = ordered[out : len(ordered) - out]
    winsorized = np.clip(ordered, kept[0], kept[-1])
    std = float(winsorized.std(ddof=1)) * math.sqrt((len(ordered) - 1) / (len(kept) - 1))
    return float(kept.mean()), std, len(kept)


def _doubled_ranks(values: Floats) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return twice the rank of each value: a whole number where ties share the mean of their ranks."""
    import numpy as np
    from scipy.stats import rankdata

    return np.rint(2 * rankdata(values)).astype(np.int64)


def _two_sided(chances: Floats, seen: int) -> float:
    return min(2 * min(float(chances[: seen + 1].sum()), float(chances[seen:].sum())), 1.0)
