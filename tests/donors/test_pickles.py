"""Pickled donors: the same tensors as safetensors, and nothing in a pickle is ever run."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model

SINGLE = "pytorch_model.bin"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frankenmerge" / "converted"


def pickled(donor: Path, folder: Path, parts: int = 1, **options) -> Path:
    """A copy of a donor of one file whose weights are pickles."""
    shutil.copytree(donor, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = list(tensors), {}
    for part in range(parts):
        file = SINGLE if parts == 1 else f"pytorch_model-{part + 1:05}-of-{parts:05}.bin"
        torch.save({name: tensors[name] for name in names[part::parts]}, folder / file, **options)
        files |= dict.fromkeys(names[part::parts], file)
    if parts > 1:
        (folder / f"{SINGLE}.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def refused(folder: Path, **options):
    with pytest.raises(FrankenmergeError) as caught:
        open_checkpoint(str(folder), **options)
    (fault,) = caught.value.faults
    assert all(fault)
    return fault


@pytest.mark.parametrize(
    "options",
    [{}, {"parts": 3}, {"_use_new_zipfile_serialization": False}],
    ids=["single", "shards", "before 1.6"],
)
@pytest.mark.parametrize("donor", ["a", "b", "g"])
def test_a_pickled_donor_is_the_donor(donors, tmp_path, donor, options):
    folder = pickled(donors[donor], tmp_path / "pickled", **options)
    opened, expected = (
        open_checkpoint(str(folder), allow_pickle=True),
        load_file(donors[donor] / "model.safetensors"),
    )
    assert opened.name == str(folder)
    assert opened.fingerprint == open_checkpoint(str(donors[donor])).fingerprint
    assert opened.tokenizer_hash == open_checkpoint(str(donors[donor])).tokenizer_hash
    made = {
        name: tensor
        for file in opened.path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    assert made.keys() == expected.keys() and all(
        torch.equal(made[name], expected[name]) for name in expected
    )
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(
            load_model(opened)(ids).logits,
            load_model(open_checkpoint(str(donors[donor])))(ids).logits,
        )


def test_tensors_of_one_memory_and_parts_of_a_larger_one(donors, tmp_path):
    folder = pickled(donors["a"], tmp_path / "pickled")
    tensors = torch.load(folder / SINGLE, weights_only=True)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding
    pair = torch.randn(2, 16)
    tensors["model.norm.weight"], tensors["model.layers.0.input_layernorm.weight"] = (
        pair[0],
        pair[1],
    )
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.randn(24, 16).T
    torch.save(tensors, folder / SINGLE)
    made = load_file(
        next(open_checkpoint(str(folder), allow_pickle=True).path.glob("*.safetensors"))
    )
    assert made.keys() == tensors.keys() and all(
        torch.equal(made[name], tensors[name]) for name in tensors
    )


def test_without_the_option_it_is_refused_and_the_option_named(donors, tmp_path, cache):
    fault = refused(pickled(donors["a"], tmp_path / "pickled"))
    assert SINGLE in fault.found and "--allow-pickle" in fault.remedy
    assert not cache.exists()


def test_safetensors_are_read_where_they_are_there(donors, tmp_path, cache):
    folder = Path(shutil.copytree(donors["a"], tmp_path / "both"))
    (folder / SINGLE).write_bytes(b"none of our business")
    assert open_checkpoint(str(folder), allow_pickle=True).path == folder and not cache.exists()


def test_other_pickles_are_no_weights(donors, tmp_path):
    folder = pickled(donors["a"], tmp_path / "pickled")
    (folder / SINGLE).rename(folder / "optimizer.bin")
    fault = refused(folder, allow_pickle=True)
    assert "optimizer.bin" in fault.found and "--allow-pickle" not in fault.remedy


class Hostile:
    """Makes the folder `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["plain", "archive", "old"])
def test_a_hostile_pickle_is_refused_and_not_run(donors, tmp_path, cache, how):
    folder, mark = pickled(donors["a"], tmp_path / "pickled"), tmp_path / "mark"
    tensors = torch.load(folder / SINGLE, weights_only=True) | {"model.extra": Hostile(mark)}
    if how == "plain":
        (folder / SINGLE).write_bytes(pickle.dumps(Hostile(mark), protocol=2))
    else:
        torch.save(tensors, folder / SINGLE, _use_new_zipfile_serialization=how == "archive")
    fault = refused(folder, allow_pickle=True)
    assert fault.place == str(folder / SINGLE)
    assert not mark.exists() and list(cache.iterdir()) == []
    if how == "plain":  # it would have been run by an ordinary reader
        pickle.loads((folder / SINGLE).read_bytes())
        assert mark.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"no pickle", b"PK\x05\x06" + bytes(18)],
    ids=["empty", "text", "empty archive"],
)
def test_a_file_that_is_no_pickle_is_refused(donors, tmp_path, content):
    folder = pickled(donors["a"], tmp_path / "pickled")
    (folder / SINGLE).write_bytes(content)
    assert refused(folder, allow_pickle=True).place == str(folder / SINGLE)


@pytest.mark.parametrize(
    "held", [[1, 2], {"model": {"weight": torch.zeros(2)}}, {3: torch.zeros(2)}, torch.zeros(2)]
)
def test_a_pickle_of_something_else_is_refused(donors, tmp_path, held):
    folder = pickled(donors["a"], tmp_path / "pickled")
    torch.save(held, folder / SINGLE)
    assert refused(folder, allow_pickle=True).expected == "dense tensors by name"


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4).to_sparse(), torch.zeros(4, dtype=torch.complex128)],
    ids=["sparse", "complex"],
)
def test_tensors_that_safetensors_cannot_hold_are_refused(donors, tmp_path, tensor):
    folder = pickled(donors["a"], tmp_path / "pickled")
    torch.save({"model.norm.weight": tensor}, folder / SINGLE)
    assert refused(folder, allow_pickle=True).place == str(folder / SINGLE)


def test_a_cut_off_file_is_refused(donors, tmp_path):
    folder = pickled(donors["a"], tmp_path / "pickled")
    whole = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(whole[: len(whole) // 2])
    assert refused(folder, allow_pickle=True).place == str(folder / SINGLE)


def test_a_link_out_of_the_folder_is_refused(donors, tmp_path):
    folder = pickled(donors["a"], tmp_path / "pickled")
    (folder / SINGLE).rename(tmp_path / "elsewhere.bin")
    (folder / SINGLE).symlink_to(tmp_path / "elsewhere.bin")
    assert refused(folder, allow_pickle=True).place == str(folder / SINGLE)


def test_it_is_converted_once_and_again_when_a_file_changes(donors, tmp_path, cache):
    folder = pickled(donors["a"], tmp_path / "pickled")
    first = open_checkpoint(str(folder), allow_pickle=True)
    time = (first.path / "config.json").stat().st_mtime_ns
    assert open_checkpoint(str(folder), allow_pickle=True).path == first.path
    assert (first.path / "config.json").stat().st_mtime_ns == time
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    assert open_checkpoint(str(folder), allow_pickle=True).config["rope_theta"] == 5000.0
    assert len(list(cache.iterdir())) == 2


def test_a_conversion_that_is_cut_off_leaves_nothing(donors, tmp_path, cache, monkeypatch):
    folder = pickled(donors["a"], tmp_path / "pickled", parts=2)
    real = torch.load

    def once(file, **options):
        if "00002" in file.name:
            raise KeyboardInterrupt
        return real(file, **options)

    monkeypatch.setattr(torch, "load", once)
    with pytest.raises(KeyboardInterrupt):
        open_checkpoint(str(folder), allow_pickle=True)
    assert list(cache.iterdir()) == []


def test_commands_take_the_option(donors, tmp_path, run, text):
    folder = pickled(donors["a"], tmp_path / "pickled")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: passthrough\n"
        f"slices: [{{sources: [{{model: {folder}, layer_range: [0, 3]}}]}}]\n"
    )
    commands = {
        "inspect": [folder],
        "features": [folder],
        "analyze": [folder, "-o", tmp_path / "x.atlas.safetensors"],
        "align": [folder, donors["b"], "-o", tmp_path / "x.alignment.safetensors"],
        "check": [recipe],
        "merge": [recipe, tmp_path / "out"],
        "evaluate": [recipe, "--text", text],
    }
    for name, arguments in commands.items():
        code, _, err = run(name, *arguments, "--json")
        assert code == 2 and "--allow-pickle" in err, name
    for name, arguments in commands.items():
        code, out, err = run(name, *arguments, "--json", "--allow-pickle")
        assert code == 0 and json.loads(out), (name, err)
    code, out, _ = run("check", tmp_path / "out", "--json", "--allow-pickle")
    assert code == 0 and json.loads(out)["absent"] == []
