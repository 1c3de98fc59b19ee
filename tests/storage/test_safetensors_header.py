"""Headers compared with the safetensors library; damaged files and any bytes are refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from damage import copied, entry, faults, places, raw, refused, written
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from frankenmerge.errors import FrankenmergeError
from frankenmerge.storage.safetensors_header import BYTES_OF, HEADER_LIMIT, read_header


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
def test_bytes_after_the_last_tensor_are_refused(donors, tmp_path, more):
    file = copied(donors, "a", tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes() + more)
    (fault,) = refused(file.parent)
    assert fault.place == str(file) and "too many bytes" in fault.found


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


def test_all_wrong_entries_are_reported_together(tmp_path):
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


def test_a_name_that_occurs_twice_in_a_header_is_refused(tmp_path):
    one = json.dumps(entry(0, 4, [1]))
    (fault,) = faults(
        read_header, path := written(tmp_path, raw(f'{{"a":{one},"a":{one}}}'.encode(), bytes(4)))
    )
    assert fault.place == str(path) and "duplicate names" in fault.found


def test_a_folder_in_place_of_a_file_is_refused(donors, tmp_path):
    folder = copied(donors, "a", tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert str(folder / "model.safetensors") in refused(folder)[0].place


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
