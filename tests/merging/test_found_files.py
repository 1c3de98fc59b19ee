"""Donors as they are found: files and tensors that no plain checkpoint has, or that are wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import changed, resolved, write_donor
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.errors import FrankenmergeError

IDS = torch.arange(1, 20)[None]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9085698\n"


def average(*donors: Path, **keys) -> str:
    models = [{"model": str(donor)} for donor in donors]
    data = {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}}
    return yaml.safe_dump(data | keys)


@pytest.fixture
def merged(run, tmp_path):
    """Merge a recipe; returns the folder."""

    def call(text: str) -> Path:
        (tmp_path / "r.yaml").write_text(text)
        status, _, errors = run("merge", tmp_path / "r.yaml", tmp_path / "out")
        assert status == 0, errors
        return tmp_path / "out"

    return call


def remarks_of(text: str) -> tuple[str, ...]:
    return resolved(parse_recipe(text, "r.yaml")).remarks


# How a donor's file was stored


@torch.no_grad()
def test_a_leftover_of_quantisation_in_config_is_not_copied(donors, merged, tmp_path):
    setting = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    left = changed(donors["a"], tmp_path / "left", config=lambda own: own | setting)
    text = average(left, donors["a"])
    (remark,) = remarks_of(text)
    assert remark.startswith("quantization_config") and str(left) in remark
    model = AutoModelForCausalLM.from_pretrained(merged(text))
    assert not hasattr(model.config, "quantization_config")
    expected = AutoModelForCausalLM.from_pretrained(donors["a"])
    assert torch.allclose(model(IDS).logits, expected(IDS).logits, atol=1e-6)


# Tensors next to a model


def add(**tensors: np.ndarray):
    return lambda arrays: arrays | {key.replace("__", "."): value for key, value in tensors.items()}


SCALE = np.full(1, 3, np.float32)
STRAY = {
    "scales": {
        f"model__layers__{index}__self_attn__q_proj__{kind}": SCALE
        for index in range(4)
        for kind in ("weight_scale", "input_scale")
    },
    "one scale": {"model__layers__2__self_attn__k_scale": SCALE},
    "value head": {"v_head__summary__weight": np.ones((1, 16), np.float32)},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", STRAY)
def test_tensors_that_the_model_does_not_read_are_left_out(donors, merged, run, tmp_path, kind):
    stray = changed(donors["a"], tmp_path / "stray", add(**STRAY[kind]))
    other = write_donor(tmp_path / "other", seed=9)
    text = average(stray, other)
    (remark,) = remarks_of(text)
    assert str(stray) in remark and min(STRAY[kind]).replace("__", ".") in remark
    out = merged(text)
    assert set(load_file(out / "model.safetensors")) == set(
        load_file(donors["a"] / "model.safetensors")
    )
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    states = [AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (stray, other)]
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, (states[0][name] + states[1][name]) / 2, atol=1e-6), name
    assert run("check", out)[0] == 0


def test_a_donor_with_a_value_head_is_evaluated(donors, run, text, tmp_path):
    stray = changed(donors["a"], tmp_path / "stray", add(**STRAY["value head"]))
    results = [
        json.loads(run("evaluate", donor, "--text", text, "--json")[1])["models"][0]
        for donor in (stray, donors["a"])
    ]
    assert results[0]["texts"] == results[1]["texts"]


# The tokenizer's files


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "merges.txt"])
def test_a_pointer_in_place_of_a_file_is_refused(donors, run, tmp_path, name):
    folder = changed(donors["a"], tmp_path / "pointer")
    (folder / name).write_text(POINTER)
    (tmp_path / "r.yaml").write_text(average(folder))
    for command in (("check",), ("merge",)):
        status, _, errors = run(
            *command, tmp_path / "r.yaml", *[tmp_path / "o"] * (command != ("check",))
        )
        assert status == 2 and str(folder / name) in errors and "git lfs pull" in errors
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", b"[1, 2]"),
        ("tokenizer.json", b"{"),
        ("special_tokens_map.json", b"\xff\xfe"),
        ("chat_template.jinja", b"\xff\xfe"),
        ("generation_config.json", b"[]"),
        ("vocab.json", b""),
    ],
)
def test_a_small_file_that_cannot_be_read_is_refused(donors, tmp_path, name, content):
    folder = changed(donors["a"], tmp_path / "broken")
    (folder / name).write_bytes(content)
    with pytest.raises(FrankenmergeError) as caught:
        resolved(parse_recipe(average(folder), "r.yaml"))
    assert {fault.place for fault in caught.value.faults} == {str(folder / name)}


@pytest.fixture
def with_templates(donors, tmp_path) -> Path:
    """A donor with two named chat templates, as transformers writes them."""
    folder = changed(donors["a"], tmp_path / "templates")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "D{{ messages[0].content }}", "tool_use": "T"}
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    return folder


def test_additional_chat_templates_are_copied(with_templates, merged, run):
    out = merged(average(with_templates))
    assert AutoTokenizer.from_pretrained(out).chat_template == {
        "default": "D{{ messages[0].content }}",
        "tool_use": "T",
    }
    assert run("check", out)[0] == 0
    (out / "additional_chat_templates" / "more.jinja").write_text("x")
    status, _, errors = run("check", out)
    assert status == 2 and "more.jinja" in errors


def test_a_template_of_the_recipe_replaces_all(with_templates, merged):
    tokenizer = AutoTokenizer.from_pretrained(
        merged(average(with_templates, chat_template="alpaca"))
    )
    assert isinstance(tokenizer.chat_template, str) and "Instruction" in tokenizer.chat_template


def test_a_link_out_of_the_folder_of_templates_is_refused(with_templates, tmp_path):
    secret = tmp_path / "secret.jinja"
    secret.write_text("secret")
    (with_templates / "additional_chat_templates" / "s.jinja").symlink_to(secret)
    with pytest.raises(FrankenmergeError, match=r"s\.jinja"):
        resolved(parse_recipe(average(with_templates), "r.yaml"))


def test_stages_keep_additional_templates(with_templates, run, text, tmp_path):
    stage = f"name: middle\n{average(with_templates)}"
    last = {"merge_method": "passthrough", "models": [{"model": "middle"}]}
    (tmp_path / "s.yaml").write_text(f"{stage}---\n{yaml.safe_dump(last)}")
    assert run("merge", tmp_path / "s.yaml", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert run("evaluate", tmp_path / "s.yaml", "--text", text)[0] == 0


# Rows that pad the embedding


@torch.no_grad()
@pytest.mark.parametrize("same", [True, False])
def test_padded_rows_stay_whether_tokenizers_differ_or_not(merged, tmp_path, same):
    first, other = (write_donor(tmp_path / str(seed), seed=seed, vocab_size=64) for seed in (1, 2))
    if not same:
        path = other / "tokenizer.json"
        data = json.loads(path.read_text())
        vocabulary = data["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        path.write_text(json.dumps(data))
    out = merged(average(first, other, tokenizer_source="base"))
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizers = [AutoTokenizer.from_pretrained(each) for each in (first, other)]
    rows = [
        AutoModelForCausalLM.from_pretrained(each).model.embed_tokens.weight
        for each in (first, other)
    ]
    assert model.config.vocab_size == 64 and len(tokenizers[0]) == 48
    embedding = model.model.embed_tokens.weight
    for letter in "abz":
        ids = [each.convert_tokens_to_ids(letter) for each in tokenizers]
        mean = (rows[0][ids[0]] + rows[1][ids[1]]) / 2
        assert torch.allclose(embedding[ids[0]], mean, atol=1e-6)
    padding = (rows[0] + rows[1])[48:] / 2 if same else rows[0][48:]
    assert torch.allclose(embedding[48:], padding, atol=1e-6)


# Tokens of other donors under a base that ignores merges


def words(folder: Path, **more: int) -> Path:
    """Give a donor's tokenizer merges and words, as of Llama 3."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    data["pre_tokenizer"] = {"type": "Whitespace"}
    data["model"] |= {"ignore_merges": True}
    data["model"]["vocab"] |= more
    path.write_text(json.dumps(data))
    return folder


