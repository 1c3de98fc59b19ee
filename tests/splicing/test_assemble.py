"""The model in memory is the merged checkpoint loaded again, bit by bit, whatever the recipe."""

import json

import pytest
import torch
import yaml
from conftest import write_donor
from transformers import AutoModelForCausalLM

from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.merging.writer import merge
from frankenmerge.models.loading import Placement, load_model, load_tokenizer
from frankenmerge.splicing.assemble import (
    ComputedTensors,
    assemble,
    names_as_stored,
    splice_tokenizer,
)
from frankenmerge.splicing.gauge_fitting import fitted_rotations
from frankenmerge.splicing.methods import METHODS
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.resolve import resolve

KINDS = ("llama", "gpt2", "gpt_neox", "mixtral")
"""Maps that are usual, transposed, of fused queries, keys and values, and packed experts."""
VALUES = {
    "weight": [0.75, 0.25],
    "density": [0.5, 0.75],
    "gamma": [0.01, 0.02],
    "epsilon": [0.1, 0.05],
    "scale": [0.5, 0.25],
    "t": 0.25,
    "lambda": 0.75,
}


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, list[str]]:
    """For every kind of family a base and two fine-tunes of it."""
    root = tmp_path_factory.mktemp("families")
    found = {}
    for kind in KINDS:
        base = write_donor(root / kind / "base", kind, seed=1)
        found[kind] = [str(base)]
        for seed, name in enumerate(("x", "y")):
            model = AutoModelForCausalLM.from_pretrained(base)
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            model.save_pretrained(root / kind / name)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (root / kind / name / file).write_bytes((base / file).read_bytes())
            found[kind].append(str(root / kind / name))
    return found


def recipe_of(method: str, base: str, models: list[str], **more) -> str:
    """Two models (or as many as the method takes), the second's first blocks left out."""
    spec = METHODS[method]
    count = spec.models[1] or 2
    sources = []
    for number, model in enumerate(models[:count]):
        own = {
            name: [{"filter": "att", "value": VALUES[name][number]}, {"value": VALUES[name][0]}]
            for name, parameter in spec.parameters.items()
            if parameter.per_model and name in VALUES
        }
        sources.append({"model": model, "layer_range": [number, number + 3], "parameters": own})
    whole = {
        name: VALUES[name]
        for name, parameter in spec.parameters.items()
        if not parameter.per_model and name in VALUES
    }
    recipe = {"merge_method": method, "slices": [{"sources": sources}], "parameters": whole, **more}
    if spec.base != "none":
        recipe["base_model"] = base
        sources.append({"model": base, "layer_range": [1, 4]})
    return yaml.safe_dump(recipe)


def equal(first, second) -> None:
    """Names, types and bits of all tensors, buffers included."""
    ours = {**dict(first.named_buffers()), **first.state_dict()}
    theirs = {**dict(second.named_buffers()), **second.state_dict()}
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


def compared(text: str, tmp_path, placement=Placement(), *, load=True):  # noqa: B008
    """Assemble a recipe, merge it, load it, and compare; returns the model in memory."""
    recipe = parse_recipe(text, "recipe")
    splice = resolve(recipe, open_donors(recipe))
    names = splice.donors if load else ()
    models = {name: load_model(splice.donors[name], placement) for name in names}
    fits = fitted_rotations(splice) if splice.has_gauges else {}
    ours = assemble(splice, models, placement, fits=fits)
    merge(splice, tmp_path / "merged")
    written = open_checkpoint(str(tmp_path / "merged"))
    theirs = load_model(written, placement)
    equal(ours, theirs)
    expected, config = theirs.config.to_dict(), ours.config.to_dict()
    differing = {"_name_or_path"}
    assert {key for key in expected if config.get(key) != expected[key]} <= differing
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    tokenizers = splice_tokenizer(splice), load_tokenizer(written)
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    return ours


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_memory_is_its_checkpoint(families, tmp_path, method, kind, dtype):
    base, *models = families[kind]
    compared(recipe_of(method, base, models, dtype=dtype, seed=3), tmp_path)


@pytest.mark.parametrize("run_in", ["float32", "bfloat16"])
@pytest.mark.parametrize("out", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["passthrough", "linear", "dare_ties"])
def test_types_of_recipe_and_run(families, tmp_path, method, out, run_in):
    base, *models = families["llama"]
    more = {"out_dtype": out} if out else {}
    compared(recipe_of(method, base, models, **more), tmp_path, Placement(run_in))


@pytest.mark.parametrize("kind", KINDS)
def test_donors_that_are_not_loaded_are_read(families, tmp_path, kind):
    _, x, y = families[kind]
    text = f"""
merge_method: passthrough
slices:
- sources: [{{model: {x}, layer_range: [0, 3]}}]
- sources: [{{model: {y}, layer_range: [1, 4]}}]
"""
    compared(text, tmp_path, load=False)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_copied_share_the_donors_memory(families, kind):
    _, x, y = families[kind]
    text = f"""
merge_method: passthrough
slices:
- sources: [{{model: {x}, layer_range: [0, 3]}}]
- sources: [{{model: {y}, layer_range: [1, 4]}}]
- sources: [{{model: {x}, layer_range: [2, 4], parameters: {{scale: 0.5}}}}]
"""
    recipe = parse_recipe(text, "recipe")
    splice = resolve(recipe, open_donors(recipe))
    models = {name: load_model(donor) for name, donor in splice.donors.items()}
    made = assemble(splice, models)
    owned = {value.data_ptr() for model in models.values() for value in model.state_dict().values()}
    new = [name for name, value in made.state_dict().items() if value.data_ptr() not in owned]
    assert len(made.state_dict()) > 50
    stored = names_as_stored(made, splice.base.architecture)
    places = [splice.base.architecture.role(stored[name])[:2] for name in new]
    # The scaled slice has the last two of eight blocks, and with them final norm and head.
    assert {place for place in places if place[0] == "block"} == {("block", 6), ("block", 7)}
    assert not any(role == "embedding" for role, _ in places)


