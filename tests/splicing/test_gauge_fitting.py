"""Gauges: donors that differ by a rotation alone give the donor, in memory and on disk."""

import json

import pytest
import torch
from conftest import DEMO, changed, resolved, rotated_donor, write_donor, written
from conftest import in_memory as assembled
from safetensors.torch import load_file

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.donors.families import FAMILIES
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model
from frankenmerge.splicing.gauge_fitting import fitted_rotations
from frankenmerge.splicing.rotation import random_rotation

IDS = torch.tensor([[0, 7, 30, 7, 12, 41, 3, 3], [5, 5, 2, 47, 19, 1, 8, 0]])
FOUND_AGAIN = [
    "llama",
    "qwen3",
    "phi3",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
    "cohere2",
    "stablelm",
]


def recipe_of(*parts, **fields) -> Recipe:
    """A recipe of (folder, start, stop, gauge or None) slices."""
    slices = [
        {"sources": [{"model": str(folder), "layer_range": [start, stop]}]}
        | ({"gauge": gauge} if gauge else {})
        for folder, start, stop, gauge in parts
    ]
    return Recipe.model_validate({"slices": slices, "merge_method": "passthrough", **fields})


@torch.no_grad()
def in_memory(recipe):
    return assembled(recipe)(input_ids=IDS).logits


@torch.no_grad()
def on_disk(recipe, output, **options):
    written(recipe, output, **options)
    return load_model(open_checkpoint(str(output)))(input_ids=IDS).logits


@torch.no_grad()
def alone(path):
    return load_model(open_checkpoint(str(path)))(input_ids=IDS).logits


@pytest.fixture
def twins(request, tmp_path):
    """A donor and the same one in another basis; the parameter is their family."""
    family = getattr(request, "param", "llama")
    first = write_donor(tmp_path / "first", family, seed=3)
    return first, rotated_donor(
        first, tmp_path / "second", random_rotation(16, 1, centred=FAMILIES[family].norm == "layer")
    )


