"""A donor's index, shards and links; missing, broken and foreign ones are refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import INDEX, copied, places, refused
from safetensors.numpy import save_file

from frankenmerge.donors.checkpoint import open_checkpoint


def edited_index(donors, tmp_path, edit) -> Path:
    folder = copied(donors, "deep", tmp_path)
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(edit(index)))
    return folder


def test_a_missing_shard_is_named(donors, tmp_path):
    folder = copied(donors, "deep", tmp_path)
    shards = sorted(folder.glob("*.safetensors"))[:2]
    for shard in shards:
        shard.unlink()
    assert places(refused(folder)) == [str(shard) for shard in shards]


def test_a_truncated_shard_is_named(donors, tmp_path):
    folder = copied(donors, "deep", tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert places(refused(folder)) == [str(shard)]


@pytest.mark.parametrize(
    "outside", ["../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "..", ".", ""]
)
def test_an_index_that_leaves_its_folder_is_refused(donors, tmp_path, outside):
    shutil.copy(donors["a"] / "model.safetensors", tmp_path / "x.safetensors")

    def edit(index):
        index["weight_map"]["model.norm.weight"] = outside
        return index

    folder = edited_index(donors, tmp_path, edit)
    assert str(folder) in refused(folder)[0].place


def test_a_name_that_occurs_twice_in_the_index_or_the_config_is_refused(donors, tmp_path):
    folder = copied(donors, "deep", tmp_path)
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(
        text.replace('"weight_map": {', '"weight_map": {"model.norm.weight": "x.safetensors",')
    )
    (fault,) = refused(folder)
    assert fault.place == str(folder / INDEX) and "duplicate names" in fault.found
    (folder / INDEX).write_text(text)
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("{", '{"hidden_size": 32,', 1)
    )
    (fault,) = refused(folder)
    assert fault.place == str(folder / "config.json") and "duplicate names" in fault.found


# Links


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
@pytest.mark.parametrize(
    "how", ["absolute", "relative", "by way of a link in the folder", "to a folder outside"]
)
def test_a_link_out_of_the_folder_is_refused(donors, tmp_path, name, how):
    folder = copied(donors, "a", tmp_path)
    outside = tmp_path / "secrets"
    outside.mkdir()
    (folder / name).rename(outside / name)
    match how:
        case "absolute":
            (folder / name).symlink_to(outside / name)
        case "relative":
            (folder / name).symlink_to(Path("..") / "secrets" / name)
        case "by way of a link in the folder":
            (folder / "via").symlink_to(outside)
            (folder / name).symlink_to(Path("via") / name)
        case _:
            (folder / name).symlink_to(outside)
    assert str(folder / name) in places(refused(folder))


def test_a_link_in_the_folder_and_a_folder_that_is_a_link_are_followed(donors, tmp_path):
    folder = copied(donors, "a", tmp_path)
    (folder / "kept").mkdir()
    (folder / "model.safetensors").rename(folder / "kept" / "weights")
    (folder / "model.safetensors").symlink_to(Path("kept") / "weights")
    (tmp_path / "link").symlink_to(folder)
    assert (
        open_checkpoint(str(tmp_path / "link")).fingerprint
        == open_checkpoint(str(donors["a"])).fingerprint
    )


def test_a_snapshot_of_a_hub_cache_is_read_through_its_links(donors, tmp_path):
    store = tmp_path / "hub" / "models--org--name"
    snapshot = store / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (store / "blobs").mkdir()
    for number, file in enumerate(sorted(donors["a"].iterdir())):
        shutil.copy(file, store / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{number:040x}")
    assert (
        open_checkpoint(str(snapshot)).fingerprint == open_checkpoint(str(donors["a"])).fingerprint
    )


def test_a_link_of_another_kind_of_file_is_no_matter(donors, tmp_path):
    folder = copied(donors, "a", tmp_path)
    (folder / "runs").symlink_to(tmp_path)
    (folder / "notes.md").symlink_to("/etc/hostname")
    assert open_checkpoint(str(folder)).blocks == 4


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(donors, tmp_path, name):
    folder = copied(donors, "deep" if name == INDEX else "a", tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert str(folder / name) in places(refused(folder))


def test_a_tensor_of_the_index_that_its_shard_lacks_is_named(donors, tmp_path):
    def edit(index):
        index["weight_map"]["model.layers.0.more.weight"] = index["weight_map"]["model.norm.weight"]
        return index

    (fault,) = refused(edited_index(donors, tmp_path, edit))
    assert fault.place.endswith("model.layers.0.more.weight") and "deep/model-" in fault.place


def norm_in_the_last_shard(folder: Path, content: float) -> str:
    """Write the final norm to one more shard; returns the shard's name."""
    arrays = {"model.norm.weight": np.full(16, content, np.float32)}
    save_file(arrays, folder / "more.safetensors", {"format": "pt"})
    return "more.safetensors"


