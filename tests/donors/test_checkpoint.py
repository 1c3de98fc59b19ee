"""Donors read from headers alone, held against the safetensors library; and every kind of damage refused."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import changed, write_donor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.storage.safetensors_header import BYTES_OF, HEADER_LIMIT, read_header

INDEX = "model.safetensors.index.json"


def faults(call, *arguments):
    """What `call` refuses, each fault told in four parts."""
    with pytest.raises(FrankenmergeError) as caught:
        call(*arguments)
    assert caught.value.faults
    for fault in caught.value.faults:
        assert all(isinstance(part, str) and part.strip() for part in fault), fault
    return caught.value.faults


def refused(path) -> tuple:
    return faults(open_checkpoint, str(path))


def places(found) -> list[str]:
    return [fault.place for fault in found]


def copied(donors, name, folder) -> Path:
    return Path(shutil.copytree(donors[name], folder / name))


def raw(header, data: bytes = b"") -> bytes:
    """A safetensors file of any header: an object, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin, end, shape, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def written(folder: Path, content: bytes) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    return path


# What is read


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


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
    ],
)
def test_every_numpy_type_is_read_with_its_size(tmp_path, dtype):
    arrays = {
        "scalar": np.ones((), dtype),
        "empty": np.ones((3, 0), dtype),
        "full": np.ones((2, 3, 5), dtype),
    }
    path = written(tmp_path, save(arrays))
    header = read_header(path)
    assert {name: (tensor.shape, tensor.bytes) for name, tensor in header.items()} == {
        name: (array.shape, array.nbytes) for name, array in arrays.items()
    }
    with safe_open(path, "np") as handle:
        assert {name: tensor.dtype for name, tensor in header.items()} == {
            name: handle.get_slice(name).get_dtype() for name in arrays
        }


@pytest.mark.parametrize("dtype, bytes_each", [("BF16", 2), ("F8_E4M3", 1), ("F8_E5M2", 1)])
def test_types_that_numpy_lacks_are_read_with_their_size(tmp_path, dtype, bytes_each):
    path = written(
        tmp_path, raw({"t": entry(0, 6 * bytes_each, [2, 3], dtype)}, bytes(6 * bytes_each))
    )
    assert read_header(path)["t"][1:3] == (dtype, (2, 3))


def test_a_file_of_no_tensors_is_read_as_empty(tmp_path):
    assert read_header(written(tmp_path, raw({"__metadata__": {"format": "pt"}}))) == {}


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


# Damaged files


def cut(content: bytes, where: str) -> bytes:
    header = int.from_bytes(content[:8], "little")
    keep = {
        "last byte": -1,
        "half": len(content) // 2,
        "header": 8 + header // 2,
        "length": 5,
        "data": 8 + header,
        "all": 0,
    }
    return content[: keep[where]]


@pytest.mark.parametrize("where", ["last byte", "half", "header", "length", "data", "all"])
def test_a_truncated_file_is_refused(donors, tmp_path, where):
    file = copied(donors, "a", tmp_path) / "model.safetensors"
    file.write_bytes(cut(file.read_bytes(), where))
    assert [str(file)] == places(refused(file.parent))


@pytest.mark.parametrize("more", [b"\0", b"\0" * 4096])
def test_bytes_behind_the_last_tensor_are_refused(donors, tmp_path, more):
    file = copied(donors, "a", tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes() + more)
    (fault,) = refused(file.parent)
    assert fault.place == str(file) and "bytes too many" in fault.found


@pytest.mark.parametrize("length", [0, 1, HEADER_LIMIT + 1, 2**63, 2**64 - 1])
def test_an_absurd_header_length_is_refused(donors, tmp_path, length):
    file = copied(donors, "a", tmp_path) / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    assert [str(file)] == places(refused(file.parent))


def test_a_header_that_ends_one_byte_past_the_file_is_refused(tmp_path):
    content = raw({})
    path = written(tmp_path, (len(content) - 7).to_bytes(8, "little") + content[8:])
    assert places(faults(read_header, path)) == [str(path)]


