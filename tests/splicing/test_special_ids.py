"""Special token ids of a result: those of its tokenizer, in config and generation config."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import VOCABULARY, changed, resolved, write_donor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from frankenmerge.artefacts.recipe_file import parse_recipe

ENTRY = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def add_tokens(donor: Path, tokens: dict[str, int]) -> Path:
    """Add special tokens to a donor's tokenizer."""
    path = donor / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"] += [
        {"id": index, "content": token, "special": True, **ENTRY} for token, index in tokens.items()
    ]
    path.write_text(json.dumps(data))
    return donor


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_donor(tmp_path_factory.mktemp("plain") / "plain", seed=1)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """A donor whose turns end with an id of its own, in all of its files."""
    donor = write_donor(
        tmp_path_factory.mktemp("chatty") / "chatty",
        seed=2,
        vocab_size=VOCABULARY + 2,
        eos_token_id=[0, VOCABULARY + 1],
        pad_token_id=VOCABULARY,
    )
    return add_tokens(donor, {"<|im_start|>": VOCABULARY, "<|im_end|>": VOCABULARY + 1})


def recipe(*donors: Path, **keys) -> str:
    models = [{"model": str(donor)} for donor in donors]
    data = {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}}
    return yaml.safe_dump(data | keys)


def merged(run, text: str, folder: Path) -> Path:
    (folder / "r.yaml").write_text(text)
    assert run("merge", folder / "r.yaml", folder / "out")[0] == 0
    return folder / "out"


@torch.no_grad()
def test_a_tokenizer_of_another_donor_brings_its_special_ids(plain, chatty, run, tmp_path):
    out = merged(run, recipe(plain, chatty, tokenizer_source=str(chatty)), tmp_path)
    oracle, result = (GenerationConfig.from_pretrained(folder) for folder in (chatty, out))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(result, key) == getattr(oracle, key)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.eos_token_id == [0, VOCABULARY + 1]
    assert model.config.pad_token_id == VOCABULARY
    ids = tokenizer("a<|im_end|>", return_tensors="pt").input_ids
    assert ids[0, -1] in model.generation_config.eos_token_id and model(ids).logits.isfinite().all()


def test_all_other_settings_of_generation_are_the_base_s(plain, chatty, run, tmp_path):
    base = changed(plain, tmp_path / "base")
    settings = {"temperature": 0.25, "do_sample": True, "eos_token_id": 0, "suppress_tokens": [3]}
    (base / "generation_config.json").write_text(json.dumps(settings))
    out = merged(run, recipe(base, chatty, tokenizer_source=str(chatty)), tmp_path)
    result = json.loads((out / "generation_config.json").read_text())
    assert result["temperature"] == 0.25 and result["eos_token_id"] == [0, VOCABULARY + 1]
    assert "suppress_tokens" not in result  # ids of the base's tokenizer


def test_without_a_file_of_its_own_the_ids_are_those_of_the_config(plain, chatty, run, tmp_path):
    other = changed(chatty, tmp_path / "other")
    (other / "generation_config.json").unlink()
    out = merged(run, recipe(plain, other, tokenizer_source=str(other)), tmp_path)
    assert GenerationConfig.from_pretrained(out).eos_token_id == [0, VOCABULARY + 1]


def test_the_base_s_own_tokenizer_keeps_its_files(plain, chatty, run, tmp_path):
    out = merged(run, recipe(plain, chatty, tokenizer_source="base"), tmp_path)
    content = (plain / "generation_config.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == content


@pytest.mark.parametrize("source", ["union", "base"])
def test_the_end_of_a_turn_in_a_chat_template_ends_generation(plain, chatty, run, tmp_path, source):
    text = recipe(plain, chatty, tokenizer_source=source, chat_template="chatml")
    out = merged(run, text, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = GenerationConfig.from_pretrained(out).eos_token_id
    known = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if source == "union":
        turn = [{"role": "assistant", "content": "a"}]
        assert known in tokenizer.apply_chat_template(turn)["input_ids"]
        assert ids == [0, known]
        assert AutoModelForCausalLM.from_pretrained(out).config.eos_token_id == [0, known]
    else:
        assert ids == 0
    remarks = [line for line in resolved(parse_recipe(text, "r")).remarks if "<|im_end|>" in line]
    assert len(remarks) == (source == "base")


def test_ids_beyond_the_matrix_are_dropped_with_a_remark(plain, run, tmp_path):
    donor = changed(plain, tmp_path / "beyond", config=lambda own: own | {"pad_token_id": 99})
    settings = {"eos_token_id": [0, 77], "pad_token_id": 99}
    (donor / "generation_config.json").write_text(json.dumps(settings))
    text = recipe(donor, plain)
    out = merged(run, text, tmp_path)
    remarks = resolved(parse_recipe(text, "r.yaml")).remarks
    assert sum("99" in line for line in remarks) == 2 and sum("77" in line for line in remarks) == 1
    model = AutoModelForCausalLM.from_pretrained(out)
    generation = model.generation_config
    assert model.config.pad_token_id is None and generation.pad_token_id is None
    assert generation.eos_token_id == [0]


@torch.no_grad()
def test_tokens_without_a_row_are_reported_and_get_one_where_the_recipe_names_the_tokenizer(
    plain, run, tmp_path
):
    donor = add_tokens(changed(plain, tmp_path / "grown"), {"[PAD]": VOCABULARY})
    (remark,) = resolved(parse_recipe(recipe(donor, plain), "r.yaml")).remarks
    assert "[PAD] (48)" in remark and "tokenizer_source: base" in remark
    text = recipe(donor, plain, tokenizer_source="base")
    (remark,) = resolved(parse_recipe(text, "r.yaml")).remarks
    assert "rows of zeros for 1 of 49 tokens" in remark and "[PAD]" in remark
    out = merged(run, text, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer("a[PAD]", return_tensors="pt").input_ids
    assert ids.tolist()[0][-1] == VOCABULARY and model(ids).logits.isfinite().all()
