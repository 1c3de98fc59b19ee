"""How tensors are divided among files: limits, order, and where in a block cloned ones begin."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save_file

from frankenmerge.merging import shards as module
from frankenmerge.merging.copying import PIECE, pieces
from frankenmerge.merging.shards import BLOCK, Range, operation_faults, plan_shards, ranges_of
from frankenmerge.splicing.operations import Combine, Copy, Input
from frankenmerge.storage.safetensors_header import Tensor, read_header

DONOR = Path("donor.safetensors")


def copies(*sizes: int, start: int = 8, gap: int = 0, file: Path = DONOR) -> list[Copy]:
    """Copies of tensors of bytes that lie in one file, `gap` bytes apart."""
    made = []
    for number, size in enumerate(sizes):
        made.append(
            Copy(
                f"{file.stem}.{number}",
                "donor",
                f"t{number}",
                Tensor(file, "U8", (size,), start, start + size),
            )
        )
        start += size + gap
    return made


def names(shard) -> list[str]:
    return [operation.name for operation in shard.operations]


@pytest.fixture
def every_size(monkeypatch):
    """Let tensors of every size begin a shard that is cloned."""
    monkeypatch.setattr(module, "WORTH_CLONING", 1)


# The cut


@pytest.mark.parametrize(
    "limit, held",
    [(100, [5]), (99, [4, 1]), (40, [2, 2, 1]), (39, [1, 1, 1, 1, 1]), (20, [1] * 5), (1, [1] * 5)],
)
def test_files_hold_what_fits_in_order(limit, held):
    shards = plan_shards(copies(*[20] * 5), limit)
    assert [len(shard.operations) for shard in shards] == held
    assert [name for shard in shards for name in names(shard)] == [
        f"donor.{number}" for number in range(5)
    ]
    assert not any(shard.cloned for shard in shards)


def test_computed_tensors_take_the_bytes_of_their_type():
    source = Tensor(DONOR, "F32", (3, 5), 0, 60)
    made = Combine("t", "BF16", (3, 5), "linear", (Input("d", "t", source, {}),), None, {}, 0)
    assert made.bytes == 30
    (shard,) = plan_shards([made], 100)
    header = json.loads(shard.header[8:])
    assert (
        header["t"] == {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, 30]}
        and shard.bytes == len(shard.header) + 30
    )


# Clones


def test_tensors_of_whole_blocks_make_one_file_for_every_byte_of_a_block_at_which_they_begin(
    every_size,
):
    first, second = (
        copies(*[2 * BLOCK] * 4, start=8 + 96),
        copies(*[BLOCK] * 3, start=3 * BLOCK + 512, file=Path("other.safetensors")),
    )
    mixed = [second[0], *first[:2], second[1], *first[2:], second[2]]
    shards = plan_shards(mixed, 10**9, {DONOR, Path("other.safetensors")})
    assert [names(shard) for shard in shards] == [
        [f"other.{n}" for n in range(3)],
        [f"donor.{n}" for n in range(4)],
    ]
    assert [len(shard.header) % BLOCK for shard in shards] == [512, 104]


def test_tensors_of_odd_sizes_are_chained_where_one_ends_as_the_next_begins(every_size):
    chain = copies(5000, 700, 9000, 8192, start=1000)
    (shard,) = plan_shards(chain, 10**9, {DONOR})
    assert names(shard) == [f"donor.{n}" for n in range(4)]
    apart = plan_shards(copies(5000, 700, 9000, 8192, start=1000, gap=8), 10**9, {DONOR})
    assert len(apart) == 4


def test_small_computed_and_not_clonable_tensors_follow_in_the_usual_layout(
    monkeypatch,
):
    monkeypatch.setattr(module, "WORTH_CLONING", 3 * BLOCK)
    donor = copies(4 * BLOCK, 100, 4 * BLOCK, 200, start=64, gap=BLOCK - 4)
    other = copies(8 * BLOCK, file=Path("other.safetensors"))
    computed = Combine("c", "U8", (50,), "linear", (), None, {}, 0)
    shards = plan_shards([donor[0], computed, *donor[1:], *other], 10**9, {DONOR})
    assert [(shard.cloned, names(shard)) for shard in shards] == [
        (True, ["donor.0"]),
        (True, ["donor.2"]),
        (False, ["c", "donor.1", "donor.3", "other.0"]),
    ]


def test_chains_keep_to_the_limit(every_size):
    shards = plan_shards(copies(*[BLOCK] * 7), 2 * BLOCK, {DONOR})
    assert [len(shard.operations) for shard in shards] == [2, 2, 2, 1] and all(
        shard.cloned for shard in shards
    )


@pytest.mark.parametrize("clonable", [frozenset(), frozenset({DONOR})])
def test_files_without_clones_are_laid_out_alike_whatever_could_be_cloned(clonable):
    small = copies(*[1000] * 5)
    assert plan_shards(small, 2500, clonable) == plan_shards(small, 2500)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["x", "y"]), st.integers(0, 3 * BLOCK), st.integers(0, 50)),
        max_size=25,
    ),
    st.integers(1, 12 * BLOCK),
    st.integers(0, 5000),
    st.booleans(),
)
def test_every_layout_is_read_by_the_safetensors_library_and_holds_the_donors_bytes(
    donor, limit, shift, cloning
):
    content = {
        name: np.random.default_rng(ord(name)).bytes(25 * (3 * BLOCK + 50) + 5000) for name in "xy"
    }
    operations, ends = [], dict.fromkeys("xy", shift)
    for number, (name, size, gap) in enumerate(donor):
        start = ends[name] + gap
        operations.append(
            Copy(f"t{number}", name, "s", Tensor(Path(name), "U8", (size,), start, start + size))
        )
        ends[name] = start + size
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "WORTH_CLONING", BLOCK)
        shards = plan_shards(operations, limit, {Path("x")} if cloning else ())
    assert sorted(name for shard in shards for name in names(shard)) == sorted(
        operation.name for operation in operations
    )
    for shard in shards:
        file = bytearray(shard.header + bytes(shard.tensor_bytes))
        for found in ranges_of(shard):
            source = content[str(found.file)]
            file[found.position : found.position + found.bytes] = source[
                found.start : found.start + found.bytes
            ]
        assert len(file) == shard.bytes
        held = load(bytes(file))
        for operation in shard.operations:
            tensor = operation.tensor
            assert (
                held[operation.name].tobytes()
                == content[operation.donor][tensor.start : tensor.stop]
            )
        if shard.cloned:
            assert all(
                (place.operation.tensor.start - place.start) % BLOCK == 0 for place in shard.places
            )
        else:
            assert len(shard.header) % 8 == 0
        assert shard.tensor_bytes <= limit or len(shard.operations) == 1


def test_a_padded_header_is_read_back_by_our_own_reader(every_size, tmp_path):
    save_file(
        {f"t{n}": np.arange(BLOCK, dtype=np.uint8) for n in range(3)},
        tmp_path / "donor.safetensors",
    )
    tensors = read_header(tmp_path / "donor.safetensors")
    operations = [Copy(name, "d", name, tensor) for name, tensor in tensors.items()]
    (shard,) = plan_shards(operations, 10**9, {tmp_path / "donor.safetensors"})
    (tmp_path / "out.safetensors").write_bytes(shard.header + bytes(shard.tensor_bytes))
    assert {
        name: tensor.start % BLOCK
        for name, tensor in read_header(tmp_path / "out.safetensors").items()
    } == {name: tensor.start % BLOCK for name, tensor in tensors.items()}


# Ranges


def test_neighbours_in_donor_and_result_are_one_range():
    donor = copies(100, 200, 300, 400)
    (shard,) = plan_shards([*donor[:2], donor[3], donor[2], donor[3]._replace(name="again")], 10**9)
    begin = len(shard.header)
    assert list(ranges_of(shard)) == [
        Range(DONOR, 8, begin, 300),
        Range(DONOR, 608, begin + 300, 400),
        Range(DONOR, 308, begin + 700, 700),
    ]


def test_a_computed_tensor_separates_the_ranges_around_it():
    donor = copies(100, 100)
    computed = Combine("c", "U8", (50,), "linear", (), None, {}, 0)
    (shard,) = plan_shards([donor[0], computed, donor[1]], 10**9)
    assert [(found.position - len(shard.header), found.bytes) for found in ranges_of(shard)] == [
        (0, 100),
        (150, 100),
    ]


@pytest.mark.parametrize(
    "start, size", [(0, 1), (5, PIECE), (BLOCK, 3 * PIECE), (100, 2 * PIECE + 77), (7, 0)]
)
def test_pieces_are_the_range_and_end_at_blocks(start, size):
    cut = list(pieces(Range(DONOR, start, 1000, size)))
    assert sum(piece.bytes for piece in cut) == size
    expected = start
    for piece in cut:
        assert (piece.start, piece.position) == (
            expected,
            1000 + expected - start,
        ) and 0 < piece.bytes <= PIECE
        expected += piece.bytes
    assert all((piece.start + piece.bytes) % BLOCK == 0 for piece in cut[:-1])


# Checks


def test_faults_of_operations_are_reported_together(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(bytes(100))
    good = Tensor(file, "F32", (5,), 8, 28)
    operations = [
        Copy("twice", "d", "a", good),
        Copy("twice", "d", "a", good),
        Copy("long", "d", "b", good._replace(stop=32)),
        Copy("beyond", "d", "c", Tensor(file, "F32", (5,), 90, 110)),
        Combine("other shape", "F32", (6,), "linear", (Input("d", "a", good, {}),), None, {}, 0),
        Combine(
            "whole numbers",
            "F32",
            (20,),
            "linear",
            (Input("d", "i", Tensor(file, "I8", (20,), 8, 28), {}),),
            None,
            {},
            0,
        ),
        Combine(
            "base",
            "F32",
            (5,),
            "linear",
            (Input("d", "a", good, {}),),
            Input("e", "z", good._replace(shape=(1, 5)), {}),
            {},
            0,
        ),
        Combine("odd type", "I8", (5,), "linear", (Input("d", "a", good, {}),), None, {}, 0),
    ]
    assert [(fault.place, fault.found) for fault in operation_faults(operations, {file})] == [
        ("twice", "twice"),
        ("d: b", "24"),
        ("d: a", "[5]"),
        ("d: i", "I8"),
        ("e: z", "[1, 5]"),
        ("odd type", "I8"),
        (str(file), "100"),
    ]


def test_no_fault_is_found_in_sound_operations(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(bytes(28))
    good = Tensor(file, "F32", (5,), 8, 28)
    assert math.prod(good.shape) * 4 == good.bytes
    assert not list(
        operation_faults([Copy("a", "d", "a", good), Copy("b", "d", "a", good)], {file})
    )
    absent = good._replace(file=tmp_path / "on the hub.safetensors")
    assert not list(operation_faults([Copy("a", "d", "a", absent)], {file}))
