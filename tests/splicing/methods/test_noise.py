"""The random stream: a function of the element, uniform, and independent of other streams."""

import numpy as np
import pytest

from frankenmerge.splicing.methods.inputs import BLOCK
from frankenmerge.splicing.methods.noise import SCALE, words


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 1), (3, 10), (BLOCK - 3, BLOCK + 4), (BLOCK, 2 * BLOCK), (BLOCK + 1, 3 * BLOCK - 1)],
)
def test_any_span_is_a_part_of_the_whole(start, stop):
    whole = words(7, "a", 1, 0, 3 * BLOCK)
    assert (words(7, "a", 1, start, stop) == whole[start:stop]).all()


def test_seed_tensor_model_and_block_each_change_everything():
    streams = [
        words(*key, 0, 2 * BLOCK) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))
    ]
    streams = [half for stream in streams for half in (stream[:BLOCK], stream[BLOCK:])]
    correlation = np.corrcoef(np.stack(streams).astype(np.float64))
    assert np.abs(correlation - np.eye(len(streams))).max() < 6 / np.sqrt(BLOCK)


def test_uniform_in_every_bit():
    sampled = words(3, "x", 0, 0, BLOCK)
    assert sampled.min() >= 0
    assert sampled.max() < SCALE
    shares = [((sampled >> bit) & 1).mean() for bit in range(31)]
    assert np.abs(np.array(shares) - 0.5).max() < 5 * 0.5 / np.sqrt(BLOCK)
    counts = np.bincount(sampled >> 27, minlength=16)
    assert (
        (counts - BLOCK / 16) ** 2 / (BLOCK / 16)
    ).sum() < 45  # chi-squared, 15 degrees of freedom: p = 1e-4
