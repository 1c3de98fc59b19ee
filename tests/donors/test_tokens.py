"""A donor's tokens and settings: their values, their errors, and that each file is read once."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import write_donor

from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.donors.tokens import ID_LIMIT
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.tokenizer import tokenizer_files
from frankenmerge.splicing.vocabulary import result_vocabulary
from frankenmerge.storage import safetensors_header


@pytest.fixture
def reads(monkeypatch) -> Counter[Path]:
    """How often `read_json` has read each file."""
    counts: Counter[Path] = Counter()
    read_json = safetensors_header.read_json

    def counting(path: Path, what: str):
        counts[path] += 1
        return read_json(path, what)

    for name, module in list(sys.modules.items()):
        if name.startswith("frankenmerge.") and getattr(module, "read_json", None) is read_json:
            monkeypatch.setattr(module, "read_json", counting)
    return counts


def with_tokenizer(donor: Path, folder: Path, content: str) -> Checkpoint:
    copy = Path(shutil.copytree(donor, folder))
    (copy / "tokenizer.json").write_text(content)
    return open_checkpoint(str(copy))


def test_tokens_are_the_vocabulary_and_what_was_added_to_it(donors, tmp_path):
    added = [{"id": 7, "content": "<bos>"}, {"id": 1, "content": "b"}]
    content = {"model": {"vocab": {"a": 0, "b": 3}}, "added_tokens": added}
    donor = with_tokenizer(donors["a"], tmp_path / "mapping", json.dumps(content))
    assert donor.tokens == {"a": 0, "b": 1, "<bos>": 7}
    assert donor.tokenizer_json == content


def test_tokens_of_a_list_have_their_positions_as_ids(donors, tmp_path):
    content = {"model": {"type": "Unigram", "vocab": [["x", -1.5], ["y", 0.0]]}}
    donor = with_tokenizer(donors["a"], tmp_path / "list", json.dumps(content))
    assert donor.tokens == {"x": 0, "y": 1}


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        '{"model": null}',
        '{"model": {"vocab": 3}}',
        '{"model": {"vocab": [[]]}}',
        '{"model": {"vocab": {"a": "x"}}}',
        '{"model": {"vocab": {"a": true}}}',
        '{"model": {"vocab": {"a": -1}}}',
        f'{{"model": {{"vocab": {{"a": {ID_LIMIT}}}}}}}',
        '{"model": {"vocab": {}}, "added_tokens": 3}',
        '{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}',
    ],
)
def test_a_tokenizer_without_tokens_is_refused(donors, tmp_path, content):
    donor = with_tokenizer(donors["a"], tmp_path / "odd", content)
    with pytest.raises(FrankenmergeError) as caught:
        _ = donor.tokens
    (fault,) = caught.value.faults
    assert fault.place == str(donor.path / "tokenizer.json")
    assert fault.expected == "tokens and their ids"


def test_the_largest_id_is_below_the_limit(donors, tmp_path):
    content = json.dumps({"model": {"vocab": {"a": ID_LIMIT - 1}}})
    assert with_tokenizer(donors["a"], tmp_path / "large", content).tokens == {"a": ID_LIMIT - 1}


def test_a_missing_tokenizer_is_refused(donors, tmp_path):
    copy = Path(shutil.copytree(donors["a"], tmp_path / "mute"))
    (copy / "tokenizer.json").unlink()
    donor = open_checkpoint(str(copy))
    for attribute in ("tokenizer_json", "tokens"):
        with pytest.raises(FrankenmergeError) as caught:
            getattr(donor, attribute)
        (fault,) = caught.value.faults
        assert fault.place == str(copy / "tokenizer.json") and fault.found == "no such file"


def test_settings_are_a_json_object_or_empty(donors, tmp_path):
    copy = Path(shutil.copytree(donors["a"], tmp_path / "copy"))
    settings = copy / "tokenizer_config.json"
    settings.write_text('{"chat_template": "x"}')
    assert open_checkpoint(str(copy)).tokenizer_settings == {"chat_template": "x"}
    settings.write_text("[]")
    with pytest.raises(FrankenmergeError) as caught:
        _ = open_checkpoint(str(copy)).tokenizer_settings
    assert caught.value.faults[0].place == str(settings)
    settings.unlink()
    assert open_checkpoint(str(copy)).tokenizer_settings == {}


def test_the_generation_config_is_its_bytes_or_nothing(donors, tmp_path):
    copy = Path(shutil.copytree(donors["a"], tmp_path / "copy"))
    (copy / "generation_config.json").write_bytes(b'{"temperature":  0.25}')
    assert open_checkpoint(str(copy)).generation_config == b'{"temperature":  0.25}'
    (copy / "generation_config.json").unlink()
    assert open_checkpoint(str(copy)).generation_config is None


def test_each_file_is_read_once_by_one_checkpoint(donors, reads):
    donor = open_checkpoint(str(donors["a"]))
    for _ in range(3):
        assert donor.tokens and donor.tokenizer_json and donor.tokenizer_settings
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    assert reads == {donor.path / name: 1 for name in names}


def test_a_union_reads_each_file_of_its_donors_once_and_changes_none_of_them(
    donors, tmp_path, reads
):
    other = write_donor(tmp_path / "other", seed=5, vocab_size=51)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"]["é"] = 48
    (other / "tokenizer.json").write_text(json.dumps(content))
    recipe = parse_recipe(
        f"merge_method: linear\nmodels: [{{model: {donors['a']}}}, {{model: {other}}}]\n"
        "parameters: {weight: 1}\ntokenizer_source: union\nchat_template: chatml\n",
        "r.yaml",
    )
    opened = open_donors(recipe)
    vocabulary = result_vocabulary(recipe, opened)
    first = tokenizer_files(recipe, opened, vocabulary)
    assert "é" in json.loads(first["tokenizer.json"])["model"]["vocab"]
    assert tokenizer_files(recipe, opened, vocabulary) == first
    read = {path: count for path, count in reads.items() if path.name != "r.yaml"}
    assert {path.name for path in read} >= {"config.json", "tokenizer.json"}
    assert set(read.values()) == {1}
    for donor in opened.values():
        assert donor.tokenizer_json == json.loads((donor.path / "tokenizer.json").read_text())
