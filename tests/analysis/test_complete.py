"""Complete search, held against one token at a time through transformers' own forward pass."""

import numpy as np
import pytest
import torch
from conftest import write_donor
from hypothesis import given
from hypothesis import strategies as st

from frankenmerge.analysis import complete, ranking
from frankenmerge.analysis.complete import complete_search
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.hooks import blocks_of
from frankenmerge.models.loading import Placement, load_model

FAMILIES = {
    "llama": "norm",
    "qwen2": "norm",
    "phi3": "norm",
    "olmo2": "norm",
    "gpt2": "ln_f",
    "gpt_neox": "final_layer_norm",
}
"""What each family calls its final norm, which reads the last block's output."""


def loaded(path):
    return load_model(open_checkpoint(str(path)))


@torch.no_grad()
def activations_of(model, prefix=()) -> np.ndarray:
    """The residual stream at the last position, `[l+1, v, d]`, each token in its own full pass."""
    final = model.base_model.get_submodule(FAMILIES[model.config.model_type])
    last = []
    handle = final.register_forward_pre_hook(lambda _module, args: last.append(args[0]))
    rows = []
    for token in range(model.config.vocab_size):
        hidden = model(
            input_ids=torch.tensor([[*prefix, token]]), output_hidden_states=True
        ).hidden_states[:-1]
        rows.append(torch.stack([state[0, -1] for state in (*hidden, last.pop())]))
    handle.remove()
    return torch.stack(rows, dim=1).numpy()


def assert_best(found, activations, k) -> None:
    """Compare `found` with a sort of all activations, up to the rounding of a batched product."""
    blocks, vocabulary, width = activations.shape
    assert found.tokens.shape == found.values.shape == (blocks, width, min(k, vocabulary))
    assert (found.tokens.dtype, found.values.dtype) == (np.int32, np.float32)
    by_feature = activations.transpose(0, 2, 1)
    expected = -np.sort(-by_feature, axis=2)[:, :, :k]
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        np.take_along_axis(by_feature, found.tokens.astype(int), axis=2),
        expected,
        rtol=1e-4,
        atol=1e-5,
    )
    assert all(
        len(set(tokens)) == len(tokens)
        for tokens in found.tokens.reshape(-1, found.tokens.shape[2]).tolist()
    )


@pytest.mark.parametrize("prefix", [(), (0,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_finds_what_one_token_at_a_time_finds(tmp_path, family, prefix):
    model = loaded(write_donor(tmp_path / "donor", family, seed=11))
    found = complete_search(model, k=7, prefix=prefix)
    activations = activations_of(model, prefix)
    assert_best(found, activations, 7)
    gaps = np.diff(-np.sort(-activations, axis=1)[:, :8].transpose(0, 2, 1), axis=2)
    clear = (gaps < -1e-4).all(
        axis=2
    )  # where no two are close, not even the last with the first left out
    assert clear.mean() > 0.8
    order = np.argsort(-activations, axis=1)[:, :7].transpose(0, 2, 1)
    np.testing.assert_array_equal(found.tokens[clear], order[clear])


@pytest.mark.parametrize("batch", [1, 5, 47, 48])
def test_the_batch_changes_nothing(donors, monkeypatch, batch):
    model = loaded(donors["a"])
    activations = activations_of(model, (5, 9))
    monkeypatch.setattr(complete, "BATCH", batch)
    assert_best(complete_search(model, k=10, prefix=(5, 9)), activations, 10)


@pytest.mark.parametrize("batch", [3, 1024])
@pytest.mark.parametrize("k", [1, 47, 500])
def test_it_keeps_no_more_tokens_than_there_are(donors, monkeypatch, k, batch):
    model = loaded(donors["g"])
    monkeypatch.setattr(complete, "BATCH", batch)
    found = complete_search(model, k=k)
    assert_best(found, activations_of(model), k)
    if k >= 48:
        assert (np.sort(found.tokens, axis=2) == np.arange(48)).all()


def silent(path):
    """A model whose blocks write nothing: every block's output is exactly the embedding."""
    model = loaded(path)
    with torch.no_grad():
        for block in blocks_of(model):
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize("batch", [1, 4, 7, 1024])
def test_of_equal_activations_the_lowest_id_wins(donors, monkeypatch, batch):
    model = silent(donors["a"])
    monkeypatch.setattr(complete, "BATCH", batch)
    embedding = model.get_input_embeddings().weight.data
    embedding.copy_(
        torch.randint(-1, 2, embedding.shape, generator=torch.Generator().manual_seed(0)).float()
    )
    embedding[[40, 3, 22]] = 2.0
    found = complete_search(model, k=10)
    matrix = embedding.numpy()
    for neuron in range(16):
        expected = sorted(
            range(48), key=lambda token, neuron=neuron: (-matrix[token, neuron], token)
        )[:10]
        assert expected[:3] == [3, 22, 40]
        assert (found.tokens[:, neuron] == expected).all()
        assert (found.values[:, neuron] == matrix[expected, neuron]).all()


@pytest.mark.parametrize("batch", [1, 1024])
def test_tokens_with_the_same_embedding_are_found_lowest_id_first(donors, monkeypatch, batch):
    model = loaded(donors["a"])
    monkeypatch.setattr(complete, "BATCH", batch)
    embedding = model.get_input_embeddings().weight.data
    embedding[[29, 4, 17]] = embedding[4].clone()
    found = complete_search(model, k=48)
    for block in (0, 1, 2, 3, 4):
        for tokens in found.tokens[block]:
            places = [int(np.flatnonzero(tokens == token)[0]) for token in (4, 17, 29)]
            assert places == list(range(places[0], places[0] + 3))


@pytest.mark.parametrize("batch", [1, 1024])
def test_the_two_zeros_are_equal(donors, monkeypatch, batch):
    model = silent(donors["a"])
    monkeypatch.setattr(complete, "BATCH", batch)
    embedding = model.get_input_embeddings().weight.data.fill_(-1.0)
    embedding[9], embedding[20], embedding[31] = -0.0, 0.0, -0.0
    found = complete_search(model, k=4)
    assert (found.tokens == [9, 20, 31, 0]).all()
    assert (found.values == [0.0, 0.0, 0.0, -1.0]).all()


def test_negative_activations_are_ordered_as_numbers(donors):
    model = silent(donors["a"])
    embedding = model.get_input_embeddings().weight.data
    embedding.copy_((-torch.arange(1.0, 49.0) * 1e-3)[:, None].expand_as(embedding))
    found = complete_search(model, k=48)
    assert (found.tokens == np.arange(48)).all()
    assert (found.values == embedding.numpy()[:, 0]).all()


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0]),
        min_size=1,
        max_size=40,
    )
)
def test_packed_keys_sort_as_numbers_then_ids_and_unpack(values):
    tokens = torch.arange(100, 100 + len(values))
    keys = ranking.pack(torch.tensor(values, dtype=torch.float32)[None], tokens, "here")
    ids, activations = ranking.unpack(keys.sort(dim=1, descending=True).values)
    expected = sorted(
        zip(values, tokens.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1])
    )
    assert list(zip(activations[0].tolist(), ids[0].tolist(), strict=True)) == expected


