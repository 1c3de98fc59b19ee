"""Computed tensors on disk: values rounded once, rows, progress; threads and processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import meter, resolved
from means import TYPES, tensors_of, tree

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.merging.writer import write_computed
from frankenmerge.splicing import computing
from frankenmerge.splicing.computing import Computation, open_files
from frankenmerge.splicing.operations import Combine, Input, readings
from frankenmerge.splicing.vocabulary import Rows

# Values


@pytest.mark.parametrize(
    "stored, made",
    [("F32", "F32"), ("BF16", "BF16"), ("F16", "F16"), ("F32", "BF16"), ("BF16", "F32")],
)
def test_every_element_is_the_exact_mean_rounded_once(linear, pair, tmp_path, stored, made):
    first, second = pair[stored]
    result = linear(first, second, tmp_path / "out", dtype=made)
    found, a, b = tensors_of(tmp_path / "out"), tensors_of(first), tensors_of(second)
    assert found.keys() == a.keys() and result.computed == result.tensors == len(found)
    for name, tensor in found.items():
        assert tensor.dtype == TYPES[made] and tensor.shape == a[name].shape
        exact = a[name].double() * 0.25 + b[name].double() * 0.75
        error = (tensor.double() - exact).abs()
        step = torch.finfo(TYPES[made]).eps * exact.abs()
        # half a step of the result's type; where that is no coarser than float32, float32's own
        # rounding besides
        bound = step * 0.5 + torch.finfo(torch.float32).eps * (
            a[name].double().abs() * 0.25 + b[name].double().abs() * 0.75
        )
        assert (error <= bound + 2.0**-25).all(), name


def test_computed_and_copied_tensors_share_a_file(linear, pair, tmp_path):
    first, second = pair["BF16"]
    result = linear(
        first,
        second,
        tmp_path / "out",
        every=3,
        weights=(0.0, 1.0),
        options={"shard_size": 200_000},
    )
    found, a, b = tensors_of(tmp_path / "out"), tensors_of(first), tensors_of(second)
    recipe = recipe_of([Block(str(first), index) for index in range(4)])
    names = [copy.name for copy in resolved(recipe).operations]
    computed = set(names[::3])
    assert result.computed == len(computed)
    for name, tensor in found.items():
        assert torch.equal(tensor, (b if name in computed else a)[name]), name


def test_the_provenance_names_the_parts_of_a_computed_tensor(linear, pair, tmp_path):
    first, second = pair["F32"]
    linear(first, second, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "frankenmerge.json").read_text())
    assert record["tensors"]["model.norm.weight"] == {
        "method": "linear",
        "parameters": {"normalize": True},
        "seed": 0,
        "inputs": [
            {"donor": str(first), "tensor": "model.norm.weight", "parameters": {"weight": 0.25}},
            {"donor": str(second), "tensor": "model.norm.weight", "parameters": {"weight": 0.75}},
        ],
    }


# Rows and progress


def test_progress_counts_computed_bytes(linear, pair, tmp_path):
    moved = []
    result = linear(*pair["BF16"], tmp_path / "out", every=2, progress=meter(moved.append))
    assert (
        sum(moved)
        == result.bytes
        == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    )


@pytest.mark.parametrize("extension", [True, False])
def test_rows_of_several_donors_are_put_together(pair, tmp_path, without_extension, extension):
    if not extension:
        without_extension()
    first, second = (open_checkpoint(str(folder)) for folder in pair["BF16"])
    rng = np.random.default_rng(0)
    count, name = 7001, "model.embed_tokens.weight"
    origin, row = (
        rng.integers(-1, 2, count).astype(np.int16),
        rng.integers(0, 5003, count).astype(np.int32),
    )
    origin[100:2000], row[100:2000] = 1, np.arange(1900)
    rows = Rows((first.name, second.name), (first.tensors[name], second.tensors[name]), origin, row)
    operation = Combine(
        name,
        "F32",
        (count, 64),
        "linear",
        (Input(first.name, name, first.tensors[name], {"weight": 1.0}, rows),),
        None,
        {},
        0,
    )
    assert [reading.donor for reading in readings(operation)] == [first.name, second.name]
    written = written_alone(operation, tmp_path / "t")
    both = [tensors_of(folder)[name].float() for folder in pair["BF16"]]
    expected = torch.stack(
        [both[o][r] if o >= 0 else torch.zeros(64) for o, r in zip(origin, row, strict=True)]
    )
    assert torch.equal(written.view(count, 64), expected)


def written_alone(operation: Combine, path: Path) -> torch.Tensor:
    """What `write_computed` writes for one operation, as float32."""
    with open_files() as files, path.open("w+b") as target:
        write_computed(operation, Computation(files, {}), target.fileno(), 0, lambda _: None)
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=TYPES[operation.dtype]).float()


# The same bytes


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_writes_the_same_bytes(linear, pair, tmp_path, monkeypatch, threads):
    before = torch.get_num_threads()
    for name, count in (("one", 1), ("many", threads)):
        monkeypatch.setattr(computing, "cores", lambda count=count: count)
        linear(*pair["BF16"], tmp_path / name, options={"shard_size": 300_000})
    assert tree(tmp_path / "one") == tree(tmp_path / "many")
    assert torch.get_num_threads() == before


SHARED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import means
from frankenmerge.distributed import own_rank
from frankenmerge.merging.write_plan import MergeOptions
from frankenmerge.merging.writer import merge
first, second, output = sys.argv[2:5]
splice = means.linear_splice(Path(first), Path(second))
merge(splice, Path(output), MergeOptions(shard_size=100_000), rank=own_rank())
"""


def test_two_processes_write_the_bytes_that_one_writes(linear, pair, tmp_path):
    linear(*pair["BF16"], tmp_path / "one", options={"shard_size": 100_000})
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, here, *map(str, pair["BF16"]), str(tmp_path / "two")],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [one.communicate(timeout=120)[1] for one in running]
    assert [one.returncode for one in running] == [0, 0], errors
    assert (
        tree(tmp_path / "two") == tree(tmp_path / "one")
        and len(list((tmp_path / "two").glob("*.safetensors"))) == 4
    )
