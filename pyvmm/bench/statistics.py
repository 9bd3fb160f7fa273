# SPDX-License-Identifier: Apache-2.0
"""What is said of a series: its median with a confidence interval, its percentiles, its outliers. Nothing is dropped.

Made on the workstation from raw values; numpy is loaded on use. The interval is a percentile bootstrap with a fixed
seed, so that a report repeats. Values within a round are not independent of each other: where a series has several
rounds these are what is drawn again, whole (a cluster bootstrap). Percentiles interpolate linearly (Hyndman and Fan's
type 7), and are given only where there are values enough.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from pyvmm.bench.model import BenchError, Series
from pyvmm.errors import HostError, pip_install

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CONFIDENCE: Final = 0.95
RESAMPLES: Final = 2000
SEED: Final = 20250101
FEW: Final = 6
"""From fewer independent things than this no interval, and no test, reaches 95 %: 1 - 2 / 2**5 is less."""

FENCE: Final = 3.0
"""A value beyond the third quartile by more than this many interquartile ranges is an outlier."""

_PERCENTILES: Final = {"p90": (0.9, 10), "p99": (0.99, 100), "p999": (0.999, 1000)}
"""Each with the number of values it takes: one in the tail, at least."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one series' kept values, in the series' unit. What the number of values does not support is None."""

    n: int
    rounds: int
    """How many rounds the values are of; 0 where the series does not tell."""
    minimum: float | None = None
    median: float | None = None
    mean: float | None = None
    maximum: float | None = None
    p90: float | None = None
    p99: float | None = None
    p999: float | None = None
    low: float | None = None
    """Of the median's confidence interval."""
    high: float | None = None
    outliers: int = 0
    """Counted in everything else."""
    fence: float | None = None
    """Values above this are the outliers."""

    @property
    def few(self) -> bool:
        """Whether the interval is of too few rounds (of values, where no rounds are told) to hold what it says."""
        return (self.rounds or self.n) < FEW


def require(*names: str) -> None:
    """Raise HostError unless the packages ``names`` are installed; without names, all that reports need."""
    needed = names or ("numpy", "scipy", "matplotlib")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise HostError(
            f"statistics and reports need {', '.join(missing)}, which this Python does not have",
            hint=f"{pip_install(*missing)}; or keep the raw results with --json and make the report elsewhere",
        )


def values(series: Series) -> Floats:
    """Return the kept values. Raises BenchError where they are no numbers."""
    require("numpy")
    import numpy as np

    try:
        array = np.asarray(series.kept, dtype=np.float64)
    except (TypeError, ValueError):
        raise BenchError(f"{series.case}, {series.metric}: its values are no numbers") from None
    if array.ndim != 1 or not np.isfinite(array).all():
        raise BenchError(f"{series.case}, {series.metric}: not all of its values are finite numbers")
    return array


def rounds(series: Series) -> list[Floats]:
    """Return the kept values of each round that has any; all in one where the series tells of no rounds.

    Raises BenchError where the rounds are not of these values.
    """
    kept = values(series)
    if not series.rounds:
        return [kept] if len(kept) else []
    sizes = series.rounds
    if any(not isinstance(size, int) or size < 0 for size in sizes) or sum(sizes) != len(series.values):
        raise BenchError(f"{series.case}, {series.metric}: its rounds do not add up to its {len(series.values)} values")
    found, end = [], 0
    for size in sizes:
        start, end = end, end + size
        of_round = kept[max(start - series.warmup, 0) : max(end - series.warmup, 0)]
        if len(of_round):
            found.append(of_round)
    return found


def merged(some: Iterable[Series]) -> list[Series]:
    """Return the series that have values, those of the same thing, measured several times, as further rounds of one.

    Its picture is that of the last round. Raises BenchError for values that are none.
    """
    found: dict[tuple[object, ...], list[Series]] = {}
    for series in some:
        if series.kept and not series.unavailable:
            found.setdefault((*series.key, series.unit), []).append(series)
    return [same[0] if len(same) == 1 else _merged(same) for same in found.values()]


def _merged(same: Sequence[Series]) -> Series:
    parts = [part for series in same for part in rounds(series)]
    last = same[-1]
    tail = -len(parts[-1])
    return replace(
        same[0],
        values=tuple(float(value) for part in parts for value in part),
        warmup=0,
        rounds=tuple(len(part) for part in parts),
        places=last.places[tail:],
        began=last.began[tail:],
    )


