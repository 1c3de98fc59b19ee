import pytest
import torch
from conftest import write_donor

from frankenmerge.analysis.inversion import invert, outputs_of, recall
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model

TRUE = torch.randint(48, (16, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tmp_path_factory):
    folder = write_donor(
        tmp_path_factory.mktemp("inversion") / request.param, request.param, seed=3
    )
    return load_model(open_checkpoint(str(folder)))


@pytest.mark.parametrize("loss", ["l1", "cosine"])
@pytest.mark.parametrize(("block", "least"), [(0, 1.0), (1, 0.5)])
def test_tokens_are_recovered(model, block, least, loss):
    found = invert(model, outputs_of(model, TRUE, block), block, loss=loss)
    reachable = torch.isin(TRUE, torch.tensor(found.excluded)).logical_not()
    assert (found.tokens == TRUE)[reachable].double().mean() >= least
    assert (found.losses[-1] < 0.2 * found.losses[0]).all()
    assert found.losses.shape == (301, 16)


def test_a_row_is_inverted_as_it_would_be_alone(model):
    outputs = outputs_of(model, TRUE, 2)
    together, alone = invert(model, outputs, 2, steps=5), invert(model, outputs[3:4], 2, steps=5)
    torch.testing.assert_close(together.embeddings[3:4], alone.embeddings, rtol=1e-3, atol=1e-4)


def test_the_seed_decides_and_the_model_is_left_as_it_was(model):
    outputs = outputs_of(model, TRUE, 1)
    first, again, other = (invert(model, outputs, 1, steps=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.embeddings, again.embeddings)
    assert not torch.equal(first.embeddings, other.embeddings)
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )


def test_recall_is_told_for_every_position():
    found, true = torch.tensor([[1, 2, 3], [1, 5, 3]]), torch.tensor([[1, 2, 0], [1, 2, 0]])
    assert recall(found, true).tolist() == [1.0, 0.5, 0.0]


def test_what_cannot_be_is_told(model):
    with pytest.raises(FrankenmergeError, match="0 to 4"):
        invert(model, outputs_of(model, TRUE, 1), 5)
    with pytest.raises(FrankenmergeError, match="n, s, 16"):
        invert(model, torch.zeros(1, 3, 8), 1)
