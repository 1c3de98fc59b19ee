"""What a user gets wrong in a mixture is reported by `check`, before any weight is read."""

import json

import pytest
import yaml
from conftest import changed, write_donor
from mixture_cases import mixture, write_config, write_donors

from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.errors import FrankenmergeError

GOOD = {
    "base_model": "a",
    "experts": [
        {"source_model": "b", "positive_prompts": ["x"]},
        {"source_model": "c", "positive_prompts": ["y"], "negative_prompts": ["x"]},
    ],
}


def faults(data: dict) -> dict[str, tuple[str, str]]:
    """Expected and found by place."""
    with pytest.raises(FrankenmergeError) as caught:
        parse_recipe(yaml.safe_dump(data), "m.yaml")
    return {
        fault.place.removeprefix("m.yaml: "): (fault.expected, fault.found)
        for fault in caught.value.faults
    }


def test_a_mixture_is_read_as_mergekit_writes_it():
    recipe = parse_recipe(yaml.safe_dump(GOOD | {"dtype": "bfloat16"}), "m.yaml")
    mixture = recipe.mixture
    assert mixture and (mixture.gate_mode, mixture.experts_per_token) == ("hidden", 2)
    assert recipe.donors == ["a", "b", "c"]
    assert parse_recipe(recipe.dump(), "again.yaml") == recipe
    assert yaml.safe_load(recipe.dump())["experts"] == GOOD["experts"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mixtral", "mixtral"),
        ("Qwen MoE", "qwen2_moe"),
        ("qwen3", "qwen3_moe"),
        ("DeepSeek", "deepseek"),
    ],
)
def test_architectures_have_mergekits_names(name, kind):
    recipe = parse_recipe(yaml.safe_dump(GOOD | {"architecture": name}), "m.yaml")
    assert recipe.mixture and recipe.mixture.architecture == kind


def test_all_faults_of_the_values_are_reported_at_once():
    data = GOOD | {
        "gate_mod": "hidden",
        "dtype": "bf16",
        "architecture": "gpt2",
        "slices": [],
        "experts": [
            {"source_model": "b", "positive_prompt": ["x"]},
            {"source_model": 3, "positive_prompts": [], "noise_scale": -1},
        ],
    }
    del data["base_model"]
    assert faults(data).keys() == {
        "base_model",
        "dtype",
        "gate_mod",
        "architecture",
        "slices",
        "experts[0].positive_prompt",
        "experts[1].source_model",
        "experts[1].positive_prompts",
        "experts[1].noise_scale",
    }


def test_a_misspelt_key_is_corrected():
    with pytest.raises(FrankenmergeError, match="write gate_mode"):
        parse_recipe(yaml.safe_dump(GOOD | {"gatemode": "random"}), "m.yaml")


def test_prompts_and_numbers_are_compared_with_the_experts():
    data = GOOD | {"experts_per_token": 3, "experts": [{"source_model": "b"}, GOOD["experts"][1]]}
    found = faults(data)
    assert found["experts_per_token"] == ("at most 2, the number of experts", "3")
    assert "gate_mode hidden needs" in found["experts[0].positive_prompts"][0]
    assert parse_recipe(
        yaml.safe_dump(data | {"experts_per_token": 1, "gate_mode": "random"}), "m.yaml"
    )


def test_a_single_expert_is_no_mixture():
    expected, _ = faults(GOOD | {"experts": GOOD["experts"][:1]})["experts"]
    assert "at least 2" in expected


def test_equal_prompts_of_all_experts_are_refused():
    experts = [{"source_model": name, "positive_prompts": ["x"]} for name in "bc"]
    assert faults(GOOD | {"experts": experts}).keys() == {"experts"}


@pytest.fixture
def check(tmp_path, run):
    """The error output of `check`; nothing is written by `moe` either."""

    def call(data: dict) -> str:
        config = write_config(tmp_path / "m.yaml", data)
        code, _, err = run("check", config)
        assert code == 2, err
        assert run("moe", config, tmp_path / "out")[0] == 2
        assert not (tmp_path / "out").exists()
        return err

    return call


def test_experts_of_other_shapes_are_named_with_the_tensor(experts, check, tmp_path):
    wide = write_donor(tmp_path / "wide", num_hidden_layers=2, intermediate_size=32)
    deep = write_donor(tmp_path / "deep", num_hidden_layers=3)
    relu = write_donor(tmp_path / "relu", num_hidden_layers=2, hidden_act="relu")
    base, first, *_ = experts["llama"]
    data = mixture("mixtral", [base, first, wide, deep])
    data["experts"].append({"source_model": str(relu), "positive_prompts": ["z"]})
    err = check(data)
    assert "experts[1].source_model: model.layers.0.mlp.gate_proj.weight" in err
    assert "expected: shape [24, 16]" in err and "found:    shape [32, 16]" in err
    assert "expected: 2 blocks" in err and "found:    3 in" in err
    assert "expected: hidden_act silu" in err and "found:    relu" in err


