"""What is wrong with a recipe and its donors: every fault with its place, all at once."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import in_memory, resolved, write_donor, written
from lettered import PRECEDENCE, STACK, faults_of, layer, named, whole

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model


@pytest.mark.parametrize(
    "text, place, said",
    [
        ("merge_method: lineer\nmodels: [{model: a}]", "merge_method", "write linear"),
        (
            "merge_method: slerp\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}",
            "models",
            "base_model",
        ),
        (
            "merge_method: slerp\nbase_model: a\n"
            "models: [{model: a}, {model: b}, {model: b}]\nparameters: {t: 0}",
            "models",
            "2",
        ),
        ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]", "models", "2"),
        (
            f"{PRECEDENCE}parameters: {{weight: 1}}".replace("linear", "passthrough").replace(
                "weight", "scale"
            ),
            "modules.default.slices[0].sources",
            "2",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]",
            "models[0].parameters.wieght",
            "write weight",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1, normalise: true}",
            "parameters.normalise",
            "write normalize",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1, normalize: 2}",
            "parameters.normalize",
            "true or false",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: true}",
            "parameters.weight",
            "a number",
        ),
        (
            "merge_method: linear\n"
            "models: [{model: a, parameters: {normalize: true}}]\n"
            "parameters: {weight: 1}",
            "models[0].parameters.normalize",
            "single models",
        ),
        (
            "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {max_iter: 2.5}",
            "parameters.max_iter",
            "whole number",
        ),
        (
            "merge_method: ties\nbase_model: a\nmodels: [{model: b}]\n"
            "parameters: {weight: 1, density: [0, 1.5]}",
            "parameters.density",
            "from 0 to 1",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\n"
            "parameters: {weight: [{filter: self_atn, value: 1}, {value: 2}]}",
            "parameters.weight",
            "self_atn",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b}]",
            "/a",
            "model.embed_tokens.weight, ",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"
            "parameters: {weight: [{filter: mlp, value: 1}]}",
            "/a",
            "model.embed_tokens.weight, ",
        ),
        (
            "merge_method: linear\n"
            "models: [{model: a, parameters: {weight: 1}}, {model: b, "
            "parameters: {weight: -1}}]",
            "model.embed_tokens.weight",
            "sum is not 0",
        ),
        (
            "merge_method: linear\n"
            "models: [{model: a, parameters: {weight: 1}}, {model: b, "
            "parameters: {weight: [0, -2]}}]",
            "model.norm.weight",
            None,
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: deep}]\nparameters: {weight: 1}",
            "models",
            "4",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: wide}]\nparameters: {weight: 1}",
            "recipe",
            "hidden_size",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: g}]\nparameters: {weight: 1}",
            "recipe",
            "gpt2",
        ),
        (
            "merge_method: linear\nparameters: {weight: 1}\n"
            "slices: [{sources: [{model: a, layer_range: [2, 6]}, {model: b, "
            "layer_range: [0, 4]}]}]",
            "slices[0].sources[0].layer_range",
            "[0, 4]",
        ),
    ],
)
def test_a_fault_is_reported_with_its_place(donors, tmp_path, text, place, said):
    if said is None:  # weights whose sum is 0 nowhere but between two blocks are sound
        whole(text, donors, tmp_path)
        return
    faults = faults_of(
        text.replace("SOURCE", "").replace("SLICE\nMODULE\nRECIPE\n", ""), donors, tmp_path
    )
    assert any(fault.place.endswith(place) and said in str(fault) for fault in faults), [
        str(fault) for fault in faults
    ]


def test_weights_whose_sum_is_0_in_one_block_alone_are_refused(donors, tmp_path):
    text = (
        "merge_method: linear\n"
        "models: [{model: a, parameters: {weight: 1}}, {model: b, "
        "parameters: {weight: [0, 0, 0, -1]}}]\n"
    )
    (fault,) = faults_of(text, donors, tmp_path)
    assert layer(3, "") in fault.place
    whole(text + "parameters: {normalize: false}\n", donors, tmp_path)


def test_faults_of_recipe_donors_and_method_are_reported_together(donors, tmp_path):
    mute = Path(shutil.copytree(donors["a"], tmp_path / "mute"))
    (mute / "tokenizer.json").unlink()
    text = """\
merge_method: slerp
base_model: mute
slices:
  - sources:
      - {model: mute, layer_range: [0, 5], parameters: {t: 1}}
      - {model: wide, layer_range: [0, 5]}
parameters: {tt: 0.5, t: 7}
"""
    found = "\n".join(map(str, faults_of(text, donors | {"mute": mute}, tmp_path)))
    for part in (
        "sources[0].parameters.t",
        "parameters.tt",
        "0 to 1",
        "sources[0].layer_range",
        "sources[1].layer_range",
        "hidden_size",
        "a tokenizer",
    ):
        assert part in found


def test_blocks_of_other_kinds_are_not_merged(tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 2
    donor = write_donor(
        tmp_path / "q",
        "qwen2",
        seed=1,
        layer_types=kinds,
        use_sliding_window=True,
        sliding_window=8,
    )
    text = """\
merge_method: linear
slices: [{sources: [{model: q, layer_range: [0, 2]}, {model: q, layer_range: [SHIFT]}]}]
parameters: {weight: 1}
"""
    assert whole(text.replace("SHIFT", "2, 4"), {"q": donor}, tmp_path)
    (fault,) = faults_of(text.replace("SHIFT", "1, 3"), {"q": donor}, tmp_path)
    assert fault.place == "recipe: layer_types" and "sliding_attention" in fault.found


def test_a_tensor_that_one_donor_lacks_is_not_dropped(donors, tmp_path):
    biased = write_donor(tmp_path / "biased", seed=4, attention_bias=True)
    text = "merge_method: linear\nmodels: [{model: a}, {model: biased}]\nparameters: {weight: 1}\n"
    assert any(
        "attention_bias" in fault.found
        for fault in faults_of(text, donors | {"biased": biased}, tmp_path)
    )


def test_donors_that_cannot_be_opened_do_not_hide_the_method_s_faults(tmp_path):
    faults = faults_of("merge_method: lineer\nmodels: [{model: nowhere}]\n", {}, tmp_path)
    assert [fault.place for fault in faults] == ["recipe: merge_method", "nowhere"]


def test_an_unknown_method_is_the_only_fault_of_donors_that_fit(donors):
    recipe = named("merge_method: anything\nmodels: [{model: a}, {model: b}]\n", donors)
    with pytest.raises(FrankenmergeError) as caught:
        resolved(recipe)
    assert [fault.place for fault in caught.value.faults] == ["recipe: merge_method"]


@pytest.mark.parametrize(
    "text",
    [
        STACK.replace("PARAMETERS", "") + "dtype: bfloat16\n",
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n",
        STACK.replace("PARAMETERS", "") + "tokenizer: {source: union, pad_to_multiple_of: 64}\n",
    ],
)
def test_any_recipe_in_memory_is_its_checkpoint(donors, tmp_path, text):
    recipe = named(text, donors)
    model = in_memory(recipe)
    written(recipe, tmp_path / "out")
    loaded = load_model(open_checkpoint(str(tmp_path / "out")))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert model.config.vocab_size == loaded.config.vocab_size
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
