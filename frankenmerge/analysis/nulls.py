"""What a score would be by chance, and how sure it is: permutations and the bootstrap, seeded."""

import math
from collections.abc import Callable

import numpy as np

NULL_SAMPLES = 1024
"""How many neurons, over all rounds, a permutation null is averaged over at least."""
RESAMPLES, COVERED = 200, 0.95


def rounds_for(width: int) -> int:
    """How many permutations of `width` neurons make `NULL_SAMPLES` samples."""
    return math.ceil(NULL_SAMPLES / width)


def derangement(generator: np.random.Generator, width: int) -> np.ndarray:
    """A random cyclic permutation: no neuron stays where it was (unless there is but one)."""
    order = generator.permutation(width)
    shifted = np.empty(width, dtype=np.int64)
    shifted[order] = np.roll(order, 1)
    return shifted


def mean_over(sample: Callable[[], np.ndarray], rounds: int) -> np.ndarray:
    """The mean of `rounds` samples, float32."""
    return np.mean([sample() for _ in range(rounds)], axis=0).astype(np.float32)


def resamples(count: int) -> np.ndarray:
    """Weights `[RESAMPLES, count]`, float32: how often each of `count` things is drawn, with replacement, over their number."""
    generator = np.random.default_rng(0)
    return (generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count).astype(
        np.float32
    )


def between(drawn: np.ndarray) -> np.ndarray:
    """Interval `[2, ...]` that holds `COVERED` of the last axis: the percentile bootstrap."""
    ends = np.quantile(drawn, [(1 - COVERED) / 2, (1 + COVERED) / 2], axis=-1)
    return ends.astype(np.float32)


def mean_interval(detail: np.ndarray) -> np.ndarray:
    """Bootstrap interval `[2, l_a, l_b]` of the mean over the last axis of `[l_a, l_b, d]`; NaN there is left out."""
    weights = resamples(detail.shape[2]).T
    rows = []
    for row in detail:  # one row at a time: the details of large donors are in float16
        values = row.astype(np.float32)
        known = np.isfinite(values)
        drawn = np.divide(
            np.where(known, values, 0) @ weights,
            known @ weights,
            out=np.full((len(row), RESAMPLES), np.nan, np.float32),
            where=known @ weights > 0,
        )
        rows.append(between(drawn))
    return np.stack(rows, axis=1)
