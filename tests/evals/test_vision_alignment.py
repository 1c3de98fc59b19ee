"""The comparison of language with vision, on a case that is known."""

import numpy as np
import pytest
from vision_alignment import depths, layers, markdown, row_of

from frankenmerge.artefacts.alignment import Score
from frankenmerge.artefacts.atlas import Atlas


def atlas(blocks: int) -> Atlas:
    probes = np.zeros((blocks + 1, 3, 2), np.float16)
    return Atlas("a", "f", {}, probes, np.ones((blocks + 1, 2), np.float32), [])


def test_blocks_that_are_compared():
    assert layers(atlas(3)) == [(1, 2), (1, 3), (2, 3)]
    assert layers(atlas(3), 1) == [(1, 2), (2, 3)]
    assert depths(atlas(8), atlas(4)) == [(2, 1), (4, 2), (6, 3), (8, 4)]


def test_a_row_is_the_mean_over_pairs_and_neurons():
    detail = np.zeros((3, 3, 4), np.float16)
    detail[1, 2] = [1, 0, 1, 1]
    null = np.full((3, 3), 0.25, np.float32)
    score = Score(detail.mean(axis=2), {"permuted_neurons": null}, detail)
    row = row_of("language", "blocks", "argmax", score, [(1, 2)])
    assert (row.value, row.permuted, row.law) == (0.75, 0.25, None)
    assert row.low < 0.75 < row.high <= 1
    half = row_of("vision", "blocks", "argmax", score, [(1, 2), (2, 1)])
    assert half.value == pytest.approx(0.375)
    assert "| blocks | argmax | 0.75 (" in markdown([row, half])