@pytest.mark.parametrize(
    "header, named",
    [
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, "b"),
        ({"a": entry(0, 8, [2]), "b": entry(0, 8, [2]), "c": entry(8, 12, [1])}, "b"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, "b"),
        ({"a": entry(4, 12, [2])}, "a"),
        ({"a": entry(0, 8, [2]), "b": entry(8, 20, [3])}, None),
        ({"a": entry(0, 12, [3], "F16")}, "a"),
        ({"a": entry(0, 12, [3], "F33")}, "a"),
        ({"a": entry(0, 12, [3], None)}, "a"),
        ({"a": entry(0, 12, [3], ["F32"])}, "a"),
        ({"a": entry(0, 12, [4])}, "a"),
        ({"a": entry(0, 12, [-3])}, "a"),
        ({"a": entry(0, 12, [-3, -1])}, "a"),
        ({"a": entry(12, 0, [-3])}, "a"),
        ({"a": entry(-4, 8, [3])}, "a"),
        ({"a": entry(0, 12, 3)}, "a"),
        ({"a": entry(0, 12, None)}, "a"),
        ({"a": {"dtype": "F32", "shape": [3]}}, "a"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4, 12]}}, "a"),
        ({"a": {"shape": [3], "data_offsets": [0, 12]}}, "a"),
        ({"a": [1, 2, 3]}, "a"),
        ({"a": 7}, "a"),
    ],
)
def test_entries_that_disagree_with_the_file_are_refused(tmp_path, header, named):
    path = written(tmp_path, raw(header, bytes(12)))
    found = faults(read_header, path)
    assert str(path) in found[0].place
    assert named is None or found[0].place.endswith(f": {named}")


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0.0, 12.0, [3])},
        {"a": entry(0, 12, [3.0])},
        {"a": entry(0, 12, [True, 3])},
        {"a": entry(False, 12, [3])},
        {"a": entry(0, 12, ["x"])},
        {"a": entry(0, 12, [10**30, "x"])},
        {"a": entry(0, 12, [3, None])},
        {"a": entry(0, 4, "")},
        {"a": entry(0, 4, {})},
        {"a": entry(0, float("inf"), [float("inf")])},
        {"a": entry(0, 10**4300 - 4, [10**4300 // 4 - 1])},
    ],
    ids=lambda header: json.dumps(header)[:60],
)
def test_sizes_that_are_no_whole_numbers_within_the_file_are_refused(tmp_path, header):
    path = written(tmp_path, raw(header, bytes(12 if header["a"]["data_offsets"][1] != 4 else 4)))
    assert str(path) in faults(read_header, path)[0].place


def test_all_wrong_entries_are_told_together(tmp_path):
    path = written(
        tmp_path,
        raw({"a": entry(0, 8, [3]), "fine": entry(8, 12, [1]), "b": entry(12, 12, [1])}, bytes(12)),
    )
    assert places(faults(read_header, path)) == [f"{path}: a", f"{path}: b"]


@pytest.mark.parametrize("header", [b"[]", b"7", b'"text"', b"null", b"true"])
def test_a_header_that_is_no_object_is_refused(tmp_path, header):
    path = written(tmp_path, raw(header))
    assert str(path) in faults(read_header, path)[0].place


@pytest.mark.parametrize(
    "header",
    [b"{", b"\xff\xfe", b'{"a":}', raw({"\ud800": entry(0, 0, [0])})[8:], b"[" * 100_000],
    ids=["open", "bytes", "hole", "surrogate", "deep"],
)
def test_a_header_that_is_no_json_is_refused(tmp_path, header):
    path = written(tmp_path, raw(header))
    assert str(path) in faults(read_header, path)[0].place


def test_a_name_that_stands_twice_in_a_header_is_refused(tmp_path):
    one = json.dumps(entry(0, 4, [1]))
    (fault,) = faults(
        read_header, path := written(tmp_path, raw(f'{{"a":{one},"a":{one}}}'.encode(), bytes(4)))
    )
    assert fault.place == str(path) and "twice" in fault.found


def test_a_folder_in_place_of_a_file_is_refused(donors, tmp_path):
    folder = copied(donors, "a", tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert str(folder / "model.safetensors") in refused(folder)[0].place


# Damaged folders


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


def test_a_name_that_stands_twice_in_the_index_or_the_config_is_refused(donors, tmp_path):
    folder = copied(donors, "deep", tmp_path)
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(
        text.replace('"weight_map": {', '"weight_map": {"model.norm.weight": "x.safetensors",')
    )
    (fault,) = refused(folder)
    assert fault.place == str(folder / INDEX) and "twice" in fault.found
    (folder / INDEX).write_text(text)
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("{", '{"hidden_size": 32,', 1)
    )
    (fault,) = refused(folder)
    assert fault.place == str(folder / "config.json") and "twice" in fault.found


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


def test_a_tensor_of_a_shard_that_the_index_lacks_is_named(donors, tmp_path):
    def edit(index):
        del index["weight_map"]["model.norm.weight"]
        return index

    (fault,) = refused(edited_index(donors, tmp_path, edit))
    assert fault.place.endswith("deep: model.norm.weight") and fault.found == "not in the index"


def test_a_tensor_stored_in_two_shards_is_named(donors, tmp_path):
    folder = copied(donors, "deep", tmp_path)
    index = json.loads((folder / INDEX).read_text())
    save_file(
        {"model.norm.weight": np.ones(16, np.float32), "model.more": np.ones(1, np.float32)},
        folder / "more.safetensors",
    )
    index["weight_map"]["model.more"] = "more.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    (fault,) = refused(folder)
    assert fault.place.endswith("deep: model.norm.weight") and fault.found == "stored twice"


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


def test_the_single_file_is_read_where_an_index_lies_beside_it_as_transformers_does(
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
        ("model_type", "mamba"),
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


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A donor whose block 1 has a plain MLP, the others experts."""
    return write_donor(
        tmp_path_factory.mktemp("mixture") / "donor", "qwen3_moe", mlp_only_layers=[1]
    )


def test_a_tensor_that_only_blocks_of_its_kind_have_is_missed(mixture, tmp_path):
    name = "model.layers.3.mlp.experts.2.up_proj.weight"
    folder = changed(
        mixture,
        tmp_path / "holes",
        lambda all: {key: value for key, value in all.items() if key != name},
    )
    assert places(refused(folder)) == [f"{folder}: {name}"]
    assert open_checkpoint(str(mixture)).blocks == 4


def test_kinds_of_blocks_are_held_against_config(mixture, tmp_path):
    folder = changed(
        mixture, tmp_path / "odd", config=lambda config: config | {"mlp_only_layers": [2]}
    )
    found = [fault for fault in refused(folder) if fault.place == f"{folder}: mlp_only_layers"]
    assert [(fault.expected, fault.found) for fault in found] == [
        ("no mlp.gate_proj. in block 1", "mlp.gate_proj. in block 1"),
        ("mlp.gate_proj. in block 2", "no mlp.gate_proj. in block 2"),
    ]


def test_a_gpt2_whose_blocks_depend_on_their_index_is_refused(donors, tmp_path):
    folder = changed(
        donors["g"],
        tmp_path / "scaled",
        config=lambda config: config | {"scale_attn_by_inverse_layer_idx": True},
    )
    assert refused(folder)[0].place == f"{folder / 'config.json'}: scale_attn_by_inverse_layer_idx"


# Tensors against the config


def without(*parts):
    return lambda tensors: {
        name: value for name, value in tensors.items() if not any(part in name for part in parts)
    }


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"]
)
def test_a_tensor_that_one_block_lacks_is_named(donors, tmp_path, name):
    folder = changed(donors["a"], tmp_path / "holes", without(name))
    assert places(refused(folder)) == [f"{folder}: {name}"]


def test_a_tensor_that_one_of_two_blocks_lacks_is_named(donors, tmp_path):
    gone = "model.layers.1.mlp.up_proj.weight"
    folder = changed(
        donors["a"],
        tmp_path / "two",
        without("layers.2.", "layers.3.", gone),
        lambda config: config | {"num_hidden_layers": 2},
    )
    assert any(gone in place for place in places(refused(folder)))


def test_a_tensor_that_one_block_alone_has_is_named(donors, tmp_path):
    more = "model.layers.1.mlp.up_proj.bias"
    folder = changed(
        donors["a"], tmp_path / "more", lambda tensors: tensors | {more: np.zeros(24, np.float32)}
    )
    assert any(more in place for place in places(refused(folder)))


@pytest.mark.parametrize(
    "count, told",
    [(5, "none of block 4"), (9, "none of block 4, 5, 6, 7, 8"), (3, "some of block 3")],
)
def test_a_count_of_blocks_that_the_weights_contradict_is_refused(donors, tmp_path, count, told):
    folder = changed(
        donors["a"], tmp_path / "count", config=lambda config: config | {"num_hidden_layers": count}
    )
    (fault,) = refused(folder)
    assert (fault.place, fault.expected, fault.found) == (
        str(folder),
        f"tensors of {count} blocks",
        told,
    )


def test_a_block_tensor_of_another_shape_is_named(donors, tmp_path):
    name = "model.layers.3.mlp.down_proj.weight"
    folder = changed(
        donors["a"],
        tmp_path / "shape",
        lambda tensors: tensors | {name: np.ascontiguousarray(tensors[name].T)},
    )
    (fault,) = refused(folder)
    assert (
        fault.place == f"{folder}: {name}"
        and "(16, 24)" in fault.expected
        and "(24, 16)" in fault.found
    )


@pytest.mark.parametrize(
    "name, shape",
    [
        ("model.embed_tokens.weight", (48, 15)),
        ("model.embed_tokens.weight", (16, 48)),
        ("model.embed_tokens.weight", (50, 16)),
        ("model.embed_tokens.weight", (64, 16)),
        ("model.norm.weight", (17,)),
        ("lm_head.weight", (48, 17)),
        ("lm_head.weight", (47, 16)),
    ],
)
def test_a_tensor_that_contradicts_the_config_is_named(donors, tmp_path, name, shape):
    folder = changed(
        donors["a"],
        tmp_path / "shape",
        lambda tensors: tensors | {name: np.zeros(shape, np.float32)},
    )
    assert set(places(refused(folder))) == {f"{folder}: {name}"}


@pytest.mark.parametrize(
    "part, role", [("embed_tokens", "embedding"), ("model.norm", "final"), ("lm_head", "head")]
)
def test_a_checkpoint_without_one_of_its_parts_is_refused(donors, tmp_path, part, role):
    folder = changed(donors["a"], tmp_path / "parts", without(part))
    (fault,) = refused(folder)
    assert (fault.place, fault.expected) == (str(folder), f"tensors of the {role}")


def test_a_tied_checkpoint_needs_no_head(donors):
    assert ("head", None) not in open_checkpoint(str(donors["b"])).by_role


def test_a_tensor_of_no_known_part_is_refused(donors, tmp_path):
    folder = changed(
        donors["a"],
        tmp_path / "tower",
        lambda tensors: tensors | {"vision.patch.weight": np.zeros(3, np.float32)},
    )
    (fault,) = refused(folder)
    assert "vision.patch.weight" in fault.place


def test_a_tensor_under_its_old_and_its_new_name_is_refused(donors, tmp_path):
    folder = changed(
        donors["g"],
        tmp_path / "both",
        lambda tensors: tensors | {"wte.weight": tensors["transformer.wte.weight"] + 1},
    )
    assert "wte.weight" in str(refused(folder))


def test_buffers_that_old_checkpoints_carry_are_no_part_of_a_block(donors, tmp_path):
    buffers = {
        "transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8),
        "transformer.h.0.attn.masked_bias": np.ones((), np.uint8),
    }
    folder = changed(donors["g"], tmp_path / "old", lambda tensors: tensors | buffers)
    old, new = open_checkpoint(str(folder)), open_checkpoint(str(donors["g"]))
    assert old.by_role["block", 0] == new.by_role["block", 0]
    assert set(old.by_role["ignored", None]) == set(buffers)


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


# Any bytes at all

VALID = save(
    {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.int8),
        "c": np.ones((), np.float16),
    }
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([*BYTES_OF]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
small = st.integers(-1, 24) | json_values
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BYTES_OF]) | json_values,
        "shape": st.lists(small, max_size=3) | json_values,
        "data_offsets": st.lists(small, min_size=2, max_size=2) | json_values,
    }
)
headers = (
    st.dictionaries(
        st.text(max_size=3) | st.just("__metadata__"), entries | json_values, max_size=3
    )
    | json_values
)
mutations = st.lists(
    st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=3
)


def mutated(changes) -> bytes:
    content = bytearray(VALID)
    for position, value in changes:
        content[position] = value
    return bytes(content)


contents = st.one_of(
    st.binary(max_size=64),
    st.binary(max_size=64).map(raw),
    mutations.map(mutated),
    st.integers(0, len(VALID) - 1).map(lambda stop: VALID[:stop]),
    st.builds(
        lambda header, data: raw(json.dumps(header).encode(), data), headers, st.binary(max_size=24)
    ),
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzzed") / "x.safetensors"


@given(content=contents)
@example(content=VALID)
@settings(max_examples=600, deadline=None, derandomize=True)
def test_any_bytes_are_read_consistently_or_refused(fuzzed, content):
    fuzzed.write_bytes(content)
    try:
        header = read_header(fuzzed)
    except FrankenmergeError as error:
        assert all(part for fault in error.faults for part in fault)
        assert content != VALID
        return
    position = 8 + int.from_bytes(content[:8], "little")
    for tensor in sorted(header.values(), key=lambda tensor: (tensor.start, tensor.stop)):
        assert all(type(number) is int for number in (*tensor.shape, tensor.start, tensor.stop))
        assert tensor.start == position
        assert tensor.bytes == BYTES_OF[tensor.dtype] * math.prod(tensor.shape)
        position = tensor.stop
    assert position == len(content)
    try:
        with safe_open(fuzzed, "np") as handle:
            theirs = {
                name: (
                    handle.get_slice(name).get_dtype(),
                    tuple(handle.get_slice(name).get_shape()),
                )
                for name in handle.keys()
            }  # noqa: SIM118
    except SafetensorError:
        return  # the library is stricter about metadata and white space
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in header.items()} == theirs
