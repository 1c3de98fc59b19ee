"""Merges that are refused before a byte is written, with their reasons."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from coded import arrays_of, assert_equal, expected, merged, recipe_for, refused
from conftest import changed, write_donor


@pytest.mark.parametrize("content", ["x.txt", ".hidden"])
def test_an_output_that_holds_something_is_refused(order, room, content):
    (room / "out").mkdir()
    (room / "out" / content).write_text("mine")
    (fault,) = refused(recipe_for(order), room / "out", room)
    assert (fault.place, fault.found) == (str(room / "out"), "something is there")


def test_a_file_as_output_is_refused(order, room):
    (room / "out").write_text("mine")
    (fault,) = refused(recipe_for(order), room / "out", room)
    assert fault.place == str(room / "out")


def test_an_output_below_a_file_is_refused(order, room):
    (room / "file").write_text("mine")
    (fault,) = refused(recipe_for(order), room / "file" / "out", room)
    assert fault.place == str(room / "file" / "out")


@pytest.mark.parametrize("target", ["empty", "nowhere"])
def test_a_link_as_output_is_refused(order, room, target):
    (room / "empty").mkdir()
    (room / "out").symlink_to(room / target)
    (fault,) = refused(recipe_for(order), room / "out", room)
    assert fault.place == str(room / "out") and (room / "out").is_symlink()


@pytest.mark.parametrize("spelling", [".", "{}", "../out"])
def test_the_working_directory_as_output_is_refused(order, room, monkeypatch, spelling):
    (room / "out").mkdir()
    monkeypatch.chdir(room / "out")
    (fault,) = refused(recipe_for(order), Path(spelling.format(room / "out")), room)
    assert fault.found == "the working directory"


def test_a_mount_point_as_output_is_refused(order, room, monkeypatch):
    (room / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == room / "out")
    (fault,) = refused(recipe_for(order), room / "out", room)
    assert fault.found == "a mount point" and str(room / "out" / "merged") in fault.remedy


@pytest.mark.parametrize("inside", ["out", "deep/er/out"])
def test_an_output_inside_a_donor_is_refused(coded, room, inside):
    donor = Path(shutil.copytree(coded["a"], room / "donor"))
    (fault,) = refused(recipe_for([(donor, 0)]), donor / inside, room)
    assert fault.place == str(donor / inside) and str(donor) in fault.found


def test_an_output_inside_a_donor_through_a_link_is_refused(coded, room):
    donor = Path(shutil.copytree(coded["a"], room / "donor"))
    (room / "link").symlink_to(donor)
    (fault,) = refused(recipe_for([(donor, 0)]), room / "link" / "out", room)
    assert fault.place == str(room / "link" / "out")


def test_a_donor_as_output_is_refused(coded, room):
    donor = Path(shutil.copytree(coded["a"], room / "donor"))
    refused(recipe_for([(donor, 0)]), donor, room)


def test_an_output_around_a_donor_is_refused(coded, room):
    donor = Path(shutil.copytree(coded["a"], room / "out" / "donor"))
    refused(recipe_for([(donor, 0)]), room / "out", room)


def test_a_disk_that_is_too_small_is_refused(order, room, monkeypatch):
    usage = shutil.disk_usage(room)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 << 20))
    (fault,) = refused(recipe_for(order), room / "out", room)
    assert fault.place == str(room / "out") and fault.found == f"{64 << 20:,}"


def test_an_output_of_a_name_too_long_for_the_disk_is_refused(order, room):
    refused(recipe_for(order), room / ("x" * 300), room)


def test_an_output_of_the_longest_name_that_the_disk_takes_is_written(order, tmp_path):
    merged(order, tmp_path / ("x" * 255))
    assert_equal(arrays_of(tmp_path / ("x" * 255)), expected(order, "lm_head.weight"))


def test_a_range_past_the_end_is_refused(coded, room):
    recipe = recipe_for([(coded["a"], index) for index in (0, 1, 2, 3, 4)])
    (fault,) = refused(recipe, room / "out", room)
    assert (
        fault.place.endswith("slices[0].sources[0].layer_range")
        and "[0, 4]" in fault.expected
        and fault.found == "[0, 5]"
    )


@pytest.mark.parametrize(
    "other, reason", [("wide", "hidden_size: 16 and 32"), ("g", "family: llama and gpt2")]
)
def test_donors_of_another_shape_or_family_are_refused(donors, room, other, reason):
    found = refused(recipe_for([(donors["a"], 0), (donors[other], 1)]), room / "out", room)
    assert any(reason in fault.found for fault in found)


def test_donors_of_another_type_are_refused(donors, tmp_path, room):
    half = write_donor(tmp_path / "half", seed=1, dtype="bfloat16")
    found = refused(recipe_for([(donors["a"], 0), (half, 1)]), room / "out", room)
    assert (
        [fault.place for fault in found] == ["recipe: dtype"]
        and "float32" in found[0].found
        and "bfloat16" in found[0].found
    )


def test_quantised_donors_are_refused(coded, tmp_path, room):
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(4)]
    donor = changed(
        coded["a"],
        tmp_path / "int8",
        lambda all: all | {name: all[name].astype(np.int8) for name in names},
    )
    (fault,) = refused(recipe_for([(donor, 0)]), room / "out", room)
    assert fault.place == str(donor) and "I8" in fault.found


def test_a_donor_without_a_tokenizer_is_refused_where_its_tokenizer_is_needed(
    coded, tmp_path, room
):
    mute = Path(shutil.copytree(coded["a"], tmp_path / "mute"))
    (mute / "tokenizer.json").unlink()
    (fault,) = refused(recipe_for([(mute, 0), (coded["c"], 1)]), room / "out", room)
    assert fault.place == str(mute) and "tokenizer" in fault.expected
    merged([(mute, 0), (coded["c"], 1)], room / "out", fields={"tokenizer_source": str(coded["c"])})
    merged([(coded["c"], 0), (mute, 1)], room / "other")


def test_first_and_last_donors_of_other_vocabularies_are_refused(donors, tmp_path, room):
    more = write_donor(tmp_path / "more", seed=1, vocab_size=60)
    (fault,) = refused(recipe_for([(donors["a"], 0), (more, 1)]), room / "out", room)
    assert "48 and 60" in fault.found
    merged([(donors["a"], 0), (more, 1), (donors["a"], 2)], room / "out")


def test_all_faults_are_reported_together(donors, tmp_path, room):
    mute = Path(shutil.copytree(donors["a"], tmp_path / "mute"))
    (mute / "tokenizer.json").unlink()
    order = [(mute, 0), (mute, 1), (donors["wide"], 3), (donors["wide"], 4), (mute, 7)]
    found = [
        f"{fault.place} {fault.found}" for fault in refused(recipe_for(order), room / "out", room)
    ]
    ranges = ["slices[1].sources[0].layer_range [3, 5]", "slices[2].sources[0].layer_range [7, 8]"]
    for part in (*ranges, "hidden_size: 16 and 32", f"{mute} none"):
        assert any(part in fault for fault in found), part