@pytest.mark.parametrize("twins", FOUND_AGAIN, indirect=True)
def test_a_donor_spliced_with_itself_in_another_basis_is_the_donor(twins, tmp_path):
    first, second = twins
    recipe = recipe_of((first, 0, 2, None), (second, 2, 4, {"to": "previous"}))
    expected = alone(first)
    raw = recipe_of((first, 0, 2, None), (second, 2, 4, None))
    assert (in_memory(raw) - expected).abs().max() > 0.1
    virtual, written = in_memory(recipe), on_disk(recipe, tmp_path / "merged")
    torch.testing.assert_close(virtual, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(written, virtual, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("to", ["base", "previous"])
def test_a_slice_in_the_middle_is_rotated_and_the_rest_is_copied(twins, to, tmp_path):
    first, second = twins
    recipe = recipe_of((first, 0, 1, None), (second, 1, 3, {"to": to}), (first, 3, 4, None))
    torch.testing.assert_close(
        on_disk(recipe, tmp_path / "merged"), alone(first), atol=1e-3, rtol=1e-3
    )
    record = json.loads((tmp_path / "merged" / "frankenmerge.json").read_text())
    methods = {name: entry["method"] for name, entry in record["tensors"].items()}
    rotated = {name for name, method in methods.items() if method == "rotate"}
    assert rotated == {
        name for name in methods if name.startswith(("model.layers.1.", "model.layers.2."))
    }
    fit = fitted_rotations(resolved(recipe))[1]
    assert record["gauges"] == {
        "1": {
            "rotation": fit.rotation.hash,
            "scale": fit.rotation.scale,
            "held_out_r2": pytest.approx(1, abs=1e-6),
        }
    }
    before, after = (
        load_file(first / "model.safetensors"),
        load_file(tmp_path / "merged" / "model.safetensors"),
    )
    assert all(torch.equal(before[name], after[name]) for name in after if methods[name] == "copy")


def test_a_slice_after_a_rotated_one_is_rotated_as_far(twins, tmp_path):
    first, second = twins
    third = rotated_donor(first, tmp_path / "third", random_rotation(16, 2))
    recipe = recipe_of(
        (first, 0, 1, None), (second, 1, 2, {"to": "previous"}), (third, 2, 4, {"to": "previous"})
    )
    torch.testing.assert_close(in_memory(recipe), alone(first), atol=1e-3, rtol=1e-3)


def test_embedding_and_a_tied_head_are_rotated_with_a_first_and_last_slice(tmp_path):
    first = write_donor(tmp_path / "first", seed=3, tie_word_embeddings=True)
    other = write_donor(tmp_path / "other", seed=4, tie_word_embeddings=True)
    recipe = recipe_of((first, 0, 4, {"to": "base"}), base_model=str(other))
    virtual, written = in_memory(recipe), on_disk(recipe, tmp_path / "merged")
    torch.testing.assert_close(virtual, alone(first), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(written, virtual, atol=1e-5, rtol=1e-5)
    embeddings = [
        load_file(path / "model.safetensors")["model.embed_tokens.weight"]
        for path in (tmp_path / "merged", first)
    ]
    assert (embeddings[0] - embeddings[1]).abs().max() > 0.1
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_rotated_tensor_is_rounded_once_to_the_donors_type(dtype, tmp_path):
    first, second = (
        write_donor(tmp_path / name, seed=seed, dtype=dtype, shard="20KB")
        for name, seed in (("a", 1), ("b", 2))
    )
    recipe = recipe_of((first, 0, 2, None), (second, 2, 4, {"to": "previous"}))
    written(recipe, tmp_path / "merged", shard_size=20_000)
    torch.testing.assert_close(alone(tmp_path / "merged"), in_memory(recipe), atol=1e-5, rtol=1e-5)
    tensors = {
        name: value
        for file in (tmp_path / "merged").glob("*.safetensors")
        for name, value in load_file(file).items()
    }
    source = {
        name: value
        for file in second.glob("*.safetensors")
        for name, value in load_file(file).items()
    }
    rotation = fitted_rotations(resolved(recipe))[1].rotation
    gain = source["model.layers.3.post_attention_layernorm.weight"].double()
    expected = torch.einsum(
        "oi,i,ij->oj", source["model.layers.3.mlp.up_proj.weight"].double(), gain, rotation.matrix
    )
    assert torch.equal(
        tensors["model.layers.3.mlp.up_proj.weight"], expected.to(getattr(torch, dtype))
    )
    assert {value.dtype for value in tensors.values()} == {getattr(torch, dtype)}
    assert torch.equal(tensors["model.norm.weight"], torch.ones(16, dtype=getattr(torch, dtype)))


def test_a_gauge_fitted_on_text_is_found_as_well(twins, text, tmp_path):
    first, second = twins
    recipe = recipe_of((first, 0, 2, None), (second, 2, 4, {"to": "previous", "fit": str(text)}))
    torch.testing.assert_close(in_memory(recipe), alone(first), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_strangers_understand_each_other_in_one_basis():
    from frankenmerge.evaluation.bench import Bench
    from frankenmerge.evaluation.documents import Text

    base, stranger = (DEMO / "donors" / name for name in ("base", "stranger"))
    prose = (DEMO / "text" / "prose.txt").read_text()[:6000]
    checkpoints = {str(path): open_checkpoint(str(path)) for path in (base, stranger)}
    bench = Bench([Text("prose", prose)], checkpoints)

    def measured(name: str, gauge: dict | None) -> float:
        recipe = recipe_of((base, 0, 6, None), (stranger, 6, 8, gauge))
        return bench.splice(name, resolved(recipe)).total.nats_per_token

    alone = bench.checkpoint(str(stranger)).total.nats_per_token
    raw, rotated = measured("raw", None), measured("rotated", {"to": "previous"})
    assert raw > 6.5  # guessing costs log(1024), 6.9
    assert (raw - rotated) / (raw - alone) > 0.8


def refused(recipe, message):
    with pytest.raises(FrankenmergeError, match=message):
        in_memory(recipe)


def test_gauges_that_cannot_be_are_refused(donors, tmp_path):
    a, b = donors["a"], donors["b"]
    refused(recipe_of((a, 0, 2, {"to": "previous"}), (b, 2, 4, None)), r"slices\[0\]\.gauge\.to")
    refused(
        recipe_of((a, 0, 2, None), (b, 2, 4, {"to": "base", "fit": "no-such.txt"})),
        r"slices\[1\]\.gauge\.fit",
    )
    short = tmp_path / "short.txt"
    short.write_text("a few letters")
    refused(recipe_of((a, 0, 2, None), (b, 2, 4, {"to": "base", "fit": str(short)})), "128 tokens")
    norms = write_donor(tmp_path / "norms", "olmo2", seed=1)
    refused(
        recipe_of((norms, 0, 2, None), (norms, 2, 4, {"to": "base"})), "post_attention_layernorm"
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"parameters": {"scale": 0.5}}, r"slices\[1\]\.gauge.*without parameters"),
        ({"head": "b"}, "head.*no donor of its own"),
        ({"final_norm": "b"}, "final_norm.*no donor of its own"),
        ({"merge_method": "linear"}, r"slices\[1\]\.gauge.*passthrough"),
        ({"tokenizer": {"pad_to_multiple_of": 64}}, "tokenizer.*rows as they are"),
    ],
)
def test_what_cannot_be_combined_with_a_gauge_is_refused(fields, message, donors):
    recipe = recipe_of(
        (donors["a"], 0, 2, None), (donors["b"], 2, 4, {"to": "previous"})
    ).model_dump(exclude_none=True)
    fields = {key: str(donors["b"]) if value == "b" else value for key, value in fields.items()}
    refused(Recipe.model_validate(recipe | fields), "(?s)" + message)


def test_a_rotated_slice_is_rounded_to_the_recipes_type(twins, tmp_path):
    first, second = twins
    recipe = recipe_of((first, 0, 2, None), (second, 2, 4, {"to": "previous"}), dtype="bfloat16")
    assert (on_disk(recipe, tmp_path / "merged") - alone(first)).abs().max() < 0.2
    rotation = fitted_rotations(resolved(recipe))[1].rotation
    made, source = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        load_file(second / "model.safetensors"),
    )
    assert {value.dtype for value in made.values()} == {torch.bfloat16}
    expected = (
        rotation.scale * rotation.matrix.T @ source["model.layers.2.mlp.down_proj.weight"].double()
    )
    assert torch.equal(made["model.layers.2.mlp.down_proj.weight"], expected.bfloat16())


