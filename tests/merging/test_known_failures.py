"""What other merge tools do wrong silently, or fail at: here the right result, or an error.

One test for each, from a recipe file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import changed, write_donor
from killed import tree
from means import tensors_of
from transformers import AutoModelForCausalLM

from frankenmerge.splicing.methods import METHODS

HEAD, EMBEDDING, UP = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.2.mlp.up_proj.weight",
)


def loaded(folder: Path):
    """The model, which takes every tensor of the folder and lacks none."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    return model


def source(model: Path, start: int = 0, stop: int = 4, **parameters) -> dict:
    return {"model": str(model), "layer_range": [start, stop]} | (
        {"parameters": parameters} if parameters else {}
    )


def slices(*parts: list[dict]) -> list[dict]:
    return [{"sources": part} for part in parts]


def models(*folders: Path) -> list[dict]:
    return [{"model": str(folder)} for folder in folders]


@pytest.fixture
def merged(tmp_path, run):
    """Merge a recipe (its keys, or its text) into a new folder and return that."""

    def call(*options: str, text: str = "", **keys) -> Path:
        output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        (tmp_path / "r.yaml").write_text(text or yaml.safe_dump(keys, sort_keys=False))
        code, _, err = run("merge", tmp_path / "r.yaml", output, *options)
        assert code == 0, err
        return output

    return call


@pytest.fixture
def refused(tmp_path, run):
    """Merge a recipe that is refused with status 2 and nothing written; returns the messages."""

    def call(*options: str, text: str = "", **keys) -> str:
        (tmp_path / "r.yaml").write_text(text or yaml.safe_dump(keys, sort_keys=False))
        code, _, err = run("merge", tmp_path / "r.yaml", tmp_path / "refused", *options)
        assert code == 2 and "Traceback" not in err and not list(tmp_path.glob("*refused*"))
        return " ".join(err.split())

    return call


# Wrong results


@pytest.mark.parametrize(
    "family, changes, part",
    [
        ("olmo2", {}, "q_norm"),
        ("llama", {"attention_bias": True, "mlp_bias": True}, "bias"),
    ],
)
def test_norms_of_queries_and_biases_dropped(tmp_path, merged, family, changes, part):
    one, two = (
        write_donor(tmp_path / name, family, seed=seed, **changes) for seed, name in enumerate("xy")
    )
    output = merged(merge_method="linear", models=models(one, two), parameters={"weight": 1})
    a, b, found = tensors_of(one), tensors_of(two), loaded(output).state_dict()
    names = [name for name in a if part in name]
    assert len(names) >= 4
    assert all(torch.equal(found[name], (a[name] + b[name]) / 2) for name in names)


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_the_first_of_two_sources_of_one_model_discarded(donors, merged, method):
    parameters, donor = {"weight": 0.5} if method == "linear" else {"t": 0.5}, donors["a"]
    pair = slices([source(donor, 0, 2), source(donor, 2, 4)])
    output = merged(merge_method=method, base_model=str(donor), parameters=parameters, slices=pair)
    given, found = tensors_of(donor), tensors_of(output)
    one, two = (given[f"model.layers.{index}.mlp.up_proj.weight"].double() for index in (0, 2))
    if method == "slerp":
        angle = torch.arccos((one * two).sum() / one.norm() / two.norm())
        wanted = torch.sin(angle / 2) / torch.sin(angle) * (one + two)
    else:
        wanted = (one + two) / 2
    torch.testing.assert_close(
        found["model.layers.0.mlp.up_proj.weight"].double(), wanted, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("start, stop", [(3, 1), (2, 2)])
def test_reversed_and_empty_ranges_accepted(donors, refused, start, stop):
    parts = slices([source(donors["a"], 0, 2)], [source(donors["a"], start, stop)])
    assert "slices[1].sources[0].layer_range" in refused(merge_method="passthrough", slices=parts)
    assert "slices" in refused(merge_method="passthrough", slices=[])


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("dtpye: float16", "dtype"),
        ("parameters: {weight: 1, densty: 0.5}", "density"),
        ("parameters: {weight: 1, normalise: true}", "normalize"),
    ],
)
def test_misspelt_keys_ignored(donors, refused, wrong, right):
    text = (
        f"merge_method: ties\nbase_model: {donors['a']}\n"
        f"models: [{{model: {donors['b']}}}]\n{wrong}\n"
    )
    assert f"write {right}" in refused(text=text)


def test_the_last_of_two_equal_keys_taken(donors, refused):
    text = (
        f"merge_method: linear\nmodels: [{{model: {donors['a']}}}]\n"
        f"parameters: {{weight: 1}}\ndtype: float16\ndtype: float32\n"
    )
    assert "'dtype' occurs twice" in refused(text=text)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["slerp", "karcher", "model_stock"])
