"""Blocks shared with the donors, on file systems that can, mounted from an image if allowed."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import write_donor, written
from safetensors.numpy import load_file

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.merging import copying, shards
from frankenmerge.merging.copying import clonable
from frankenmerge.merging.shards import BLOCK
from frankenmerge.splicing.opening import open_donors

MAKERS = {"xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}
SIZE = 400 << 20


def mounted(kind: str, folder: Path) -> Path:
    """A new file system in `folder`; skips with the reason where that cannot be had."""
    maker = MAKERS[kind]
    if not shutil.which(maker[0]):
        pytest.skip(f"{maker[0]} is not installed")
    if os.geteuid():
        pytest.skip("only root mounts images")
    image, room = folder / "image", folder / "room"
    image.touch()
    os.truncate(image, SIZE)
    room.mkdir()
    for command in ([*maker, str(image)], ["mount", "-o", "loop", str(image), str(room)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{' '.join(command[:1])}: {done.stderr.strip()[:200]}")
    return room


@pytest.fixture(scope="module", params=sorted(MAKERS))
def room(request, tmp_path_factory):
    folder = mounted(request.param, tmp_path_factory.mktemp(request.param))
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict[str, Path]:
    """Two donors of 17 MB, one in several files; besides whole blocks, a tensor of an odd size."""
    root = tmp_path_factory.mktemp("large")
    shape = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4099}
    return {
        "x": write_donor(root / "x", seed=1, **shape),
        "y": write_donor(root / "y", seed=2, shard="6MB", **shape),
    }


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    monkeypatch.setattr(shards, "WORTH_CLONING", 16 * BLOCK)


def recipe_for(folders):
    blocks = [
        Block(str(folders[name]), index)
        for name, index in (("x", 0), ("x", 1), ("y", 1), ("y", 2), ("x", 2), ("y", 3))
    ]
    return recipe_of(blocks)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: array
        for file in sorted(folder.glob("*.safetensors"))
        for name, array in load_file(file).items()
    }


def assert_same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []
    assert open_checkpoint(str(found)).fingerprint == open_checkpoint(str(expected)).fingerprint


def used(room: Path) -> int:
    os.sync()
    return shutil.disk_usage(room).used


@pytest.fixture
def donors(large, room):
    folders = {name: Path(shutil.copytree(folder, room / name)) for name, folder in large.items()}
    yield folders
    for entry in room.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def test_a_merge_shares_its_donors_blocks_and_has_the_bytes_of_a_copy(donors, room, tmp_path):
    recipe = recipe_for(donors)
    opened = open_donors(recipe)
    written(recipe, tmp_path / "copied", donors=opened, reflink=False)
    before = used(room)
    result = written(recipe, room / "out", donors=opened)
    grown = used(room) - before
    assert_same_tensors(room / "out", tmp_path / "copied")
    assert result.bytes > 30 << 20 and grown < result.bytes / 10


def test_the_model_computes_what_its_copy_does(donors, room, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    recipe = recipe_for(donors)
    opened = open_donors(recipe)
    written(recipe, tmp_path / "copied", donors=opened, reflink=False)
    written(recipe, room / "out", donors=opened)
    ids = torch.tensor([[0, 7, 30, 7, 4000]])
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path)(ids).logits
            for path in (room / "out", tmp_path / "copied")
        )
    assert torch.equal(ours, theirs)


def test_no_reflink_makes_a_copy_in_the_usual_layout(donors, room, tmp_path):
    recipe = recipe_for(donors)
    opened = open_donors(recipe)
    written(recipe, tmp_path / "copied", donors=opened)
    before = used(room)
    result = written(recipe, room / "out", donors=opened, reflink=False)
    assert used(room) - before > result.bytes * 0.9
    assert {path.name: path.read_bytes() for path in (room / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "copied").iterdir()
    }


def test_donors_are_not_changed_by_a_change_of_the_result(donors, room):
    recipe = recipe_for(donors)
    written(recipe, room / "out")
    before = {path: path.read_bytes() for folder in donors.values() for path in folder.iterdir()}
    for file in (room / "out").glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    assert {
        path: path.read_bytes() for folder in donors.values() for path in folder.iterdir()
    } == before


def test_only_donors_on_the_same_file_system_are_shared(donors, large, room, tmp_path):
    mixed = {"x": donors["x"], "y": large["y"]}
    recipe = recipe_for(mixed)
    opened = open_donors(recipe)
    files = {tensor.file for donor in opened.values() for tensor in donor.tensors.values()}
    assert clonable(files, room) == {donors["x"] / "model.safetensors"}
    written(recipe, tmp_path / "copied", donors=opened, reflink=False)
    written(recipe, room / "out", donors=opened)
    assert_same_tensors(room / "out", tmp_path / "copied")


def test_a_clone_that_fails_midway_is_copied(donors, room, tmp_path, monkeypatch):
    recipe = recipe_for(donors)
    opened = open_donors(recipe)
    written(recipe, tmp_path / "copied", donors=opened, reflink=False)
    real, left = copying.clone, iter(range(5))

    def tired(*arguments):
        if next(left, None) is None:
            raise OSError(22, "Invalid argument")
        real(*arguments)

    monkeypatch.setattr(copying, "clone", tired)
    written(recipe, room / "out", donors=opened)
    assert_same_tensors(room / "out", tmp_path / "copied")


def test_a_disk_without_room_for_a_copy_has_room_for_a_share(donors, room, monkeypatch):
    recipe = recipe_for(donors)
    opened = open_donors(recipe)
    usage = shutil.disk_usage(room)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=70 << 20))
    monkeypatch.setattr("frankenmerge.merging.output.SPARE", 60 << 20)
    with pytest.raises(Exception, match="free disk space"):
        written(recipe, room / "copied", donors=opened, reflink=False)
    written(recipe, room / "out", donors=opened)


def test_where_nothing_can_be_cloned_the_layout_is_the_usual_one(large, tmp_path, monkeypatch):
    def refuse(*_arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(copying, "clone", refuse)
    recipe = recipe_for(large)
    opened = open_donors(recipe)
    for name, reflink in (("tried", True), ("refused", False)):
        written(recipe, tmp_path / name, donors=opened, reflink=reflink)
    assert [path.read_bytes() for path in sorted((tmp_path / "tried").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "refused").iterdir())
    ]
    assert (tmp_path / "tried" / "model.safetensors").is_file()
