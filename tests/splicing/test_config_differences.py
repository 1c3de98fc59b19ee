"""Donors whose configs differ: what forbids a merge, what is a remark, and whose config counts."""

import pytest
import torch
import yaml
from conftest import changed, resolved, write_donor
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.errors import FrankenmergeError

IDS = torch.arange(1, 20)[None]


def recipe_of_models(method: str, *folders, base=None, **keys):
    data = {"models": [{"model": str(folder)} for folder in folders], "merge_method": method}
    data |= {"base_model": str(base)} if base else {}
    return parse_recipe(yaml.safe_dump(data | keys), "r.yaml")


@pytest.fixture
def other_rope(donors, tmp_path):
    """A donor of the shape of `a` with another base of its rotary positions."""
    return write_donor(
        tmp_path / "other",
        seed=7,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


@torch.no_grad()
def test_the_base_decides_the_rotary_positions_of_what_is_merged_with_it(
    donors, other_rope, run, tmp_path
):
    for base, theta in ((donors["a"], 10000.0), (other_rope, 500000.0)):
        source = other_rope if base is donors["a"] else donors["a"]
        recipe = recipe_of_models("task_arithmetic", source, base=base, parameters={"weight": 0.5})
        splice = resolved(recipe)
        (remark,) = [line for line in splice.remarks if "rope_parameters" in line]
        assert remark.endswith("the result has the base model's")
        path, out = tmp_path / "r.yaml", tmp_path / f"out-{theta:.0f}"
        path.write_text(recipe.dump())
        assert run("merge", path, out)[0] == 0
        expected = AutoModelForCausalLM.from_pretrained(base)
        weights = [load_file(folder / "model.safetensors") for folder in (base, source)]
        mixed = {key: w + 0.5 * (weights[1][key] - w) for key, w in weights[0].items()}
        expected.load_state_dict(mixed)
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert merged.config.rope_parameters["rope_theta"] == theta
        assert torch.allclose(merged(IDS).logits, expected(IDS).logits, atol=1e-5)


@pytest.mark.parametrize(
    "method, base", [("passthrough", False), ("linear", False), ("task_arithmetic", True)]
)
def test_blocks_that_are_stacked_keep_other_rotary_positions_refused(
    donors, other_rope, method, base
):
    sources = [[donors["a"]], [other_rope]]
    if method != "passthrough":
        sources = [[donors["a"], other_rope], [other_rope]]  # the second stays as it is
    slices = [
        {"sources": [{"model": str(folder), "layer_range": [0, 4]} for folder in part]}
        for part in sources
    ]
    data = {"slices": slices, "merge_method": method, "parameters": {"weight": 1.0}}
    data |= {"base_model": str(donors["a"])} if base else {}
    if method == "passthrough":
        del data["parameters"]
    with pytest.raises(FrankenmergeError) as caught:
        resolved(parse_recipe(yaml.safe_dump(data), "r.yaml"))
    (fault,) = [each for each in caught.value.faults if "rope_parameters" in each.found]
    assert "rotary positions" in fault.remedy


def test_the_remedy_names_the_field(donors, tmp_path):
    twin = changed(donors["a"], tmp_path / "twin", config=lambda own: own | {"hidden_act": "gelu"})
    with pytest.raises(FrankenmergeError) as caught:
        resolved(recipe_of_models("linear", donors["a"], twin, parameters={"weight": 0.5}))
    assert [fault.remedy for fault in caught.value.faults] == [
        "use donors with the same hidden_act"
    ]


def test_bookkeeping_is_a_remark_of_the_splice(donors, tmp_path):
    twin = changed(donors["a"], tmp_path / "twin", config=lambda own: own | {"max_length": 7})
    splice = resolved(recipe_of_models("linear", donors["a"], twin, parameters={"weight": 0.5}))
    assert [line for line in splice.remarks if "max_length: None and 7" in line]


@torch.no_grad()
@pytest.mark.parametrize("limited", [True, False])
def test_a_window_that_applies_to_every_block_moves_with_none(run, tmp_path, limited):
    changes = {"sliding_window": 4 if limited else None, "use_bias": False, "bos_token_id": 0}
    first, second = (
        write_donor(tmp_path / str(seed), "starcoder2", seed=seed, **changes) for seed in (1, 2)
    )
    slices = [
        {"sources": [{"model": str(first), "layer_range": [0, 3]}]},
        {"sources": [{"model": str(second), "layer_range": [1, 4]}]},
    ]
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"slices": slices, "merge_method": "passthrough"}))
    assert run("merge", path, tmp_path / "out")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (first, second)]
    oracle = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(first, num_hidden_layers=6)
    ).eval()
    oracle.load_state_dict(models[0].state_dict(), strict=False)
    for position in range(6):
        donor, index = (0, position) if position < 3 else (1, position - 2)
        block = models[donor].model.layers[index].state_dict()
        oracle.model.layers[position].load_state_dict(block)
    oracle.model.norm.load_state_dict(models[1].model.norm.state_dict())
    # The donors are tied, so the head is the second one's embedding.
    oracle.lm_head.weight = torch.nn.Parameter(models[1].lm_head.weight)
    oracle.model.embed_tokens.weight = torch.nn.Parameter(models[0].model.embed_tokens.weight)
    assert torch.allclose(merged(IDS).logits, oracle(IDS).logits, atol=1e-5)


def test_a_revision_next_to_a_model_is_part_of_its_name():
    text = "merge_method: passthrough\nmodels: [{model: org/name, revision: v2}]\n"
    with pytest.raises(FrankenmergeError) as caught:
        parse_recipe(text, "r.yaml")
    (fault,) = caught.value.faults
    assert fault.remedy == "write it into the model's name: model@v2"


def test_a_missing_parameter_is_reported_for_the_model_that_lacks_it(donors):
    models = [
        {"model": str(donors["a"])},
        {"model": str(donors["b"]), "parameters": {"weight": 0.5}},
        {"model": str(donors["deep"]), "parameters": {"weight": 0.5, "density": 0.1}},
    ]
    slices = [{"sources": [each | {"layer_range": [0, 2]} for each in models]}]
    data = {"slices": slices, "merge_method": "della", "base_model": str(donors["a"])}
    with pytest.raises(FrankenmergeError) as caught:
        resolved(parse_recipe(yaml.safe_dump(data), "r.yaml"))
    (fault,) = caught.value.faults
    assert fault.place.endswith(f", {donors['deep']}") and "epsilon" in fault.expected
