"""Null models and intervals of scores: seeded permutations, and the bootstrap."""

import math
from collections.abc import Callable

import numpy as np

from frankenmerge.artefacts.bootstrap import percentile_interval, resample_counts

NULL_SAMPLES = 1024
"""How many neurons, over all rounds, a permutation null is averaged over at least."""
RESAMPLES = 200
"""Bootstrap resamples of an interval."""


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


def resampling_weights(count: int) -> np.ndarray:
    """The weight of each of `count` items in each resample, `[RESAMPLES, count]`, float32."""
    return (resample_counts(count, RESAMPLES, seed=0) / count).astype(np.float32)


def interval_of(resampled: np.ndarray) -> np.ndarray:
    """The 95 % interval `[2, ...]`, float32, of resampled values `[..., RESAMPLES]`."""
    return percentile_interval(resampled).astype(np.float32)


def mean_interval(detail: np.ndarray) -> np.ndarray:
    """Bootstrap interval `[2, l_a, l_b]` of the mean over the last axis of `[l_a, l_b, d]`.

    NaN there is left out.
    """
    weights = resampling_weights(detail.shape[2]).T
    rows = []
    for row in detail:  # one row at a time: the details of large donors are in float16
        values = row.astype(np.float32)
        known = np.isfinite(values)
        means = np.divide(
            np.where(known, values, 0) @ weights,
            known @ weights,
            out=np.full((len(row), RESAMPLES), np.nan, np.float32),
            where=known @ weights > 0,
        )
        rows.append(interval_of(means))
    return np.stack(rows, axis=1)