def test_a_text_next_to_the_recipe_is_found(donors, text, tmp_path):
    recipe = recipe_of(
        (donors["a"], 0, 2, None), (donors["b"], 2, 4, {"to": "previous", "fit": text.name})
    )
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert load_recipe(tmp_path / "recipe.yaml").parts[1].gauge.fit == str(text)


def test_donors_that_read_tokens_differently_cannot_be_fitted(donors, tmp_path):
    other = changed(donors["b"], tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["version"] = "1.0 "
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(recipe_of((donors["a"], 0, 2, None), (other, 2, 4, {"to": "base"})), "the same tokens")


def test_an_unknown_key_of_a_gauge_is_refused():
    from frankenmerge.artefacts.recipe_file import parse_recipe

    text = (
        "{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [0, "
        "1]}], gauge: {to: base, with: text}}]}"
    )
    with pytest.raises(FrankenmergeError, match=r"(?s)gauge\.with.*to, fit"):
        parse_recipe(text, "recipe")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"]
)
def test_a_donor_whose_states_are_not_finite_is_reported(twins, tmp_path, name):
    first, second = twins

    def spoil(arrays):
        arrays[name].flat[-1] = float("inf")
        return arrays

    broken = changed(second, tmp_path / "broken", spoil)
    with pytest.raises(FrankenmergeError) as caught:
        on_disk(
            recipe_of((first, 0, 2, None), (broken, 1, 4, {"to": "previous"})),
            tmp_path / "out",
            allow_nan=True,
        )
    (fault,) = caught.value.faults
    assert fault.place.startswith(str(broken)) and fault.expected.startswith("finite states")
    assert not (tmp_path / "out").exists()
