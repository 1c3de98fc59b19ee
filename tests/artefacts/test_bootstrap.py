"""The bootstrap's pieces, compared with plain Python, closed forms and a simulation."""

import numpy as np
import pytest

from frankenmerge.artefacts.bootstrap import (
    percentile_interval,
    resample_counts,
    resample_indices,
)


def test_counts_add_up_and_average_to_one():
    counts = resample_counts(50, 4000, seed=3)
    assert counts.shape == (4000, 50) and (counts.sum(axis=1) == 50).all()
    # A count has variance 1 - 1/50: five standard errors of a mean of 4000.
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=5 / np.sqrt(4000))
    np.testing.assert_allclose(counts.var(axis=0).mean(), 1 - 1 / 50, atol=0.02)


def test_indices_are_uniform_and_equal_one_call_after_another():
    indices = resample_indices(7, 3000, seed=1)
    assert indices.shape == (3000, 7)
    np.testing.assert_allclose(np.bincount(indices.ravel()) / indices.size, 1 / 7, atol=0.015)
    generator = np.random.default_rng(1)
    one_by_one = [generator.integers(0, 7, 7) for _ in range(3000)]
    np.testing.assert_array_equal(indices, one_by_one)


@pytest.mark.parametrize("sample", [resample_counts, resample_indices])
def test_a_seed_decides_the_resamples(sample):
    one, same, other = (sample(9, 20, seed) for seed in ([0, 1], [0, 1], [0, 2]))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_the_interval_is_the_quantiles_of_the_last_axis():
    values = np.random.default_rng(0).permuted(np.arange(2 * 1001.0).reshape(2, 1001), axis=1)
    np.testing.assert_allclose(percentile_interval(values), [[25, 1026], [975, 1976]])
    np.testing.assert_allclose(percentile_interval(values[0], coverage=0.5), [250, 750])


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    generator, covered = np.random.default_rng(8), 0
    for trial in range(400):
        sample = generator.normal(2, 3, 60)
        low, high = percentile_interval(resample_counts(60, 400, seed=trial) @ sample / 60)
        covered += low <= 2 <= high
    # 0.95, a little less for 60 values; a standard error of 0.011.
    assert 0.91 <= covered / 400 <= 0.98