@lru_cache(maxsize=4096)
def _summarised(kept: bytes, sizes: tuple[int, ...], told: bool) -> Summary:
    import numpy as np

    array = np.frombuffer(kept)
    if not len(array):
        return Summary(0, 0)
    ends = np.cumsum(sizes)
    parts = [array[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    q1, median, q3 = (float(each) for each in np.quantile(array, (0.25, 0.5, 0.75)))
    percentiles = {
        name: float(np.quantile(array, share)) if len(array) >= least else None
        for name, (share, least) in _PERCENTILES.items()
    }
    low = high = None
    if len(array) > 1:
        low, high = interval(drawn_medians(parts))
    fence = q3 + FENCE * (q3 - q1)
    # A mean is rounded, and of equal values must not come out beside them.
    mean = min(max(float(array.mean()), float(array.min())), float(array.max()))
    return Summary(
        len(array),
        len(parts) if told else 0,
        float(array.min()),
        median,
        mean,
        float(array.max()),
        **percentiles,
        low=low,
        high=high,
        outliers=int((array > fence).sum()),
        fence=fence,
    )


def summary(series: Series) -> Summary:
    """Return what is said of a series. Raises BenchError for values that are none."""
    require("numpy")
    parts = rounds(series)
    kept = b"".join(part.tobytes() for part in parts)
    return _summarised(kept, tuple(len(part) for part in parts), bool(series.rounds))


def interval(drawn: Floats) -> tuple[float, float]:
    """Return the interval that :data:`CONFIDENCE` of the drawn statistics lie in."""
    import numpy as np

    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail), method="inverted_cdf")
    return float(low), float(high)


# -- drawing again


def drawn_medians(parts: list[Floats], weights: NDArray[np.int64] | None = None, *, seed: int = SEED) -> Floats:
    """Return the medians of :data:`RESAMPLES` samples drawn from ``parts``, the rounds of a series.

    With one round, or one value in each, its values are what is drawn; otherwise whole rounds. ``weights`` says how
    often each round is in each sample, so that two series can be drawn alike.
    """
    import numpy as np

    if weights is None:
        if len(parts) == 1 or all(len(part) == 1 for part in parts):
            return _drawn_values(np.sort(np.concatenate(parts)), seed)
        weights = draws(len(parts), seed)
    return _weighted_medians(parts, weights)


def draws(count: int, seed: int = SEED) -> NDArray[np.int64]:
    """Return how often each of ``count`` rounds is in each sample: a row a sample."""
    import numpy as np

    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def _drawn_values(ordered: Floats, seed: int) -> Floats:
    """Draw samples of as many values as there are, and return their medians.

    A sample's values are those at n uniformly drawn places. Only the one or two places in the middle of the sample
    are needed, and how these are distributed is known: as beta, whatever n is.
    """
    import numpy as np

    rng, n = np.random.default_rng(seed), len(ordered)
    lower = (n + 1) // 2
    first = rng.beta(lower, n - lower + 1, RESAMPLES)
    low = ordered[np.minimum((first * n).astype(np.int64), n - 1)]
    if n % 2:
        return low
    second = first + (1 - first) * rng.beta(1, n - lower, RESAMPLES)
    return _middle(low, ordered[np.minimum((second * n).astype(np.int64), n - 1)])


def _weighted_medians(parts: list[Floats], weights: NDArray[np.int64]) -> Floats:
    """Return the median of each sample of whole rounds, found by halving: how many of its values are below?"""
    import numpy as np

    ordered = [np.sort(part) for part in parts]
    distinct = np.unique(np.concatenate(parts))
    totals = weights @ np.array([len(part) for part in parts])

    def nth(rank: NDArray[np.int64]) -> Floats:
        low, high = np.zeros(len(rank), np.int64), np.full(len(rank), len(distinct) - 1)
        while (low < high).any():
            middle = (low + high) // 2
            asked = distinct[middle]
            below = np.zeros(len(rank), np.int64)
            for number, part in enumerate(ordered):
                below += weights[:, number] * np.searchsorted(part, asked, side="right")
            enough = below >= rank
            high, low = np.where(enough, middle, high), np.where(enough, low, middle + 1)
        return distinct[low]

    return _middle(nth((totals + 1) // 2), nth(totals // 2 + 1))


def _middle(low: Floats, high: Floats) -> Floats:
    # Of equal values it is that value, which half of their sum need not be.
    return low + (high - low) / 2
