"""Agreement of tokens, held against loops over every pair."""

import numpy as np
import pytest

from frankenmerge.artefacts.token_overlap import token_agreement


@pytest.mark.parametrize("places", [(1, 1), (3, 2)])
@pytest.mark.parametrize(("m", "n"), [(2, 1), (5, 1), (7, 4)])
def test_it_is_the_mean_over_pairs_of_neurons(places, m, n):
    generator = np.random.default_rng(m)
    a, b = (generator.integers(0, 6, size=(count, m, n), dtype=np.int32) for count in places)
    found = token_agreement(a, b)
    assert (found.detail.dtype, found.permuted.dtype, found.matrix.dtype) == (np.float32,) * 3
    for i, j in np.ndindex(places):
        pairs = [
            [sum(x == y for x, y in zip(a[i, f], b[j, g], strict=True)) / n for g in range(m)]
            for f in range(m)
        ]
        same = [pairs[f][f] for f in range(m)]
        others = [pairs[f][g] for f in range(m) for g in range(m) if f != g]
        assert found.detail[i, j].tolist() == pytest.approx(same)
        assert found.matrix[i, j] == pytest.approx(sum(same) / m)
        assert found.permuted[i, j] == pytest.approx(sum(others) / len(others))


def test_the_same_tokens_agree_wholly_and_distinct_ones_not_at_all():
    tokens = np.arange(12).reshape(1, 4, 3)
    own, other = token_agreement(tokens, tokens), token_agreement(tokens, tokens + 12)
    assert (own.matrix.item(), own.permuted.item()) == (1, 0)
    assert (other.matrix.item(), other.permuted.item()) == (0, 0)


def test_the_same_token_at_another_position_is_no_agreement():
    found = token_agreement(np.array([[[1, 2], [3, 4]]]), np.array([[[2, 1], [2, 1]]]))
    assert (found.matrix.item(), found.permuted.item()) == (0, 0)


def test_a_single_neuron_has_no_other_to_be_permuted_with():
    found = token_agreement(np.array([[[1, 2]]]), np.array([[[1, 3]]]))
    assert found.matrix.item() == 0.5 and np.isnan(found.permuted.item())