@pytest.mark.parametrize("to", ["base", "previous"])
@pytest.mark.parametrize("kind", KINDS)
def test_gauges(families, tmp_path, kind, to):
    _, x, y = families[kind]
    text = f"""
merge_method: passthrough
slices:
- sources: [{{model: {x}, layer_range: [0, 2]}}]
- sources: [{{model: {y}, layer_range: [1, 4]}}]
  gauge: {{to: {to}}}
"""
    compared(text, tmp_path)


def test_named_ends_and_a_head_that_parts_from_its_embedding(families, donors, tmp_path):
    a, b = str(donors["a"]), str(donors["b"])  # b is tied
    text = f"""
merge_method: passthrough
slices:
- sources: [{{model: {b}, layer_range: [0, 3]}}]
- sources: [{{model: {b}, layer_range: [1, 4]}}]
"""
    assert compared(text, tmp_path / "tied").config.tie_word_embeddings
    for key in ("embedding", "final_norm", "head"):
        made = compared(f"{text}{key}: {a}\n", tmp_path / key)
        assert made.config.tie_word_embeddings == (key == "final_norm")


@pytest.mark.parametrize(
    "more",
    [
        {"tokenizer_source": "union"},
        {"tokenizer": {"source": "union", "pad_to_multiple_of": 64}},
        {"tokenizer": {"source": "base", "tokens": {"<new>": {"source": {"kind": "zero"}}}}},
        {"chat_template": "chatml", "tokenizer_source": "base"},
    ],
    ids=["union", "padded", "added token", "template"],
)
@pytest.mark.parametrize("method", ["passthrough", "linear", "ties"])
def test_tokenizers(tmp_path, method, more):
    folders = []
    for number, name in enumerate("abc"):
        folder = write_donor(tmp_path / name, seed=number)
        data = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = data["model"]["vocab"]
        # The second donor has other tokens under the last ids.
        if number == 1:
            last = sorted(vocabulary, key=vocabulary.get)[-3:]
            for token in last:
                vocabulary[f"{token}{token}"] = vocabulary.pop(token)
        (folder / "tokenizer.json").write_text(json.dumps(data))
        folders.append(str(folder))
    base, *models = folders
    made = compared(recipe_of(method, base, models, **more), tmp_path / "out")
    assert made.config.vocab_size == made.get_input_embeddings().weight.shape[0]


def test_a_tensor_that_is_computed_the_same_way_is_computed_once(families, monkeypatch):
    from frankenmerge.splicing import assemble as module

    _, x, y = families["llama"]
    text = """
merge_method: linear
slices:
- sources:
  - {{model: {x}, layer_range: [0, 4], parameters: {{weight: {first}}}}}
  - {{model: {y}, layer_range: [0, 4], parameters: {{weight: 0.5}}}}
"""
    count = 0
    original = module._computed_tensor

    def counted(operation, how):
        nonlocal count
        count += 1
        return original(operation, how)

    monkeypatch.setattr(module, "_computed_tensor", counted)
    shared = ComputedTensors()
    made = []
    for first in (0.5, 0.5, 0.25):
        recipe = parse_recipe(text.format(x=x, y=y, first=first), "recipe")
        splice = resolve(recipe, open_donors(recipe))
        made.append(assemble(splice, {}, shared=shared))
        assert count == len(splice.operations) * (1 if first == 0.5 else 2)
    equal(made[0], made[1])
    weights = [model.state_dict()["model.layers.0.mlp.up_proj.weight"] for model in made]
    assert not torch.equal(weights[0], weights[2])


def test_shared_tensors_are_bounded():
    shared = ComputedTensors(limit=40)
    for number in range(4):
        shared.add(number, torch.full((4,), float(number)))  # 16 bytes each
    assert [shared.get(number) is not None for number in range(4)] == [False, False, True, True]
    assert shared.bytes == 32


FILTERED = """
merge_method: passthrough
slices:
- sources:
  - {{model: {x}, layer_range: [0, 4]}}
  - {{model: {y}, layer_range: [0, 4], filter: [{first}, {second}]}}
"""


@pytest.mark.parametrize(
    ("kind", "filters"),
    [
        ("llama", ("self_attn.q_proj", "mlp.up_proj")),
        ("gpt2", ("attn.c_attn", "mlp.c_fc")),
        ("gpt_neox", ("query_key_value", "dense_h_to_4h")),
        ("mixtral", ("block_sparse_moe", "self_attn.o_proj")),
    ],
)
def test_single_maps_of_another_donor(families, tmp_path, kind, filters):
    _, x, y = families[kind]
    text = FILTERED.format(x=x, y=y, first=filters[0], second=filters[1])
    compared(text, tmp_path)
    recipe = parse_recipe(text, "recipe")
    splice = resolve(recipe, open_donors(recipe))
    taken = [each for each in splice.operations if each.donor == y]
    assert taken and splice.computed == 0
    assert all(any(part in each.source for part in filters) for each in taken)
    assert all(
        not any(part in each.source for part in filters) or each.donor == y
        for each in splice.operations
    )
    assert not splice.stacks_whole_blocks and splice.shares == {x: 0.5, y: 0.5}