def test_other_families_are_refused_with_those_that_fit(experts, check, tmp_path):
    gpt2 = write_donor(tmp_path / "gpt2", "gpt2", n_layer=2)
    base, first, *_ = experts["llama"]
    err = check(mixture("mixtral", [base, first, gpt2]))
    assert "experts[1].source_model" in err and "llama, mistral, qwen2, qwen3" in err


def test_an_architecture_that_does_not_fit_says_which_does(experts, check):
    err = check(mixture("mixtral", experts["llama"], architecture="qwen3"))
    assert "llama become: mixtral, qwen2_moe, deepseek" in err
    assert "found:    qwen3_moe" in err


@pytest.mark.parametrize(
    ("case", "changes", "expected"),
    [
        ("qwen2_moe", {"shared_experts": None}, "an expert that every token passes"),
        ("qwen2_moe", {"shared_experts": [{"source_model": "BASE"}]}, "has a gate"),
        ("qwen3_moe", {"shared_experts": [{"source_model": "BASE"}]}, "has no shared experts"),
        (
            "deepseek",
            {
                "architecture": "deepseek",
                "shared_experts": [{"source_model": "BASE", "positive_prompts": ["x"]}],
            },
            "has no gate",
        ),
    ],
)
def test_shared_experts_have_to_fit(case, changes, expected, experts, check):
    donors = experts[{"qwen2_moe": "qwen2", "qwen3_moe": "qwen3", "deepseek": "llama"}[case]]
    for shared in changes["shared_experts"] or []:
        shared["source_model"] = str(donors[0])
    data = {
        key: value for key, value in (mixture(case, donors) | changes).items() if value is not None
    }
    assert expected in check(data)


def test_biases_that_mixtral_lacks_are_refused(check, tmp_path):
    donors = write_donors(tmp_path, "llama", num_hidden_layers=2, attention_bias=True)
    err = check(mixture("mixtral", donors))
    assert "only tensors that a block of mixtral has" in err and "_proj.bias" in err


def test_a_tokenizer_with_other_meanings_is_refused(experts, check, tmp_path):
    base, first, second, _ = experts["llama"]
    other = changed(second, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    names = list(content["model"]["vocab"])
    content["model"]["vocab"] = {name: index for index, name in enumerate(reversed(names))}
    (other / "tokenizer.json").write_text(json.dumps(content))
    err = check(mixture("mixtral", [base, first, other]))
    assert "shared ids mean other tokens" in err and "experts[1].source_model" in err


def test_types_that_differ_need_a_type(experts, check, tmp_path, run):
    base, first, *_ = experts["llama"]
    half = write_donor(tmp_path / "half", num_hidden_layers=2, dtype="bfloat16")
    data = mixture("mixtral", [base, first, half])
    assert "expected: donors of one floating type, or dtype" in check(data)
    config = write_config(tmp_path / "typed.yaml", data | {"dtype": "float16"})
    assert run("check", config)[0] == 0


def test_equal_experts_are_a_remark(experts, tmp_path, run):
    base, first, *_ = experts["llama"]
    copy = changed(first, tmp_path / "copy", lambda arrays: _nudged(arrays))
    data = mixture("mixtral", [base, first, copy])
    code, _, err = run("check", write_config(tmp_path / "m.yaml", data))
    assert code == 0 and f"the MLPs of {first} and {copy} differ by 0.1" in err
    twice = mixture("mixtral", [base, first, first])
    code, _, err = run("check", write_config(tmp_path / "m.yaml", twice))
    assert code == 0 and f"2 experts are {first}" in err
    code, _, err = run(
        "check", write_config(tmp_path / "m.yaml", mixture("mixtral", experts["llama"]))
    )
    assert code == 0 and "differ by" not in err


def _nudged(arrays):
    return {name: array * (1.001 if ".mlp." in name else 1) for name, array in arrays.items()}


def test_a_few_more_tokens_are_a_remark(experts, tmp_path, run):
    """Fine-tunes with tokens of their own are experts all the same: their embedding is not used."""
    base, first, *_ = experts["llama"]
    more = write_donor(tmp_path / "more", num_hidden_layers=2, vocab_size=50, seed=9)
    content = json.loads((more / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"Y": 48, "Z": 49}
    (more / "tokenizer.json").write_text(json.dumps(content))
    data = mixture("mixtral", [base, first, more])
    assert run("check", write_config(tmp_path / "m.yaml", data))[0] == 0


@pytest.mark.parametrize("command", ["heal", "tune"])
def test_commands_that_train_or_tune_take_no_mixture(command, experts, tmp_path, text, run):
    config = write_config(tmp_path / "m.yaml", mixture("mixtral", experts["llama"]))
    where = [tmp_path / "out"] if command == "heal" else ["-o", tmp_path / "out.yaml"]
    on = ["--on", text]
    code, _, err = run(command, config, *where, *on)
    assert code == 2 and "a mixture of experts" in err


def test_transformers_has_no_deepseek_of_the_first_version(experts, tmp_path, text, run):
    config = write_config(tmp_path / "m.yaml", mixture("deepseek", experts["llama"]))
    code, _, err = run("evaluate", config, "--text", text)
    assert code == 2 and "found:    deepseek" in err
