"""docs/determinism.md, clause by clause: each test fails where its clause is broken."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, write_donor

from frankenmerge.analysis import complete, greedy
from frankenmerge.analysis.analyze import analyze
from frankenmerge.analysis.complete import Ranked, complete_search
from frankenmerge.analysis.decode import decoder_of
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.analysis.greedy import greedy_search
from frankenmerge.analysis.ranking import top_tokens
from frankenmerge.artefacts.atlas import save_atlas
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.hooks import embedding_of
from frankenmerge.models.loading import Placement, load_model
from frankenmerge.models.passes import Passage
from frankenmerge.models.streaming import each_block, stream_model

FEATURES = [Feature.of(block, neuron) for block in (0, 1, 3, 4) for neuron in (0, 5, 11)]
DEMO = Path(__file__).resolve().parents[2] / "frankenmerge" / "demo" / "donors"


def loaded(path, dtype="float32"):
    return load_model(open_checkpoint(str(path)), Placement(dtype))


def test_every_clause_has_a_test_of_its_name():
    text = (Path(__file__).parents[2] / "docs" / "determinism.md").read_text(encoding="utf-8")
    clauses = [name.lower() for name in re.findall(r"^\d+\. \*\*(\w+)\.\*\*", text, re.MULTILINE)]
    assert len(clauses) == 8
    assert all(any(name.startswith(f"test_{clause}") for name in globals()) for clause in clauses)


@pytest.mark.parametrize("batch", [16, 1024])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ties_go_to_the_lowest_id(tmp_path, monkeypatch, family, batch):
    model = loaded(write_donor(tmp_path / "donor", family, seed=21))
    with torch.no_grad():
        embedding_of(model)[:] = embedding_of(model)[torch.arange(VOCABULARY) % 12]
    for module in (complete, greedy):
        monkeypatch.setattr(module, "BATCH", batch)
    top = complete_search(model, k=8).tokens
    for tokens in top.reshape(
        -1, 8
    ).tolist():  # four tokens share each embedding: two groups of four, each in ascending order
        groups = [tokens[:4], tokens[4:]]
        assert all(
            group == [group[0] + 12 * step for step in range(4)] and group[0] < 12
            for group in groups
        )
    assert greedy_search(model, FEATURES, n=3).tokens.max() < 12
    assert greedy_search(model, FEATURES, n=2, beam=3).tokens[:, 0].max() < 12
    decoder = decoder_of(embedding_of(model).detach(), excluded=None)
    assert decoder(embedding_of(model).detach()).max() < 12


def test_type_of_the_comparison_is_float32(tmp_path):
    """Of two tokens that half precision cannot separate, the greater wins despite its higher id."""
    model = loaded(write_donor(tmp_path / "donor", seed=22))
    with torch.no_grad():
        embedding_of(model)[:] = embedding_of(model).clamp(-1, 1)
        embedding_of(model)[3], embedding_of(model)[40] = 2.0, 2.0 + 2**-20
    found = complete_search(model, k=2)
    assert found.values.dtype == np.float32
    assert (found.tokens[0] == [40, 3]).all() and (
        found.values[0] == np.float32([2.0 + 2**-20, 2.0])
    ).all()
    result = greedy_search(model, [Feature.of(0, 2)], n=2, positions="all")
    assert result.tokens.tolist() == [[40, 40]] and result.values.dtype == np.float32
    half = complete_search(model.bfloat16(), k=2)
    assert half.values.dtype == np.float32
    assert (half.tokens[0] == [3, 40]).all() and (half.values[0] == 2.0).all()


def searched(model, monkeypatch, batch, prefix):
    for module in (complete, greedy):
        monkeypatch.setattr(module, "BATCH", batch)
    top = complete_search(model, prefix=prefix)
    width = embedding_of(model).shape[1]
    features = [
        Feature.of(block, neuron) for block in (1, 4) for neuron in range(0, width, width // 4)
    ]
    inputs = greedy_search(model, features, n=2, start=prefix)
    return top.tokens, top.values, inputs.tokens, inputs.values


@pytest.mark.parametrize("prefix", [(), (0,)])
@pytest.mark.parametrize("donor", ["llama", "gpt2", "demo"])
def test_batches_change_nothing(tmp_path, monkeypatch, donor, prefix):
    model = loaded(
        DEMO / "base"
        if donor == "demo"
        else write_donor(tmp_path / "donor", donor, seed=23, vocab_size=83)
    )
    sizes = (
        (1024, 512, 208) if donor == "demo" else (1024, 48, 32, 16)
    )  # some with a rest, some without
    first, *others = (searched(model, monkeypatch, size, prefix) for size in sizes)
    for other in others:
        for array, twin in zip(first, other, strict=True):
            np.testing.assert_array_equal(array, twin)


def test_batches_of_the_gradient_search_change_no_more_than_rounding(donors):
    model = loaded(donors["a"])
    one, other = (
        gradient_search(model, FEATURES, tokens=3, steps=5, batch=size) for size in (64, 5)
    )
    torch.testing.assert_close(one.embeddings, other.embeddings, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [(), (0,), (0, 9, 9)])
def test_positions_are_counted_after_the_prefix(tmp_path, prefix):
    """The input of GPT-2's first block is token plus position embedding, in closed form."""
    model = loaded(write_donor(tmp_path / "donor", "gpt2", seed=24))
    embedding, learned = (
        model.transformer.wte.weight.detach(),
        model.transformer.wpe.weight.detach(),
    )
    here = embedding + learned[len(prefix)]
    found = complete_search(model, k=1, prefix=prefix)
    np.testing.assert_array_equal(found.values[0, :, 0], here.max(dim=0).values.numpy())
    features = [Feature.of(0, neuron) for neuron in range(16)]
    result = greedy_search(model, features, n=3, start=prefix)
    for step in range(3):
        best = (embedding + learned[len(prefix) + step]).max(dim=0)
        np.testing.assert_array_equal(result.values[:, step], best.values.numpy())
    assert (
        result.tokens[:, 0].tolist()
        == here.argmax(dim=0).tolist()
        == found.tokens[0, :, 0].tolist()
    )


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_positions_are_those_of_the_librarys_own_pass(tmp_path, family):
    model = loaded(write_donor(tmp_path / "donor", family, seed=25))
    found = complete_search(model, k=1, prefix=(0, 7))
    tokens = torch.arange(VOCABULARY)
    inputs = torch.stack([torch.zeros_like(tokens), torch.full_like(tokens, 7), tokens], dim=1)
    own = model(
        input_ids=inputs, position_ids=torch.arange(3)[None], output_hidden_states=True
    ).hidden_states[3][:, -1]
    np.testing.assert_allclose(
        found.values[3, :, 0], own.max(dim=0).values.numpy(), rtol=1e-4, atol=1e-5
    )