def norms(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The final norm as it is read here, and as transformers reads it."""
    from transformers import AutoModelForCausalLM

    tensor = open_checkpoint(str(folder)).tensors["model.norm.weight"]
    content = tensor.file.read_bytes()[tensor.start : tensor.stop]
    oracle = AutoModelForCausalLM.from_pretrained(folder).model.norm.weight
    return np.frombuffer(content, np.float32), oracle.detach().numpy()


def test_a_tensor_of_a_shard_that_the_index_lacks_is_read_as_by_transformers(donors, tmp_path):
    def edit(index):
        del index["weight_map"]["model.norm.weight"]
        return index

    ours, theirs = norms(edited_index(donors, tmp_path, edit))
    assert np.array_equal(ours, theirs)


def test_a_tensor_is_read_from_the_shard_that_has_it_whatever_the_index_says(donors, tmp_path):
    def edit(index):
        shards = sorted(set(index["weight_map"].values()))
        other = next(name for name in shards if name != index["weight_map"]["model.norm.weight"])
        index["weight_map"]["model.norm.weight"] = other
        return index

    ours, theirs = norms(edited_index(donors, tmp_path, edit))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("named", [True, False])
def test_of_a_tensor_in_two_shards_the_index_names_the_last_or_it_is_refused(
    donors, tmp_path, named
):
    folder = copied(donors, "deep", tmp_path)
    index = json.loads((folder / INDEX).read_text())
    shard = norm_in_the_last_shard(folder, 3.0)
    if named:
        index["weight_map"]["model.norm.weight"] = shard
        (folder / INDEX).write_text(json.dumps(index))
        ours, theirs = norms(folder)
        assert np.array_equal(ours, theirs) and (ours == 3).all()
        return
    save_file(
        {"model.norm.weight": np.ones(16, np.float32), "model.more": np.ones(1, np.float32)},
        folder / shard,
    )
    index["weight_map"]["model.more"] = shard
    (folder / INDEX).write_text(json.dumps(index))
    (fault,) = refused(folder)
    assert fault.place.endswith("deep: model.norm.weight") and shard in fault.found


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "7",
        "null",
        "{",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": null}',
    ],
)
def test_an_index_of_another_form_is_refused(donors, tmp_path, index):
    folder = copied(donors, "deep", tmp_path)
    (folder / INDEX).write_text(index)
    assert str(folder / INDEX) in refused(folder)[0].place


def test_the_single_file_is_read_where_an_index_lies_next_to_it_as_transformers_does(
    donors, tmp_path
):
    folder = copied(donors, "a", tmp_path)
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    names = open_checkpoint(str(folder)).tensors
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "other.safetensors")})
    )
    assert {tensor.file.name for tensor in open_checkpoint(str(folder)).tensors.values()} == {
        "model.safetensors"
    }


def test_a_folder_of_pickles_is_refused_and_they_are_named(donors, tmp_path):
    folder = copied(donors, "a", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (fault,) = refused(folder)
    assert fault.place == str(folder) and "pytorch_model.bin" in fault.found


def test_a_folder_without_weights_is_refused(donors, tmp_path):
    folder = copied(donors, "a", tmp_path)
    (folder / "model.safetensors").unlink()
    (fault,) = refused(folder)
    assert (fault.place, fault.found) == (str(folder), "no safetensors")