def test_the_largest_token_ids_and_numbers_survive_packing():
    extremes = [3.4028234663852886e38, -3.4028234663852886e38, 1e-45, -1e-45]
    tokens = torch.tensor([0, 2**31 - 1, 262_143, 1])
    ids, activations = ranking.unpack(ranking.pack(torch.tensor(extremes)[None], tokens, "here"))
    assert (ids[0].tolist(), activations[0].tolist()) == (
        tokens.tolist(),
        torch.tensor(extremes).tolist(),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("block", [1, 3])
def test_activations_that_are_no_numbers_are_refused_with_their_block(donors, block, value):
    model = loaded(donors["g"])
    blocks_of(model)[block - 1].mlp.c_proj.bias.data[3] = value
    with pytest.raises(FrankenmergeError) as refused:
        complete_search(model)
    assert [fault.place for fault in refused.value.faults] == [f"block {block}"]


def test_an_embedding_that_is_no_number_is_block_0(donors):
    model = loaded(donors["a"])
    model.get_input_embeddings().weight.data[47, 0] = torch.nan
    with pytest.raises(FrankenmergeError, match="block 0"):
        complete_search(model)


def test_it_takes_every_token_through_every_block_once(donors, monkeypatch):
    monkeypatch.setattr(complete, "BATCH", 20)
    done = []
    complete_search(loaded(donors["a"]), advance=done.append)
    assert done == [20, 20, 8] * 4


def test_the_model_is_free_of_hooks_afterwards(donors):
    model = loaded(donors["a"])
    complete_search(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_half_precision_is_searched_in_its_own_numbers(donors):
    model = load_model(open_checkpoint(str(donors["a"])), Placement("bfloat16"))
    found = complete_search(model, k=1)
    top = model.get_input_embeddings().weight.float().max(dim=0)
    assert (found.values[0, :, 0] == top.values.detach().numpy()).all()


def test_the_command_line_shows_the_tokens_found(donors, run, tmp_path):
    code, out, _ = run("analyze", donors["a"], "-o", tmp_path / "a.atlas.safetensors")
    best = activations_of(loaded(donors["a"]))[0, :, 0].argsort()[::-1][:3]
    letters = "\0abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert code == 0
    assert " ".join(repr(letters[token]) for token in best) in out


@torch.no_grad()
def outputs(model, site="block", isolated=False):
    """`[l, v, d]`: every block's output for every token, by calling the modules one by one."""
    caught = []
    inner, found = model.model, []
    tokens = torch.arange(48)[:, None]
    embedded = inner.embed_tokens(tokens)
    places = inner.rotary_emb(embedded, torch.zeros(48, 1, dtype=torch.long))
    for block in inner.layers:
        handle = block.self_attn.register_forward_hook(
            lambda _module, _args, output: caught.append(output[0])
        )
        state = block(embedded if isolated or not found else found[-1], position_embeddings=places)
        handle.remove()
        found.append(state)
    return torch.stack(caught if site == "attention" else found)[:, :, -1]


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("site", ["block", "attention"])
def test_other_sites_and_isolated_blocks_against_the_modules_themselves(donors, site, isolated):
    model = loaded(donors["a"])
    found = complete_search(model, k=1, site=site, isolated=isolated)
    expected = outputs(model, site, isolated)
    np.testing.assert_allclose(
        found.values[1:, :, 0], expected.amax(dim=1).numpy(), rtol=1e-4, atol=1e-5
    )


def test_the_bottom_is_the_top_upside_down(donors):
    model = loaded(donors["a"])
    every = complete_search(model, k=48)
    bottom = complete_search(model, k=48, bottom=True)
    np.testing.assert_array_equal(bottom.values, every.values[:, :, ::-1])


def test_masked_tokens_are_not_found_and_the_others_keep_their_order(donors):
    model = loaded(donors["a"])
    every, kept = complete_search(model, k=48), complete_search(model, k=48, masked=[0, 7, 47])
    assert kept.tokens.shape[2] == 45
    for block, neuron in np.ndindex(every.tokens.shape[:2]):
        assert kept.tokens[block, neuron].tolist() == [
            token for token in every.tokens[block, neuron].tolist() if token not in (0, 7, 47)
        ]
