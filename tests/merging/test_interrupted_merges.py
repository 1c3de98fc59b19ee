"""Merges that fail midway leave nothing, and copies without help of the kernel are the same."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from coded import (
    merged,
    recipe_for,
    refused,
    tree,
)
from conftest import meter

from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.opening import open_donors


def without_room(*_arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def after(calls: int, real, wrong):
    """`real` for so many calls, then `wrong`."""
    left = iter(range(calls))
    return lambda *arguments: wrong(*arguments) if next(left, None) is None else real(*arguments)


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_a_disk_that_fills_up_leaves_nothing(order, room, monkeypatch, calls):
    recipe = recipe_for(order)
    donors = open_donors(recipe)
    monkeypatch.setattr(os, "copy_file_range", after(calls, os.copy_file_range, without_room))
    monkeypatch.setattr(os, "pwrite", without_room)
    (fault,) = refused(recipe, room / "out", room, donors)
    assert fault.place == str(room / "out") and "No space left" in fault.found


def test_a_disk_that_fills_up_leaves_no_folders_on_the_way(order, room, monkeypatch):
    recipe = recipe_for(order)
    donors = open_donors(recipe)
    monkeypatch.setattr(os, "copy_file_range", without_room)
    monkeypatch.setattr(os, "pwrite", without_room)
    refused(recipe, room / "new" / "out", room, donors)


def test_a_disk_that_fills_up_leaves_an_empty_folder_empty(order, room, monkeypatch):
    (room / "out").mkdir()
    monkeypatch.setattr(os, "copy_file_range", without_room)
    monkeypatch.setattr(os, "pwrite", without_room)
    refused(recipe_for(order), room / "out", room)


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_disk_that_does_not_sync_leaves_nothing(order, room, monkeypatch, calls):
    def broken(_handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", after(calls, os.fsync, broken))
    refused(recipe_for(order), room / "out", room)


def test_a_donor_that_has_shrunk_since_it_was_opened_is_refused(coded, tmp_path, room):
    donor = Path(shutil.copytree(coded["a"], tmp_path / "donor"))
    recipe = recipe_for([(donor, 0), (donor, 3)])
    opened = open_donors(recipe)
    os.truncate(donor / "model.safetensors", 9000)
    (fault,) = refused(recipe, room / "out", room, opened)
    assert fault.place == str(donor / "model.safetensors") and fault.found == "9,000"


@pytest.mark.parametrize("way", ["short chunks", "no such call"])
def test_a_donor_that_shrinks_meanwhile_leaves_nothing(coded, tmp_path, room, monkeypatch, way):
    donor = Path(shutil.copytree(coded["a"], tmp_path / "donor"))
    monkeypatch.setattr("frankenmerge.merging.copying.CHUNK", 100)
    otherwise(monkeypatch, way)
    before = tree(room)
    with pytest.raises(FrankenmergeError) as caught:
        merged(
            [(donor, 0), (donor, 3)],
            room / "out",
            progress=meter(lambda _: os.truncate(donor / "model.safetensors", 9000)),
        )
    (fault,) = caught.value.faults
    assert fault.place == str(donor / "model.safetensors")
    assert fault.found == "it ended at byte 9,000"
    assert tree(room) == before


@pytest.mark.parametrize("calls", [0, 7])
def test_an_interrupted_merge_leaves_nothing(order, room, calls):
    def interrupt(_moved):
        raise KeyboardInterrupt

    before = tree(room)
    with pytest.raises(KeyboardInterrupt):
        merged(order, room / "out", progress=meter(after(calls, lambda _moved: None, interrupt)))
    assert tree(room) == before


def otherwise(monkeypatch, way: str) -> None:
    real = os.copy_file_range

    def across(*_arguments):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    match way:
        case "other device":
            monkeypatch.setattr(os, "copy_file_range", across)
        case "no such call":
            monkeypatch.delattr(os, "copy_file_range")
        case "refused midway":
            monkeypatch.setattr(os, "copy_file_range", after(5, real, across))
        case "short copies":
            monkeypatch.setattr(
                os,
                "copy_file_range",
                lambda source, target, count, *at: real(source, target, min(count, 100), *at),
            )


@pytest.mark.parametrize("way", ["other device", "no such call", "refused midway", "short copies"])
def test_the_bytes_are_the_same_without_copies_in_the_kernel(order, tmp_path, monkeypatch, way):
    merged(order, tmp_path / "kernel", shard_size=6000)
    otherwise(monkeypatch, way)
    merged(order, tmp_path / "other", shard_size=6000)
    assert tree(tmp_path / "other") == tree(tmp_path / "kernel")
