"""The bootstrap: seeded resamples with replacement, and the percentile interval over them.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13. What is resampled
(neurons, probes, segments of text, splices), how often and from which seed is the caller's choice.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, t

COVERAGE = 0.95
"""The share of the resamples within an interval."""


def resample_counts(
    count: int, resamples: int, seed: int | Sequence[int] | np.random.Generator
) -> np.ndarray:
    """How often each of `count` items is in each resample of `count` items, `[resamples, count]`.

    For statistics that are functions of sums: the sums of all resamples are one product of
    matrices.
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=resamples)


def resample_indices(count: int, resamples: int, seed: int | Sequence[int]) -> np.ndarray:
    """The items of each resample, `[resamples, count]`: for statistics that need every item."""
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def percentile_interval(values: np.ndarray, coverage: float = COVERAGE) -> np.ndarray:
    """Lower and upper end `[2, ...]` of the interval with `coverage` of the last axis's values."""
    return np.quantile(values, [(1 - coverage) / 2, (1 + coverage) / 2], axis=-1)


def expanded_interval(
    values: np.ndarray, units: int, groups: int = 1, coverage: float = COVERAGE
) -> tuple[float, float]:
    """The percentile interval, with its ends moved away from the median as few units require.

    Resamples of few units vary too little, and their quantiles are those of a normal distribution:
    of four units an interval that should hold in 95 % of all samples holds in 79 %. The factor is
    that of a Student interval over the normal one (Hesterberg, arXiv:1411.5279, expands the
    quantiles by it; here distances are, which may reach beyond all units).

    Args:
        values: of a figure in each resample, `[r]`.
        units: how many were resampled.
        groups: how many parts they were resampled in, each on its own.
        coverage: of the interval.
    """
    free, above = max(units - groups, 1), (1 + coverage) / 2
    factor = np.sqrt(units / free) * t.ppf(above, free) / norm.ppf(above)
    middle = np.median(values)
    low, high = middle + factor * (percentile_interval(values, coverage) - middle)
    return float(low), float(high)