def test_one_nan_spread_over_a_tensor(donors, tmp_path, refused, method, value):
    def spoil(arrays):
        arrays[UP].flat[-1] = value
        return arrays

    spoiled = changed(donors["a"], tmp_path / "spoiled", spoil)
    base = {} if method == "karcher" else {"base_model": str(donors["b"])}
    several = models(donors["a"], spoiled) if method != "slerp" else models(spoiled)
    report = refused(
        merge_method=method,
        models=several,
        parameters={"t": 0.5} if method == "slerp" else {},
        **base,
    )
    assert f"{spoiled}: {UP}" in report and "NaN or Inf" in report and "--allow-nan" in report


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "method", ["slerp", "karcher", "model_stock", "multislerp", "nuslerp", "sce", "della"]
)
def test_one_nan_that_is_allowed_spread_over_a_tensor(donors, tmp_path, merged, run, method, value):
    def spoil(arrays):
        arrays[UP].flat[-1] = value
        return arrays

    spec = METHODS[method]
    listed = models(changed(donors["a"], tmp_path / "spoiled", spoil), donors["a"])[
        : spec.models[1]
    ]
    weights = {"weight": 0.5} if "weight" in spec.parameters else {}
    base = {"base_model": str(donors["b"])} if spec.base == "required" else {}
    output = merged(
        "--allow-nan",
        merge_method=method,
        models=listed,
        parameters={"t": 0.5} if method == "slerp" else weights,
        **base,
    )
    bad = {
        name: (~tensor.isfinite()).nonzero().tolist()
        for name, tensor in tensors_of(output).items()
        if not tensor.isfinite().all()
    }
    assert list(bad) == [UP] and len(bad[UP]) == 1
    code, report, _ = run("check", output)
    assert code == 0, report


def test_parameters_that_make_no_finite_model_accepted(donors, refused):
    a, b = str(donors["a"]), str(donors["b"])
    text = (
        f"merge_method: slerp\nbase_model: {a}\nmodels: [{{model: {b}}}]\n"
        f"parameters: {{t: NUMBER}}\n"
    )
    for number in (".nan", ".inf", "-.inf"):
        assert "parameters.t" in refused(text=text.replace("NUMBER", number))
    pair = [{"model": a, "parameters": {"weight": 1}}, {"model": b, "parameters": {"weight": -1}}]
    assert "sum is not 0" in refused(merge_method="linear", models=pair)