def test_positions_are_added_after_the_embeddings_of_a_gradient_search(tmp_path):
    """The initial loss is that of the start's tokens at positions 0, 1, 2, in closed form."""
    model = loaded(write_donor(tmp_path / "donor", "gpt2", seed=26))
    result = gradient_search(model, [Feature.of(0, 4)], start=[5, 6, 7], steps=1, target=100.0)
    entering = model.transformer.wte.weight[[5, 6, 7]] + model.transformer.wpe.weight[:3]
    assert result.losses[0].item() == pytest.approx(0.1 * (100 - entering[:, 4]).sum().item())


def test_bos_is_separate_and_reported(donors, run, tmp_path):
    checkpoint = open_checkpoint(str(donors["a"]))
    atlas, model = analyze(checkpoint), load_model(checkpoint)
    for context, prefix in {"plain": (), "bos": (0,)}.items():
        np.testing.assert_array_equal(
            atlas.top[context].tokens, complete_search(model, prefix=prefix).tokens
        )
    assert not np.array_equal(atlas.top["plain"].tokens, atlas.top["bos"].tokens)
    for option, context, words in (((), "plain", "plain"), (("--bos",), "bos", "after BOS")):
        for method in ("complete", "greedy"):
            arguments = ("features", donors["a"], "--method", method, "--layers", "2", *option)
            assert words in run(*arguments)[1]
            record = json.loads(run(*arguments, "--json")[1])
            assert record["context"] == context
            firsts = atlas.top[context].tokens[2, :4, 0].tolist()
            assert [row["tokens"][0] for row in record["features"]] == firsts
        arguments = (
            "align",
            donors["a"],
            donors["b"],
            "-o",
            tmp_path / "x.alignment.safetensors",
            *option,
        )
        assert json.loads(run(*arguments, "--json")[1])["context"] == context
        assert ("after BOS" in " ".join(run(*arguments)[1].split())) == (context == "bos")


def test_randomness_comes_from_seeds(donors, tmp_path):
    checkpoint = open_checkpoint(str(donors["a"]))
    for seed in (None, 5):
        for number in range(2):
            torch.manual_seed(number)  # whatever was drawn before
            save_atlas(analyze(checkpoint, untrained=seed), tmp_path / f"{seed}.{number}")
        assert (tmp_path / f"{seed}.0").read_bytes() == (tmp_path / f"{seed}.1").read_bytes()
    searches = []
    for number in range(2):
        torch.manual_seed(number)
        searches.append(gradient_search(load_model(checkpoint), FEATURES, steps=2).embeddings)
    assert torch.equal(*searches)


def test_division_of_work_changes_nothing(tmp_path):
    checkpoint = open_checkpoint(str(write_donor(tmp_path / "donor", seed=27)))
    resident = load_model(checkpoint)
    for value in resident.parameters():
        value.data = value.data.clone()  # at torch's own addresses
    streamed = stream_model(checkpoint)
    whole, ours = complete_search(resident, k=5), complete_search(streamed, k=5)
    assert (whole.tokens == ours.tokens).all() and whole.values.tobytes() == ours.values.tobytes()
    tokens = complete.searched(streamed)
    parts = []
    for share in (tokens[:16], tokens[16:]):  # as two processes would share batches of 16
        ranked, passage = Ranked(share, 5), Passage(streamed, share[:, None], batch=16)
        ranked.add(passage.entering())
        for index, block in each_block(streamed):
            ranked.add(passage.through(index, block))
        parts.append(torch.stack(ranked.keys))
    joined = top_tokens(torch.cat(parts, dim=2).topk(5, dim=2).values)
    by_16 = Ranked(tokens, 5)
    passage = Passage(streamed, tokens[:, None], batch=16)
    by_16.add(passage.entering())
    for index, block in each_block(streamed):
        by_16.add(passage.through(index, block))
    assert (
        joined.tokens == by_16.top.tokens
    ).all() and joined.values.tobytes() == by_16.top.values.tobytes()


def test_single_tokens_need_no_queries_and_keys(tmp_path):
    model = loaded(write_donor(tmp_path / "donor", seed=28))
    short, full = (complete_search(model, k=5, shortcut=shortcut) for shortcut in (True, False))
    assert (short.tokens == full.tokens).all() and short.values.tobytes() == full.values.tobytes()
    fused = loaded(write_donor(tmp_path / "fused", "gpt2", seed=28))
    short, full = (complete_search(fused, k=5, shortcut=shortcut) for shortcut in (True, False))
    np.testing.assert_allclose(short.values, full.values, rtol=1e-4, atol=1e-5)
