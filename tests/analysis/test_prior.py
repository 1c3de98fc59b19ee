import pytest
import torch
from conftest import write_donor

from frankenmerge.analysis.complete import complete_search
from frankenmerge.analysis.features import Feature, parse_features
from frankenmerge.analysis.prior import prior_search
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model

NEURONS = parse_features("[:, :, 0-15]", 1, 16)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tmp_path_factory):
    folder = write_donor(tmp_path_factory.mktemp("prior") / request.param, request.param, seed=3)
    return load_model(open_checkpoint(str(folder)))


def test_it_ends_at_tokens_that_excite_their_neuron(model):
    found = prior_search(model, NEURONS, tokens=1)
    assert found.tokens.shape == found.gap.shape == (16, 1)
    assert found.gap.max() < 0.01
    every = complete_search(model, k=48)
    ranks = [
        every.tokens[1, neuron].tolist().index(token)
        for neuron, (token,) in enumerate(found.tokens.tolist())
    ]
    assert sum(ranks) / len(ranks) < 12  # 23.5 by chance


def test_without_temperature_the_weights_stay_flat(model):
    """As in the source document: the softmax of weights within [0, 1] over the vocabulary."""
    found = prior_search(model, NEURONS, tokens=2, temperatures=(1.0, 1.0), step=1.0)
    assert found.gap.min() > 0.9


def test_batches_and_runs_agree(model):
    features = [*NEURONS[:3], Feature(3, range(4), range(1, 2)), Feature(2, range(5, 6))]
    first, again, alone = (
        prior_search(model, features, tokens=3, steps=3, batch=size) for size in (64, 64, 1)
    )
    assert torch.equal(first.losses, again.losses) and torch.equal(first.tokens, again.tokens)
    torch.testing.assert_close(first.losses, alone.losses, rtol=1e-4, atol=1e-4)
    assert first.losses.shape == (3, 5)


def test_positions_that_nothing_asks_about_stay_uniform(model):
    found = prior_search(model, [Feature(2, range(1), range(0, 1))], tokens=3, steps=20)
    assert found.gap[0, 0] < 0.1
    torch.testing.assert_close(found.gap[0, 1:], torch.full((2,), 1 - 1 / 48))


def test_the_model_is_left_as_it_was(model):
    prior_search(model, NEURONS[:1], steps=2)
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )


def test_what_cannot_be_is_told(model):
    with pytest.raises(FrankenmergeError, match="within 0 to 15"):
        prior_search(model, [Feature(1, range(16, 17))])
    with pytest.raises(FrankenmergeError, match="1 to 64"):
        prior_search(model, NEURONS, tokens=65)
