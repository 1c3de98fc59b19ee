"""Configs of families that are not in the table, as several versions of transformers write them."""

import json

import pytest
import torch
from conftest import changed, resolved, write_donor
from transformers import AutoConfig, AutoModelForCausalLM

from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.donors.config import differences, quantity
from frankenmerge.errors import FrankenmergeError

FLAT = {"rope_theta": 10000.0, "rope_scaling": None}
OLDER = {
    "hunyuan_v1_dense": FLAT | {"pretraining_tp": 1, "use_cla": False},
    "granitemoe": FLAT | {"shared_intermediate_size": 0},
    "olmo3": {"rope_theta": 500000.0, "rope_scaling": None},
    "falcon": FLAT | {"apply_residual_connection_post_layernorm": False},
    "exaone4": FLAT | {"sliding_window_pattern": "LLLG"},
    "starcoder2": FLAT | {"mlp_type": "default"},
}
"""What transformers 4.57 writes and transformers 5 does not."""
IDS = torch.arange(1, 20)[None]


def written(folder, family):
    changes = {"falcon": {"multi_query": True}}.get(family, {"head_dim": 4})
    return write_donor(folder, family, **changes)


@torch.no_grad()
@pytest.mark.parametrize("family", OLDER)
def test_a_config_of_an_older_version_is_that_of_the_newer_one(family, tmp_path):
    newer = written(tmp_path / "newer", family)

    def aged(config: dict) -> dict:
        return {key: each for key, each in config.items() if key != "rope_parameters"} | OLDER[
            family
        ]

    older = changed(newer, tmp_path / "older", config=aged)
    # The oracle: both compute the same in transformers.
    logits = [AutoModelForCausalLM.from_pretrained(each)(IDS).logits for each in (newer, older)]
    assert torch.equal(*logits)
    configs = [json.loads((each / "config.json").read_text()) for each in (newer, older)]
    assert differences(*configs)[0] == differences(*configs[::-1])[0] == []


@pytest.mark.parametrize(
    "family, key, value",
    [
        ("granitemoe", "residual_multiplier", 0.5),
        ("olmo3", "rope_theta", 1000.0),
        ("falcon", "alibi", True),
        ("starcoder2", "use_bias", False),
    ],
)
def test_another_computation_stays_a_reason(family, key, value, tmp_path):
    config = json.loads((written(tmp_path / "one", family) / "config.json").read_text())
    config.pop("rope_parameters")
    other = config | OLDER[family] | {key: value}
    assert differences(config | OLDER[family], other)[0]


def test_a_pattern_in_letters_next_to_a_list_of_kinds_is_not_read(tmp_path):
    donor = written(tmp_path / "exaone", "exaone4")
    lettered = changed(
        donor, tmp_path / "l", config=lambda own: own | {"sliding_window_pattern": "LLLG"}
    )
    assert isinstance(json.loads((donor / "config.json").read_text())["layer_types"], list)
    assert open_checkpoint(str(lettered)).blocks == 4


@pytest.mark.parametrize(
    "changes, heads",
    [
        ({"multi_query": True}, 1),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2),
        ({"multi_query": False}, 4),
    ],
)
def test_heads_of_keys_of_falcon(changes, heads):
    config = AutoConfig.for_model("falcon", num_attention_heads=4, hidden_size=16, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    fused = model.transformer.h[0].self_attention.query_key_value.weight.shape[0]
    assert fused == (4 + 2 * heads) * 4
    assert quantity(config.to_dict(), "kv_heads") == heads


def test_code_of_its_own_is_no_reason_in_a_family_that_transformers_has(tmp_path):
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_starcoder2.Starcoder2ForCausalLM"}}
    donor = written(tmp_path / "own", "starcoder2")
    with_code = changed(donor, tmp_path / "code", config=lambda own: own | code)
    stack = (0, 1, 2, 1, 2, 3)
    assert resolved(recipe_of([Block(str(with_code), index) for index in stack]))


def test_a_family_that_transformers_has_not_is_merged_whole_and_not_spliced(tmp_path):
    donor = written(tmp_path / "own", "starcoder2")
    unknown = changed(
        donor, tmp_path / "unknown", config=lambda own: own | {"model_type": "starcoder9"}
    )
    name = str(unknown)
    whole = Recipe.model_validate(
        {"merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 1}}]}
    )
    stored = open_checkpoint(name).tensors
    assert {operation.name for operation in resolved(whole).operations} == set(stored)
    with pytest.raises(FrankenmergeError, match="starcoder9"):
        resolved(recipe_of([Block(name, index) for index in (0, 1, 2, 1, 2, 3)]))
