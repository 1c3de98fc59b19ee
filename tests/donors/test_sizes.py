"""Tensors whose sizes contradict config.json."""

import json

import pytest
import torch
from conftest import changed, resolved, write_donor
from transformers import AutoModelForCausalLM

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError

OTHER = {
    "llama": ("intermediate_size", "num_key_value_heads", "head_dim"),
    "qwen3": ("intermediate_size", "num_attention_heads", "head_dim"),
    "mixtral": ("intermediate_size", "num_local_experts"),
    "qwen3_moe": ("num_key_value_heads", "num_experts"),
    "gemma2": ("intermediate_size", "num_key_value_heads"),
    "phi3": ("intermediate_size", "num_key_value_heads"),
    "gpt2": ("n_inner",),
    "gpt_neox": ("intermediate_size",),
    "olmo3": ("intermediate_size", "num_key_value_heads"),
    "starcoder2": ("num_key_value_heads",),
}
"""Config fields whose change makes transformers expect other shapes."""
CASES = [(family, key) for family, keys in OTHER.items() for key in keys]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A donor of each family, written when it is first asked for."""
    made = {}

    def call(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / family
            extra = {"num_local_experts": 4} if family == "mixtral" else {}
            made[family] = write_donor(folder, family, **extra)
        return made[family]

    return call


@pytest.mark.parametrize("family", OTHER)
def test_a_sound_donor_has_the_sizes_of_its_config(written, family):
    assert open_checkpoint(str(written(family)))


@pytest.mark.parametrize("family, key", CASES)
def test_what_transformers_cannot_load_is_refused_by_name(written, tmp_path, family, key):
    config = json.loads((written(family) / "config.json").read_text())
    name = "num_local_experts" if key == "num_experts" and key not in config else key
    other = 1 if name == "num_key_value_heads" else 2 * (config.get(name) or 36)
    folder = changed(
        written(family), tmp_path / "other", config=lambda config: config | {name: other}
    )
    with pytest.raises(FrankenmergeError) as caught:
        resolved(recipe_of([Block(str(folder), index) for index in range(4)]))
    stored = open_checkpoint(str(written(family))).tensors
    named = {fault.place.partition(": ")[2] for fault in caught.value.faults}
    assert named <= set(stored)
    # The oracle: every named tensor has another shape in transformers' model of this config.
    from transformers import AutoConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    in_memory = {name.replace("block_sparse_moe", "mlp"): name for name in named}
    for name in in_memory.keys() & shapes:
        assert shapes[name] != stored[in_memory[name]].shape
    # Experts are one tensor in memory.
    assert in_memory.keys() & shapes or all(".experts." in name for name in in_memory)


def test_an_empty_tensor_is_refused(donors, tmp_path):
    name = "model.layers.{}.input_layernorm.weight"
    empty = {name.format(index): torch.zeros(0).numpy() for index in range(4)}
    folder = changed(donors["a"], tmp_path / "empty", lambda arrays: arrays | empty)
    with pytest.raises(FrankenmergeError) as caught:
        open_checkpoint(str(folder))
    places = [fault.place.removeprefix(f"{folder}: ") for fault in caught.value.faults]
    assert sorted(places) == sorted(empty)


def test_check_refuses_a_recipe_of_such_a_donor(donors, run, tmp_path):
    folder = changed(
        donors["a"], tmp_path / "inner", config=lambda own: own | {"intermediate_size": 32}
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {folder}}}]\n")
    status, _, errors = run("check", recipe)
    assert status == 2 and "gate_proj" in errors and "[32, 16]" in errors and "[24, 16]" in errors
