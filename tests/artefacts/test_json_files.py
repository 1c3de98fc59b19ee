"""Evidence, evaluation and provenance: what is written is read, and anything else is refused."""

import json
import math
from types import ModuleType
from typing import NamedTuple

import invented
import pytest

from frankenmerge.artefacts import evaluation, evidence, provenance
from frankenmerge.artefacts.json_files import Record
from frankenmerge.errors import FrankenmergeError


class Artefact(NamedTuple):
    module: ModuleType
    content: dict
    """Of version 0.1, written out by hand."""
    required: tuple[str, ...]


ARTEFACTS = {
    "evidence": Artefact(evidence, invented.evidence(), ("plans", "constraints")),
    "evaluation": Artefact(evaluation, invented.evaluation(), ("kind", "models")),
    "provenance": Artefact(
        provenance, invented.provenance(), ("frankenmerge", "recipe_sha256", "donors")
    ),
}


@pytest.fixture(params=ARTEFACTS)
def artefact(request) -> Artefact:
    return ARTEFACTS[request.param]


def load(artefact: Artefact, path, content) -> Record:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return artefact.module.load(path)


def refusal(artefact: Artefact, path, content) -> FrankenmergeError:
    with pytest.raises(FrankenmergeError) as raised:
        load(artefact, path, content)
    for fault in raised.value.faults:
        assert fault.place.startswith(str(path)) and all(fault)
    return raised.value


def test_a_file_of_version_0_1_is_read_and_written_as_it_was(artefact, tmp_path):
    record = load(artefact, tmp_path / "a.json", artefact.content)
    artefact.module.save(record, tmp_path / "b.json")
    text = (tmp_path / "b.json").read_text(encoding="utf-8")
    # The text, not only the values: keys are in their order, 1 stays 1, no key is added.
    indent = 1 if artefact.module is evidence else 2
    assert text == json.dumps(artefact.content, indent=indent, ensure_ascii=False) + "\n"


def test_keys_of_a_newer_version_are_ignored_and_not_written(artefact, tmp_path):
    newer = artefact.content | {"invented_key": {"a": 1}}
    record = load(artefact, tmp_path / "a.json", newer)
    assert record == load(artefact, tmp_path / "b.json", artefact.content)
    assert "invented_key" not in record.as_json()


def test_a_newer_kind_is_refused_with_the_remedy(artefact, tmp_path):
    newer = artefact.module.KIND.removesuffix("/1") + "/2"
    error = refusal(artefact, tmp_path / "a.json", artefact.content | {"kind": newer})
    assert newer in error.faults[0].found and "update frankenmerge" in error.faults[0].remedy


def test_another_kind_is_refused(artefact, tmp_path):
    for kind in ("frankenmerge.invented/1", 3, None, "frankenmerge.evaluation/x"):
        error = refusal(artefact, tmp_path / "a.json", artefact.content | {"kind": kind})
        assert "update" not in error.faults[0].remedy
    others = [other for other in ARTEFACTS.values() if other.module is not artefact.module]
    for other in others:
        refusal(artefact, tmp_path / "a.json", other.content)


def test_every_required_field_is_missed(artefact, tmp_path):
    for name in artefact.required:
        content = {key: value for key, value in artefact.content.items() if key != name}
        assert name in str(refusal(artefact, tmp_path / "a.json", content))
    assert len(refusal(artefact, tmp_path / "a.json", {"kind": artefact.module.KIND}).faults) == (
        len(set(artefact.required) - {"kind"})
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"a": 1, "a": 2}', "[" * 100_000])
def test_what_is_no_such_json_is_refused(artefact, tmp_path, content):
    refusal(artefact, tmp_path / "a.json", content)


def test_a_file_that_cannot_be_read_is_refused(artefact, tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(FrankenmergeError, match=path.name):
            artefact.module.load(path)
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FrankenmergeError, match="a.json"):
        artefact.module.load(tmp_path / "a.json")


def test_faults_name_the_field_and_what_was_found(tmp_path):
    content = invented.evaluation()
    content["models"][1]["bits_per_byte"] = "low"
    del content["models"][2]["name"]
    faults = refusal(ARTEFACTS["evaluation"], tmp_path / "a.json", content).faults
    assert [fault.place.rpartition(": ")[2] for fault in faults] == [
        "models.1.bits_per_byte",
        "models.2.name",
    ]
    assert "valid number" in faults[0].expected and faults[0].found == "'low'"
    assert faults[1].found == "no such field"


def test_keys_of_recipes_are_kept_and_left_out_where_there_are_none(tmp_path):
    plans, models, merged = (each.content for each in ARTEFACTS.values())
    keyed = {
        "evidence": plans | {"plans": [plans["plans"][0] | {"key": "k" * 64}]},
        "evaluation": models | {"models": [models["models"][0] | {"key": "k" * 64}]},
        "provenance": merged | {"key": "k" * 64},
    }
    for name, content in keyed.items():
        record = load(ARTEFACTS[name], tmp_path / "a.json", content)
        assert record.as_json() == content
        assert '"key"' not in json.dumps(ARTEFACTS[name].content)
    assert evidence.PlanRecord.of(**plans["plans"][0], key=None).as_json() == plans["plans"][0]


def test_numbers_that_json_does_not_know_come_back(tmp_path):
    content = invented.evaluation()
    content["models"][0] |= {"perplexity": math.inf, "invalid_words": math.nan, "accuracy": None}
    record = load(ARTEFACTS["evaluation"], tmp_path / "a.json", content)
    evaluation.save(record, tmp_path / "b.json")
    model = evaluation.load(tmp_path / "b.json").models[0]
    assert model.perplexity == math.inf and math.isnan(model.invalid_words)
    assert '"accuracy": null' in (tmp_path / "b.json").read_text()


# What other stages ask of the files


def test_a_checkpoint_without_provenance_has_none(tmp_path):
    assert provenance.load_provenance(tmp_path) is None
    content = ARTEFACTS["provenance"].content
    (tmp_path / provenance.PROVENANCE).write_text(json.dumps(content))
    assert provenance.load_provenance(tmp_path).as_json() == content
    (tmp_path / provenance.PROVENANCE).write_text("{")
    with pytest.raises(FrankenmergeError, match="frankenmerge.json"):
        provenance.load_provenance(tmp_path)


def test_the_source_of_a_tensor_is_its_own_or_its_first_input():
    tensors = provenance.parse(ARTEFACTS["provenance"].content, "p").tensors
    assert [tensors[name].source for name in tensors] == [
        ("x/one", "lm_head.weight"),
        ("y/two", "model.layers.2.mlp.up_proj.weight"),
        ("x/one", "model.norm.weight"),
    ]
    assert provenance.TensorRecord(method="copy").source is None