def test_types_in_file_and_config_that_differ(tmp_path, merged, refused):
    half, brain = (
        write_donor(tmp_path / name, seed=seed, dtype=name)
        for seed, name in enumerate(("float16", "bfloat16"))
    )
    stack = {
        "merge_method": "passthrough",
        "slices": slices([source(half, 0, 2)], [source(brain, 2, 4)]),
    }
    mean = {"merge_method": "linear", "models": models(half, brain), "parameters": {"weight": 1}}
    for recipe in (stack, mean):
        assert "dtype" in refused(**recipe)
        output = merged(**recipe, dtype="bfloat16")
        config = json.loads((output / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
        assert {tensor.dtype for tensor in tensors_of(output).values()} == {torch.bfloat16}
        loaded(output)


@pytest.mark.parametrize(
    "method, parameters",
    [
        ("linear", {"weight": 1}),
        ("slerp", {"t": 0.5}),
        ("ties", {"weight": 1, "density": 0.5}),
        ("passthrough", {}),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_donors_of_other_vocabulary_or_width_merged_or_skipped(
    donors, tmp_path, merged, refused, method, parameters, first
):
    pair = [donors["a"], write_donor(tmp_path / "few", seed=9, vocab_size=40)]
    base, other = pair[first], pair[1 - first]
    recipe = {"merge_method": method, "base_model": str(base), "parameters": parameters}

    def of(other: Path) -> dict:
        if method == "passthrough":
            return recipe | {"slices": slices([source(base, 0, 2)], [source(other, 2, 4)])}
        return recipe | {"models": models(base, other)}

    assert "40" in refused(**of(other)) and "hidden_size" in refused(**of(donors["wide"]))
    model = loaded(merged(**of(other), tokenizer_source="base"))
    assert (
        model.config.vocab_size
        == model.get_input_embeddings().weight.shape[0]
        == model.lm_head.weight.shape[0]
    )


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_methods_that_differ_at_every_run(donors, merged, method):
    recipe = {
        "merge_method": method,
        "base_model": str(donors["a"]),
        "parameters": {"weight": 1, "density": 0.5},
        "slices": slices([source(donors["a"]), source(donors["deep"])]),
    }
    one, same, other = merged(**recipe), merged(**recipe), merged(**recipe, seed=1)
    assert tree(one) == tree(same)
    assert not torch.equal(tensors_of(one)[UP], tensors_of(other)[UP])


def test_a_missing_tokenizer_no_failure(donors, tmp_path, refused):
    mute = changed(donors["a"], tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    assert "a tokenizer" in refused(
        merge_method="linear", models=models(mute, donors["b"]), parameters={"weight": 1}
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["passthrough", "linear"])
def test_experts_in_another_layout_than_the_donor_s(tmp_path, merged, family, method):
    one, two = (write_donor(tmp_path / name, family, seed=seed) for seed, name in enumerate("xy"))
    parts = slices([source(one)]) if method == "passthrough" else slices([source(one), source(two)])
    output = merged(
        merge_method=method,
        slices=parts,
        parameters={} if method == "passthrough" else {"weight": 1},
    )
    a, b, found = tensors_of(one), tensors_of(two), tensors_of(output)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in a.items()
    }
    assert sum("experts.3." in name for name in found) == 4 * 3
    assert all(
        torch.equal(tensor, a[name] if method == "passthrough" else (a[name] + b[name]) / 2)
        for name, tensor in found.items()
    )
    loaded(output)


def test_parameters_of_a_slice_that_is_not_merged_ignored(donors, refused, merged):
    recipe = {"merge_method": "task_arithmetic", "base_model": str(donors["a"])}
    assert "slices[0]" in refused(**recipe, slices=slices([source(donors["b"], weight=0.5)]))
    both = merged(**recipe, slices=slices([source(donors["a"]), source(donors["b"], weight=0.5)]))
    a, b, found = tensors_of(donors["a"]), tensors_of(donors["b"]), tensors_of(both)
    torch.testing.assert_close(found[UP], (a[UP] + b[UP]) / 2)


# Failures


def test_config_and_tokenizer_of_a_donor_chosen_by_hash_order(donors, tmp_path):
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(
            {
                "merge_method": "linear",
                "models": models(donors["b"], donors["a"]),
                "parameters": {"weight": 1},
            }
        )
    )
    command = [sys.executable, "-m", "frankenmerge", "merge", str(tmp_path / "r.yaml")]
    for number in ("1", "2"):
        subprocess.run(
            [*command, str(tmp_path / number)],
            env=os.environ | {"PYTHONHASHSEED": number},
            check=True,
            capture_output=True,
        )
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


@pytest.mark.parametrize("first, second", ["ab", "ba"])
def test_no_head_or_one_that_is_ignored_for_tied_and_untied_donors(donors, merged, first, second):
    output = merged(
        merge_method="linear",
        models=models(donors[first], donors[second]),
        parameters={"weight": 1},
    )
    a, b, found = tensors_of(donors["a"]), tensors_of(donors["b"]), tensors_of(output)
    model = loaded(output)
    assert torch.equal(model.lm_head.weight, (a[HEAD] + b[EMBEDDING]) / 2) and torch.equal(
        found[HEAD], model.lm_head.weight
    )
    assert torch.equal(model.model.embed_tokens.weight, (a[EMBEDDING] + b[EMBEDDING]) / 2)


def test_a_model_card_that_asks_the_hub_for_a_relative_donor(donors, tmp_path, run, monkeypatch):
    changed(donors["a"], tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    for method, keys in (("passthrough", {}), ("linear", {"parameters": {"weight": 1}})):
        (tmp_path / "r.yaml").write_text(
            yaml.safe_dump({"merge_method": method, "models": [{"model": "org/model"}], **keys})
        )
        code, _, err = run("merge", "r.yaml", method)
        assert code == 0, err
        assert (tmp_path / method / "tokenizer.json").is_file() and "org/model" in (
            tmp_path / method / "README.md"
        ).read_text()


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer": {"source": "union"}},
        {"tokenizer": {"source": "base", "pad_to_multiple_of": 64}},
        {"chat_template": "chatml"},
    ],
)
def test_the_generation_config_dropped_with_a_tokenizer(donors, tmp_path, merged, keys):
    donor = changed(donors["a"], tmp_path / "own")
    (donor / "generation_config.json").write_text('{"temperature": 0.25}')
    output = merged(
        merge_method="linear", models=models(donor, donors["b"]), parameters={"weight": 1}, **keys
    )
    assert json.loads((output / "generation_config.json").read_text())["temperature"] == 0.25
    assert loaded(output).generation_config.temperature == 0.25


def test_positions_of_other_lengths_with_matched_tokens(tmp_path, merged, refused):
    long = write_donor(tmp_path / "long", "gpt2", seed=1)
    short = write_donor(tmp_path / "short", "gpt2", seed=2, n_positions=32, vocab_size=40)
    recipe = {
        "merge_method": "linear",
        "models": models(long, short),
        "parameters": {"weight": 1},
        "tokenizer_source": "union",
    }
    assert "wpe" in refused(**recipe)