def test_a_union_that_would_cut_text_in_another_way_is_refused(donors, tmp_path):
    base = words(changed(donors["a"], tmp_path / "base"))
    other = words(write_donor(tmp_path / "other", seed=8, vocab_size=49), the=48)
    # The oracle: with the word in its vocabulary, the base's tokenizer cuts text differently.
    grown = words(changed(donors["a"], tmp_path / "grown"), the=48)
    ids = [AutoTokenizer.from_pretrained(each)("the")["input_ids"] for each in (base, grown)]
    assert len(ids[0]) == 3 and ids[1] == [48]
    with pytest.raises(FrankenmergeError) as caught:
        resolved(parse_recipe(average(base, other, tokenizer_source="union"), "r.yaml"))
    (fault,) = caught.value.faults
    assert "ignore_merges" in fault.found and "'the'" in fault.found
    assert "base" in fault.remedy


def test_added_tokens_join_a_base_that_ignores_merges(donors, merged, tmp_path):
    base = words(changed(donors["a"], tmp_path / "base"))
    other = words(write_donor(tmp_path / "other", seed=8, vocab_size=49))
    path = other / "tokenizer.json"
    data = json.loads(path.read_text())
    entry = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data["added_tokens"].append({"id": 48, "content": "<|im_end|>", "special": True, **entry})
    path.write_text(json.dumps(data))
    out = merged(average(base, other, tokenizer_source="union"))
    made, before = (AutoTokenizer.from_pretrained(each) for each in (out, base))
    assert made("the cat")["input_ids"] == before("the cat")["input_ids"]
    assert made("a<|im_end|>")["input_ids"][-1] == 48
