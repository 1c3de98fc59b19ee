"""Donors of one vocabulary size whose ids mean other tokens: refused or reported, never silent."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import resolved, write_donor
from transformers import AutoTokenizer

from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.errors import FrankenmergeError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def exchange(donor: Path, *pairs: tuple[str, str]) -> Path:
    """Exchange the ids of letters in a donor's tokenizer."""
    path = donor / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    for first, other in pairs:
        vocabulary[first], vocabulary[other] = vocabulary[other], vocabulary[first]
    path.write_text(json.dumps(data))
    return donor


def linear(*donors: Path, more: str = "") -> str:
    models = ", ".join(f"{{model: {donor}}}" for donor in donors)
    return f"merge_method: linear\nmodels: [{models}]\nparameters: {{weight: 1}}\n{more}\n"


def stacked(*donors: Path) -> str:
    slices = [{"sources": [{"model": str(donor), "layer_range": [0, 4]}]} for donor in donors]
    return yaml.safe_dump({"merge_method": "passthrough", "slices": slices})


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_donor(tmp_path_factory.mktemp("plain") / "plain", seed=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """All letters have other ids, in a vocabulary of the same size."""
    donor = write_donor(tmp_path_factory.mktemp("other") / "other", seed=2)
    return exchange(donor, *zip(LETTERS[:13], LETTERS[13:], strict=True))


def test_merged_rows_of_other_tokens_are_refused(plain, other):
    # The oracle: the same text has other ids, so row k of the two embeddings means two letters.
    first, second = (AutoTokenizer.from_pretrained(donor) for donor in (plain, other))
    assert len(first) == len(second) and first("abc")["input_ids"] != second("abc")["input_ids"]
    differ = sum(
        token != second.convert_ids_to_tokens(index) for token, index in first.get_vocab().items()
    )
    with pytest.raises(FrankenmergeError) as caught:
        resolved(parse_recipe(linear(plain, other), "r.yaml"))
    (fault,) = caught.value.faults
    assert fault.place == "recipe: tokenizer_source"
    assert str(plain) in fault.found and str(other) in fault.found
    assert f"{differ} of {len(first)} shared ids" in fault.found
    assert "union" in fault.remedy and "base" in fault.remedy


@pytest.mark.parametrize("source", ["union", "base"])
def test_the_remedies_are_accepted_and_match_rows_by_their_tokens(plain, other, source):
    splice = resolved(parse_recipe(linear(plain, other, more=f"tokenizer_source: {source}"), "r"))
    assert splice.remarks == ()
    assert splice.vocabulary is not None
    assert splice.vocabulary.tokens == AutoTokenizer.from_pretrained(plain).get_vocab()


def test_the_base_of_a_method_counts_as_a_model_that_is_merged(plain, other):
    text = (
        f"merge_method: task_arithmetic\nbase_model: {plain}\n"
        f"models: [{{model: {other}, parameters: {{weight: 0.5}}}}]\n"
    )
    with pytest.raises(FrankenmergeError) as caught:
        resolved(parse_recipe(text, "r.yaml"))
    assert caught.value.faults[0].place == "recipe: tokenizer_source"


def test_ends_of_one_donor_are_only_reported(plain, other):
    text = linear(plain, other, more=f"embedding: {plain}\nhead: {plain}")
    (remark,) = resolved(parse_recipe(text, "r.yaml")).remarks
    assert str(plain) in remark and str(other) in remark and "26 of 48 shared ids" in remark


def test_a_stack_says_which_rows_are_not_its_tokenizer_s(plain, other):
    (remark,) = resolved(parse_recipe(stacked(plain, other), "r.yaml")).remarks
    assert "26 of 48 shared ids mean other tokens" in remark
    assert f"id 1 is 'a' in {plain} and 'n' in {other}" in remark
    assert f"rows of its head are from {other}" in remark
    (remark,) = resolved(parse_recipe(stacked(plain, other, plain), "r.yaml")).remarks
    assert "rows of its" not in remark


def test_few_differing_ids_are_only_reported(tmp_path):
    """Two ids of 300 are below the limit of 1 %, four are above."""
    donors = [write_donor(tmp_path / str(n), seed=n, vocab_size=300) for n in range(3)]
    for donor in donors:
        path = donor / "tokenizer.json"
        data = json.loads(path.read_text())
        vocabulary = data["model"]["vocab"]
        vocabulary |= {chr(0x4E00 + index): index for index in range(len(vocabulary), 300)}
        path.write_text(json.dumps(data))
    exchange(donors[1], ("a", "b"))
    exchange(donors[2], ("a", "b"), ("c", "d"))
    (remark,) = resolved(parse_recipe(linear(*donors[:2]), "r.yaml")).remarks
    assert "2 of 300 shared ids" in remark
    with pytest.raises(FrankenmergeError, match=r"4 of 300 shared ids"):
        resolved(parse_recipe(linear(donors[0], donors[2]), "r.yaml"))


def test_equal_tokens_in_other_files_need_no_word(plain, tmp_path):
    donor = write_donor(tmp_path / "spaced", seed=3)
    path = donor / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert resolved(parse_recipe(linear(plain, donor), "r.yaml")).remarks == ()


def test_a_tokenizer_that_cannot_be_compared_is_reported(plain, tmp_path):
    donor = write_donor(tmp_path / "old", seed=3)
    (donor / "tokenizer.json").unlink()
    (donor / "tokenizer.model").write_bytes(b"sentencepiece")
    (remark,) = resolved(parse_recipe(stacked(plain, donor), "r.yaml")).remarks
    assert "cannot be compared" in remark and str(plain) in remark and str(donor) in remark


def test_commands_print_remarks_on_standard_error(plain, other, tmp_path, run):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(stacked(plain, other))
    status, printed, errors = run("check", recipe)
    assert status == 0 and errors.startswith("Note: ") and "Note: " not in printed
    assert "26 of 48 shared ids" in errors
    assert run("check", recipe, "--quiet")[2] == ""
    status, printed, errors = run("check", recipe, "--json")
    (remark,) = json.loads(printed)["remarks"]
    assert errors == f"Note: {remark}\n"
    status, printed, errors = run("merge", recipe, tmp_path / "out", "--json")
    assert status == 0 and json.loads(printed)["remarks"] == [remark]
    assert errors == f"Note: {remark}\n"
    status, _, errors = run("merge", recipe, tmp_path / "quiet", "--quiet")
    assert status == 0 and errors == ""


def test_remarks_of_stages_are_those_of_the_file(plain, other, tmp_path, run):
    recipe = tmp_path / "stages.yaml"
    last = {"merge_method": "passthrough", "models": [{"model": "middle"}]}
    recipe.write_text(f"name: middle\n{stacked(plain, other)}---\n{yaml.safe_dump(last)}")
    status, printed, _ = run("check", recipe, "--json")
    assert status == 0 and len(json.loads(printed)["remarks"]) == 1


def test_plan_reports_them_where_it_opens_donors(plain, other, tmp_path, run, text):
    alignment, donor = tmp_path / "a.alignment.safetensors", write_donor(tmp_path / "d", seed=2)
    assert run("align", plain, donor, "-o", alignment, "--quiet")[0] == 0
    shutil.copy(other / "tokenizer.json", donor)
    arguments = ("plan", alignment, "-o", tmp_path / "r.yaml", "--depth", 6)
    assert "Note: " not in run(*arguments)[2]
    status, _, errors = run(*arguments, "--verify", text)
    assert status == 0 and "Note: " in errors and "26 of 48 shared ids" in errors
