"""95 % confidence intervals of means, differences and ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2_000
_Z = 1.959964  # 97.5 % quantile of the standard normal distribution

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """A mean, with Wilson's interval if all values are 0 or 1, else a bootstrap interval."""
    array = np.asarray(values, np.float64)
    if set(np.unique(array)) <= {0.0, 1.0}:
        return wilson(int(array.sum()), len(array))
    return mean_of_means([array.tolist()])


def wilson(successes: int, count: int) -> Interval:
    """Wilson's score interval of a proportion."""
    share = successes / count
    spread = _Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * np.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    low, high = float(centre - half), float(centre + half)
    return Interval(share, min(share, max(0.0, low)), max(share, min(1.0, high)))


def mean_of_means(groups: Sequence[Sequence[float]]) -> Interval:
    """The mean of the group means, so that each task has equal weight; a bootstrap that resamples
    within groups."""
    rng = np.random.default_rng(0)
    arrays = [np.asarray(group, np.float64) for group in groups]
    drawn = np.mean([array[_draws(rng, len(array))].mean(1) for array in arrays], 0)
    return _percentiles(float(np.mean([array.mean() for array in arrays])), drawn)


def ratio_of_sums(pairs: Sequence[tuple[float, float]]) -> Interval:
    """The ratio of the two sums; a bootstrap that resamples pairs."""
    array = np.asarray(pairs, np.float64)
    drawn = array[_draws(np.random.default_rng(0), len(array))].sum(1)
    return _percentiles(float(np.divide(*array.sum(0))), drawn[:, 0] / drawn[:, 1])


def median_ratio(pairs: Sequence[tuple[float, float]]) -> Interval:
    """The median of the pairwise ratios, which is robust to interference on the machine."""
    array = np.asarray(pairs, np.float64)
    ratios = array[:, 0] / array[:, 1]
    drawn = np.median(ratios[_draws(np.random.default_rng(0), len(ratios))], 1)
    return _percentiles(float(np.median(ratios)), drawn)


def bootstrap(rows: Values, statistic: Callable[[Values], float]) -> Interval:
    """The percentile bootstrap of a statistic of rows [n, ...]."""
    draws = _draws(np.random.default_rng(0), len(rows))
    return _percentiles(statistic(rows), np.array([statistic(rows[draw]) for draw in draws]))


def _draws(rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
    return rng.integers(0, count, (RESAMPLES, count))


def _percentiles(value: float, drawn: Values) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, min(value, float(low)), max(value, float(high)))
