"""The files of a merged checkpoint: shards, index, provenance, card, tokenizer."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from coded import (
    EMBEDDINGS,
    arrays_of,
    assert_equal,
    block_of,
    expected,
    load,
    logits,
    merged,
    recipe_for,
    tree,
)
from conftest import meter, written
from safetensors import safe_open
from safetensors.numpy import load_file

from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.storage.safetensors_header import read_header


def rank(name: str) -> int:
    block = block_of(name)[0]
    return (
        block if block is not None else -1 if name in EMBEDDINGS else 100 if "norm" in name else 101
    )


@pytest.mark.parametrize("shard_size", [10**9, 6000])
def test_tensors_lie_in_layer_order(order, tmp_path, shard_size):
    merged(order, tmp_path / "out", shard_size=shard_size)
    names = []
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        names += [
            name for name, _ in sorted(read_header(file).items(), key=lambda item: item[1].start)
        ]
    assert [rank(name) for name in names] == sorted(map(rank, names))
    assert len(names) == 5 * 9 + 3


@pytest.mark.parametrize("shard_size", [6000, 3500, 1000, 1])
def test_shards_keep_to_their_limit_and_the_index_is_right(order, tmp_path, shard_size):
    merged(order, tmp_path / "whole")
    merged(order, tmp_path / "out", shard_size=shard_size)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    sizes = [[array.nbytes for array in load_file(file).values()] for file in files]
    assert all(sum(held) <= shard_size or len(held) == 1 for held in sizes)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert_equal(arrays_of(tmp_path / "out"), arrays_of(tmp_path / "whole"))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_sharded_result_computes_the_same(donors, tmp_path):
    order = [(donors["a"], 0), (donors["deep"], 3), (donors["b"], 2)]
    merged(order, tmp_path / "whole")
    merged(order, tmp_path / "out", shard_size=4000)
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(tmp_path / "whole")))
    assert (
        open_checkpoint(str(tmp_path / "out")).fingerprint
        == open_checkpoint(str(tmp_path / "whole")).fingerprint
    )


def test_a_result_of_one_file_has_no_index(order, tmp_path):
    merged(order, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "frankenmerge.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.yaml",
        "splice.svg",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("shard_size", [10**9, 6000])
def test_the_same_inputs_give_the_same_bytes(order, tmp_path, shard_size):
    for name in ("one", "two"):
        merged(order, tmp_path / name, shard_size=shard_size)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_the_data_of_a_file_begins_at_a_multiple_of_eight(order, tmp_path):
    merged(order, tmp_path / "out", shard_size=6000)
    assert {
        int.from_bytes(file.read_bytes()[:8], "little") % 8
        for file in (tmp_path / "out").glob("*.safetensors")
    } == {0}
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "np") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_a_result_is_a_donor_again(order, tmp_path):
    merged(order, tmp_path / "out")
    second = [(tmp_path / "out", 4), (tmp_path / "out", 0)]
    merged(second, tmp_path / "again")
    assert_equal(arrays_of(tmp_path / "again"), expected(second, "lm_head.weight"))


def test_the_recipe_of_the_result_parses_to_the_recipe(order, tmp_path):
    recipe = recipe_for(
        order, base_model=str(order[0][0]), tokenizer_source="base", dtype="float32"
    )
    written(recipe, tmp_path / "out")
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == recipe


def test_the_provenance_names_every_tensors_donor(order, tmp_path):
    merged(order, tmp_path / "out", shard_size=6000)
    record = json.loads((tmp_path / "out" / "frankenmerge.json").read_text())
    found = arrays_of(tmp_path / "out")
    assert record["tensors"].keys() == found.keys()
    donors = {str(folder): arrays_of(folder) for folder, _ in order}
    for name, origin in record["tensors"].items():
        assert np.array_equal(found[name], donors[origin["donor"]][origin["tensor"]])
        assert origin["method"] == "copy"
    assert record["donors"] == {
        name: {"fingerprint": open_checkpoint(name).fingerprint} for name in donors
    }
    assert (
        record["recipe_sha256"]
        == hashlib.sha256((tmp_path / "out" / "recipe.yaml").read_bytes()).hexdigest()
    )


def test_the_card_says_what_was_stacked(order, tmp_path):
    merged(order, tmp_path / "out")
    a, deep, c = (str(folder) for folder in dict.fromkeys(folder for folder, _ in order))
    _, front, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "frankenmerge"],
    }
    assert "# A frankenmodel of 5 blocks" in body
    rows = [
        f"| 0-1 | {a} | 0-1 |",
        f"| 2-2 | {deep} | 1-1 |",
        f"| 3-3 | {deep} | 5-5 |",
        f"| 4-4 | {c} | 3-3 |",
    ]
    assert re.findall(r"^\| \d.*$", body, re.M) == rows
    assert f"Embedding: {a}. Final norm: {c}. Head: {c}. Tokenizer: {a}." in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]) == recipe_for(
        order
    ).model_dump(exclude_none=True)


def test_tokenizer_and_generation_config_are_those_of_the_donors_named(coded, tmp_path):
    named = {name: Path(shutil.copytree(coded[name], tmp_path / name)) for name in "abc"}
    for name, folder in named.items():
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (folder / file).write_text((folder / file).read_text() + "\n" * (ord(name) - 90))
    fields = {"base_model": str(named["b"]), "tokenizer_source": str(named["c"])}
    merged([(named["a"], 0)], tmp_path / "out", fields=fields)
    for file, source in (
        ("tokenizer.json", "c"),
        ("tokenizer_config.json", "c"),
        ("generation_config.json", "b"),
    ):
        assert (tmp_path / "out" / file).read_bytes() == (named[source] / file).read_bytes()


def test_progress_counts_every_byte(order, tmp_path):
    moved = []
    result = merged(order, tmp_path / "out", progress=meter(moved.append))
    assert sum(moved) == result.bytes and all(count > 0 for count in moved)


def test_an_empty_folder_becomes_the_output(order, tmp_path):
    (tmp_path / "out").mkdir()
    merged(order, tmp_path / "out")
    assert_equal(arrays_of(tmp_path / "out"), expected(order, "lm_head.weight"))


def test_an_output_in_folders_that_are_not_there_is_made(order, tmp_path):
    merged(order, tmp_path / "new" / "deeper" / "out")
    assert sorted(path.name for path in (tmp_path / "new" / "deeper").iterdir()) == ["out"]


def test_donors_are_left_as_they_were(coded, tmp_path):
    folder = Path(shutil.copytree(coded["a"], tmp_path / "donor"))
    before = tree(folder)
    merged([(folder, 0), (folder, 2)], tmp_path / "out")
    assert tree(folder) == before
