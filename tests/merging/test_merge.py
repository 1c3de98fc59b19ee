"""Checkpoints on disk: every tensor is the right donor's, for every family."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from coded import arrays_of, assert_equal, expected, load, logits, merged, virtual
from conftest import changed, resolved, write_donor

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.families import FAMILIES
from frankenmerge.storage.safetensors_header import read_header


def blocks(text: str) -> list[tuple[str, int]]:
    """`a0:3 c1` as (donor, index) pairs."""
    pairs = []
    for donor, start, stop in re.findall(r"([a-z]+)(\d+)(?::(\d+))?", text):
        pairs += [(donor, index) for index in range(int(start), int(stop or int(start) + 1))]
    return pairs


def test_no_two_tensors_of_the_encoded_donors_are_equal(coded):
    values = [array.flat[0] for folder in coded.values() for array in arrays_of(folder).values()]
    assert len(set(values)) == len(values) and all(
        (array == array.flat[0]).all() for array in arrays_of(coded["a"]).values()
    )


@pytest.mark.parametrize(
    "order, head",
    [
        pytest.param("a0:4", "lm_head.weight", id="one donor whole"),
        pytest.param("a0:3 c1:4", "lm_head.weight", id="more blocks"),
        pytest.param("a0:1 c3:4", "lm_head.weight", id="fewer blocks"),
        pytest.param("c2", "lm_head.weight", id="one block"),
        pytest.param("a0 c1 a2 c3 a1 c0", "lm_head.weight", id="interleaved"),
        pytest.param("a0:2 a1 a1 a2:4", "lm_head.weight", id="one block thrice"),
        pytest.param("a0:3 a1:4", "lm_head.weight", id="with itself"),
        pytest.param("a3 a2 a1 a0", "lm_head.weight", id="backwards"),
        pytest.param("a0:2 deep2:6", "lm_head.weight", id="ends in a deeper donor"),
        pytest.param("deep0:5 c3", "lm_head.weight", id="begins in a deeper donor"),
        pytest.param("a0 c1 deep5 b0 a3", "lm_head.weight", id="four donors"),
        pytest.param("a0:2 b2:4", "model.embed_tokens.weight", id="untied then tied"),
        pytest.param("b0:2 a2:4", "lm_head.weight", id="tied then untied"),
        pytest.param("b0:2 t2:4", "model.embed_tokens.weight", id="tied then tied"),
        pytest.param("b0:2 b1:4", None, id="tied with itself"),
        pytest.param("b0 a1 b2", None, id="an untied one inside a tied one"),
        pytest.param("a0 b1 a2", "lm_head.weight", id="a tied one inside an untied one"),
        pytest.param("g0:3 h1:4", "transformer.wte.weight", id="gpt2"),
        pytest.param("h0:3 h1:4", None, id="gpt2 with itself"),
    ],
)
def test_every_tensor_is_the_right_donors(coded, tmp_path, order, head):
    order = [(coded[name], index) for name, index in blocks(order)]
    result = merged(order, tmp_path / "out")
    found = arrays_of(tmp_path / "out")
    assert_equal(found, expected(order, head))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        config.get("num_hidden_layers") or config.get("n_layer"),
        config["tie_word_embeddings"],
    ) == (len(order), head is None)
    assert (result.tensors, result.bytes) == (
        len(found),
        sum(array.nbytes for array in found.values()),
    )


def test_the_base_gives_the_config_and_no_tensor(coded, donors, tmp_path):
    base = changed(
        coded["deep"],
        tmp_path / "base",
        config=lambda config: config | {"rms_norm_eps": 1e-5, "vocab_size": 48, "mark": "base"},
    )
    order = [(coded["a"], 0), (coded["c"], 1)]
    merged(order, tmp_path / "out", fields={"base_model": str(base)})
    assert_equal(arrays_of(tmp_path / "out"), expected(order, "lm_head.weight"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mark"], config["rms_norm_eps"], config["num_hidden_layers"]) == (
        "base",
        1e-5,
        2,
    )


def test_the_vocabulary_is_that_of_the_embedding_and_not_of_the_base(donors, tmp_path):
    base = write_donor(tmp_path / "base", seed=9, vocab_size=60)
    merged(
        [(donors["a"], 0), (donors["a"], 3)],
        tmp_path / "out",
        fields={"base_model": str(base), "tokenizer_source": str(donors["a"])},
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 48
    load(tmp_path / "out")


def test_a_tied_donor_that_stores_a_head_gives_its_embedding(coded, tmp_path):
    stored = changed(
        coded["b"],
        tmp_path / "stored",
        lambda all: all | {"lm_head.weight": np.full((48, 16), -1, np.float32)},
    )
    order = [(coded["a"], 0), (stored, 1)]
    merged(order, tmp_path / "out")
    assert_equal(arrays_of(tmp_path / "out"), expected(order, "model.embed_tokens.weight"))


def test_a_gpt2_config_that_does_not_speak_of_tying_is_tied(coded, tmp_path):
    silent = changed(
        coded["g"],
        tmp_path / "silent",
        config=lambda config: {key: config[key] for key in config if key != "tie_word_embeddings"},
    )
    merged([(silent, 0), (silent, 1)], tmp_path / "out")
    assert "lm_head.weight" not in arrays_of(tmp_path / "out")


def test_two_names_of_one_donor_make_the_same_tensors(coded, tmp_path):
    again = coded["b"].parent / "." / ".." / coded["b"].parent.name / "b"
    order = [(coded["b"], 0), (again, 1)]
    merged(order, tmp_path / "out")
    found = arrays_of(tmp_path / "out")
    assert_equal(
        {name: array for name, array in found.items() if name != "lm_head.weight"},
        expected(order, None),
    )


# Every family


def bare(folder: Path, target: Path) -> Path:
    """An old GPT-2 checkpoint: names without their prefix, and the buffers of its time."""

    def old(arrays):
        masks = {
            f"h.{block}.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.float32))
            for block in range(4)
        }
        return {name.removeprefix("transformer."): array for name, array in arrays.items()} | masks

    return changed(folder, target, old)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_result_of_every_family_is_what_the_splice_in_memory_computes(tmp_path, family):
    pair = [write_donor(tmp_path / str(seed), family, seed=seed) for seed in (1, 2)]
    order = [
        (pair[number], index) for number, index in ((0, 0), (0, 1), (1, 1), (1, 1), (0, 3), (1, 3))
    ]
    merged(order, tmp_path / "out")
    heads = (
        "lm_head.weight",
        "embed_out.weight",
        "model.embed_tokens.weight",
        "transformer.wte.weight",
    )
    head = next(name for name in heads if name in arrays_of(pair[1]))
    assert_equal(arrays_of(tmp_path / "out"), expected(order, head))
    model = load(tmp_path / "out")
    assert torch.equal(logits(model), logits(virtual(order)))
    assert (
        len({tuple(logits(load(path))[0, -1, :3].tolist()) for path in (*pair, tmp_path / "out")})
        == 3
    )


@pytest.mark.parametrize("first, last", [("a", "b"), ("b", "a"), ("b", "b"), ("a", "deep")])
def test_a_result_of_tied_and_untied_donors_is_what_the_splice_in_memory_computes(
    donors, tmp_path, first, last
):
    order = [(donors[first], 0), (donors[first], 1), (donors[last], 1), (donors[last], 3)]
    merged(order, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(virtual(order)))


@pytest.mark.parametrize("old_first", [True, False])
def test_old_names_of_gpt2_are_merged_with_new_ones(donors, tmp_path, old_first):
    new = [(donors["g"], 0), (donors["g"], 2), (donors["h"], 1), (donors["h"], 3)]
    replaced = donors["g" if old_first else "h"]
    old = bare(replaced, tmp_path / "old")
    order = [(old if folder == replaced else folder, index) for folder, index in new]
    merged(order, tmp_path / "out")
    assert_equal(arrays_of(tmp_path / "out"), expected(new, "transformer.wte.weight"))
    assert torch.equal(logits(load(tmp_path / "out")), logits(virtual(new)))
    assert torch.equal(logits(virtual(order)), logits(virtual(new)))


def test_kinds_of_attention_move_with_their_blocks(tmp_path):
    kinds = {
        "x": ["full_attention", "sliding_attention"] * 2,
        "y": ["sliding_attention"] * 2 + ["full_attention"] * 2,
    }
    pair = {
        name: write_donor(
            tmp_path / name,
            "qwen2",
            seed=seed,
            use_sliding_window=True,
            sliding_window=2,
            layer_types=kinds[name],
        )
        for seed, name in enumerate(kinds)
    }
    order = [(pair[name], index) for name, index in blocks("x0:2 y1:4")]
    merged(order, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "full_attention",
    ]
    assert torch.equal(logits(load(tmp_path / "out")), logits(virtual(order)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_copied_as_they_are(tmp_path, dtype):
    donor = write_donor(tmp_path / "donor", seed=1, dtype=dtype)
    merged([(donor, 0), (donor, 3), (donor, 2)], tmp_path / "out", fields={"dtype": dtype})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype
    theirs, ours = (
        read_header(folder / "model.safetensors") for folder in (donor, tmp_path / "out")
    )
    content = {
        folder: (folder / "model.safetensors").read_bytes() for folder in (donor, tmp_path / "out")
    }
    for position, index in enumerate((0, 3, 2)):
        for name in (name for name in theirs if f"layers.{index}." in name):
            a, b = theirs[name], ours[name.replace(f"layers.{index}.", f"layers.{position}.")]
            assert (a.dtype, a.shape, content[donor][a.start : a.stop]) == (
                b.dtype,
                b.shape,
                content[tmp_path / "out"][b.start : b.stop],
            )
    assert {parameter.dtype for parameter in load(tmp_path / "out").parameters()} == {
        getattr(torch, dtype)
    }


# The operations


def test_the_operations_name_each_tensors_origin_in_layer_order(coded):
    a, b = (str(coded[name]) for name in "ab")
    recipe = recipe_of([Block(a, 3), Block(b, 0)])
    copies = resolved(recipe).operations
    origins = [
        (copy.name, copy.donor, copy.source)
        for copy in copies
        if "layers" not in copy.name or "norm" in copy.name
    ]
    assert origins == [
        ("model.embed_tokens.weight", a, "model.embed_tokens.weight"),
        ("model.layers.0.input_layernorm.weight", a, "model.layers.3.input_layernorm.weight"),
        (
            "model.layers.0.post_attention_layernorm.weight",
            a,
            "model.layers.3.post_attention_layernorm.weight",
        ),
        ("model.layers.1.input_layernorm.weight", b, "model.layers.0.input_layernorm.weight"),
        (
            "model.layers.1.post_attention_layernorm.weight",
            b,
            "model.layers.0.post_attention_layernorm.weight",
        ),
        ("model.norm.weight", b, "model.norm.weight"),
        ("lm_head.weight", b, "model.embed_tokens.weight"),
    ]
