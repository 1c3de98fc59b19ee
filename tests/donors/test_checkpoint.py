"""Donors read from config and headers alone, compared with the safetensors library."""

import math

import numpy as np
import pytest
from conftest import changed, write_donor
from damage import copied, places, refused
from safetensors import safe_open

from frankenmerge.donors.checkpoint import open_checkpoint


@pytest.mark.parametrize("name", ["a", "b", "g", "deep"])
def test_tensors_are_those_that_the_safetensors_library_reads(donors, name):
    expected = {}
    for file in donors[name].glob("*.safetensors"):
        with safe_open(file, "np") as handle:
            for key in handle.keys():  # noqa: SIM118
                expected[key] = (file, handle.get_slice(key).get_dtype(), handle.get_tensor(key))
    checkpoint = open_checkpoint(str(donors[name]))
    assert checkpoint.tensors.keys() == expected.keys()
    for key, (file, dtype, array) in expected.items():
        tensor = checkpoint.tensors[key]
        assert (tensor.file, tensor.dtype, tensor.shape) == (file, dtype, array.shape)
        assert tensor.bytes == array.nbytes
        assert file.read_bytes()[tensor.start : tensor.stop] == array.tobytes()


def test_the_sharded_donor_is_in_several_files(donors):
    files = {tensor.file.name for tensor in open_checkpoint(str(donors["deep"])).tensors.values()}
    assert len(files) > 2 and not (donors["deep"] / "model.safetensors").exists()


def test_sizes_are_those_of_the_config_and_the_files(donors):
    checkpoint = open_checkpoint(str(donors["a"]))
    with safe_open(donors["a"] / "model.safetensors", "np") as handle:
        elements = sum(math.prod(handle.get_slice(name).get_shape()) for name in handle.keys())  # noqa: SIM118
    assert (checkpoint.blocks, checkpoint.parameters, checkpoint.bytes) == (
        4,
        elements,
        4 * elements,
    )
    assert checkpoint.dtypes == {"F32": elements}


def test_roles_of_a_gpt2_with_and_without_its_prefix_are_the_same(donors, tmp_path):
    bare = changed(
        donors["g"],
        tmp_path / "bare",
        lambda all: {name.removeprefix("transformer."): value for name, value in all.items()},
    )
    old, new = open_checkpoint(str(bare)).by_role, open_checkpoint(str(donors["g"])).by_role
    assert {role: set(names) for role, names in old.items()} == {
        role: set(names) for role, names in new.items()
    }
    assert old["block", 2]["transformer.h.{}.ln_1.weight"] == "h.2.ln_1.weight"


def test_a_folder_without_config_is_refused(donors, tmp_path):
    folder = copied(donors, "a", tmp_path)
    (folder / "config.json").unlink()
    assert places(refused(folder)) == [str(folder / "config.json")]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[1]", b'"llama"', b"null", b"{}", b"[" * 100_000],
    ids=lambda content: content[:8],
)
def test_a_config_that_is_no_object_is_refused(donors, tmp_path, content):
    folder = copied(donors, "a", tmp_path)
    (folder / "config.json").write_bytes(content)
    assert str(folder / "config.json") in refused(folder)[0].place


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", None),
        ("model_type", 7),
        ("model_type", ["llama"]),
        ("model_type", {"llama": 1}),
        ("num_hidden_layers", -4),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", "4"),
        ("num_hidden_layers", 4.0),
        ("num_hidden_layers", None),
        ("num_hidden_layers", True),
        ("hidden_size", 0),
        ("num_attention_heads", -1),
        ("vocab_size", [48]),
        ("layer_types", ["full_attention"] * 3),
    ],
)
def test_a_config_of_impossible_values_is_refused(donors, tmp_path, key, value):
    folder = changed(donors["a"], tmp_path / "odd", config=lambda config: config | {key: value})
    found = refused(folder)
    assert str(folder / "config.json") in found[0].place
    assert key in f"{found[0].place} {found[0].expected}"


def test_a_gpt2_whose_blocks_depend_on_their_index_is_refused(donors, tmp_path):
    folder = changed(
        donors["g"],
        tmp_path / "scaled",
        config=lambda config: config | {"scale_attn_by_inverse_layer_idx": True},
    )
    assert refused(folder)[0].place == f"{folder / 'config.json'}: scale_attn_by_inverse_layer_idx"


# Names


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert places(refused(tmp_path / "none")) == [str(tmp_path / "none")]


def test_a_file_in_place_of_a_folder_is_refused(donors):
    assert places(refused(donors["a"] / "config.json")) == [str(donors["a"] / "config.json")]


@pytest.mark.parametrize(
    "name", ["organisation/of-no-such-model", "organisation/of-no-such-model@v1"]
)
def test_a_hub_id_that_is_not_in_the_cache_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (fault,) = refused(name)
    assert fault.place == name and "--download" in fault.remedy


# Fingerprints


def fingerprint(path) -> str:
    return open_checkpoint(str(path)).fingerprint


@pytest.mark.parametrize("name", ["a", "deep"])
def test_a_copied_folder_has_the_same_fingerprint(donors, tmp_path, name):
    assert fingerprint(copied(donors, name, tmp_path)) == fingerprint(donors[name])


def test_donors_have_fingerprints_of_their_own(donors):
    assert len({fingerprint(path) for path in donors.values()}) == len(donors)


def test_the_fingerprint_is_the_same_however_the_weights_are_sharded(donors, tmp_path):
    whole = write_donor(tmp_path / "whole", seed=3, num_hidden_layers=6)
    assert fingerprint(whole) == fingerprint(donors["deep"])


def test_another_config_gives_another_fingerprint(donors, tmp_path):
    folder = changed(
        donors["a"], tmp_path / "config", config=lambda config: config | {"rms_norm_eps": 1e-5}
    )
    assert fingerprint(folder) != fingerprint(donors["a"])


def test_one_changed_byte_of_a_small_donor_gives_another_fingerprint(donors, tmp_path):
    folder = copied(donors, "a", tmp_path)
    before, file = fingerprint(folder), folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for position in [
        start,
        len(content) - 1,
        *np.random.default_rng(0).integers(start, len(content), 30),
    ]:
        content[position] ^= 1
        file.write_bytes(content)
        assert fingerprint(folder) != before
        content[position] ^= 1
    file.write_bytes(content)
    assert fingerprint(folder) == before
