"""The random probes every donor is shown, and what is recorded of them."""

import numpy as np
import pytest
import torch
from conftest import changed, write_donor

from frankenmerge.analysis.analyze import analyze
from frankenmerge.analysis.probes import probe_hash, probe_states, random_probes
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model
from frankenmerge.models.passes import Passage
from frankenmerge.models.streaming import each_block


def loaded(path):
    return load_model(open_checkpoint(str(path)))


def test_probes_are_the_same_for_the_same_vocabulary():
    assert (random_probes(512) == random_probes(512)).all()
    np.random.seed(1)
    torch.manual_seed(1)
    assert probe_hash(random_probes(512)) == probe_hash(random_probes(512))


def test_probes_are_64_lines_of_17_tokens_of_the_vocabulary():
    tokens = random_probes(48)
    assert tokens.shape == (64, 17) and tokens.dtype == np.int64
    assert set(np.unique(tokens)) == set(range(48))


@pytest.mark.parametrize("options", [{"seed": 1}, {"count": 63}, {"length": 16}])
def test_other_probes_have_another_hash(options):
    assert probe_hash(random_probes(48)) != probe_hash(random_probes(48, **options))


def test_probes_of_another_vocabulary_have_another_hash():
    assert probe_hash(random_probes(48)) != probe_hash(random_probes(49))


def test_the_same_tokens_in_another_shape_have_another_hash():
    tokens = random_probes(48)
    assert probe_hash(tokens) != probe_hash(tokens.reshape(17, 64))
    changed = tokens.copy()
    changed[3, 4] += 1
    assert probe_hash(tokens) != probe_hash(changed)


def states_of(model, tokens, batch=16) -> np.ndarray:
    """The probes' residual stream after every block, `[l+1, n, d]`."""
    passage = Passage(model, torch.from_numpy(tokens), batch=batch)
    found = [probe_states(passage.entering(), "block 0")]
    return np.stack(
        found
        + [
            probe_states(passage.through(*block), f"block {block[0]}")
            for block in each_block(model)
        ]
    )


@torch.no_grad()
@pytest.mark.parametrize("batch", [16, 1, 5])
@pytest.mark.parametrize("donor, norm", [("a", "norm"), ("g", "ln_f")])
def test_activations_are_transformers_hidden_states_without_the_first_position(
    donors, donor, norm, batch
):
    model, tokens = loaded(donors[donor]), random_probes(48)
    found = states_of(model, tokens, batch)
    assert found.shape == (5, 64 * 16, 16) and found.dtype == np.float32
    hidden = model(input_ids=torch.from_numpy(tokens), output_hidden_states=True).hidden_states
    for block in range(4):
        np.testing.assert_allclose(
            found[block].reshape(64, 16, 16), hidden[block][:, 1:].numpy(), rtol=1e-4, atol=1e-5
        )
    last = model.base_model.get_submodule(norm)(torch.from_numpy(found[4]))
    torch.testing.assert_close(last.reshape(64, 16, 16), hidden[4][:, 1:], rtol=1e-4, atol=1e-5)


def test_rows_stand_in_the_order_of_the_probes(donors):
    model, tokens = loaded(donors["a"]), random_probes(48)
    embedding = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(states_of(model, tokens)[0], embedding[tokens[:, 1:].ravel()])


def test_an_atlas_tells_its_probes(donors):
    record = analyze(open_checkpoint(str(donors["a"]))).provenance["probes"]
    assert record == {"shape": [64, 17], "sha256": probe_hash(random_probes(48)), "seed": 0}


def test_donors_of_one_vocabulary_are_shown_the_same(donors):
    a, b = (analyze(open_checkpoint(str(donors[name]))) for name in ("a", "b"))
    assert a.provenance["probes"] == b.provenance["probes"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_probes_that_give_no_numbers_are_refused(donors, tmp_path, value):
    """Single tokens are at positions 0 and 1 at most, so that only probes reach the broken one."""

    def broken(tensors):
        tensors["transformer.wpe.weight"][6, 2] = value
        return tensors

    path = changed(donors["g"], tmp_path / "broken", broken)
    with pytest.raises(FrankenmergeError, match="finite"):
        analyze(open_checkpoint(str(path)))


def test_a_donor_of_fewer_positions_than_a_probe_has_is_refused(tmp_path):
    path = write_donor(tmp_path / "donor", "gpt2", n_positions=12)
    with pytest.raises(FrankenmergeError, match="positions"):
        analyze(open_checkpoint(str(path)))
