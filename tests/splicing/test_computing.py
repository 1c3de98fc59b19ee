"""Computed tensors on disk: their values, rounded once; NaN and Inf; threads, processes and memory."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import changed, meter, resolved, write_donor, written
from safetensors.torch import load_file, save_file

from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging.finite import finite_faults
from frankenmerge.merging.write_plan import MergeOptions
from frankenmerge.merging.writer import merge, write_computed
from frankenmerge.progress import silent
from frankenmerge.splicing import computing
from frankenmerge.splicing.computing import Computation
from frankenmerge.splicing.methods import native_chunks
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.operations import Combine, Copy, Input, readings
from frankenmerge.splicing.resolve import Splice
from frankenmerge.splicing.vocabulary import Rows
from frankenmerge.storage.safetensors_header import Tensor

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def combined(
    copies: Sequence[Copy],
    second: Checkpoint,
    *,
    dtype: str | None = None,
    weights=(0.25, 0.75),
    every: int = 1,
) -> list:
    """Make every so many copies weighted means with the same tensors of another donor."""
    made = []
    for number, copy in enumerate(copies):
        if number % every:
            made.append(copy)
            continue
        inputs = (
            Input(copy.donor, copy.source, copy.tensor, {"weight": weights[0]}),
            Input(second.name, copy.source, second.tensors[copy.source], {"weight": weights[1]}),
        )
        made.append(
            Combine(
                copy.name,
                dtype or copy.dtype,
                copy.shape,
                "linear",
                inputs,
                None,
                {"normalize": True},
                0,
            )
        )
    return made


def linear_splice(first: Path, second: Path, **how) -> Splice:
    """The splice of a whole donor, combined tensor by tensor with another one."""
    splice = resolved(recipe_of([Block(str(first), index) for index in range(4)]))
    operations = combined(splice.operations, open_checkpoint(str(second)), **how)
    return replace(splice, operations=tuple(operations))


@pytest.fixture
def linear():
    """Merge whole donors tensor by tensor."""

    def call(first: Path, second: Path, output: Path, *, options=(), progress=silent, **how):
        options = MergeOptions(**dict(options))
        return merge(linear_splice(first, second, **how), output, options, progress=progress)

    return call


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict[str, list[Path]]:
    """Two donors of every type whose embedding is larger than a chunk."""
    root = tmp_path_factory.mktemp("pair")
    shape = {"hidden_size": 64, "vocab_size": 5003}
    return {
        name: [
            write_donor(
                root / f"{name}{seed}", seed=seed, dtype=str(dtype).removeprefix("torch."), **shape
            )
            for seed in (1, 2)
        ]
        for name, dtype in TYPES.items()
    }


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


# The two arithmetics


needs_extension = pytest.mark.skipif(
    native_chunks.extension is None and not shutil.which("cc"),
    reason="no compiler has built the extension",
)


@pytest.fixture
def without_extension(monkeypatch):
    """As where no compiler was there when the package was installed."""
    return lambda: monkeypatch.setattr(native_chunks, "extension", None)


@needs_extension
def test_the_provenance_says_what_computed(linear, pair, tmp_path, without_extension):
    def provenance(name):
        linear(*pair["F32"], tmp_path / name)
        return json.loads((tmp_path / name / "frankenmerge.json").read_text())

    by_c = provenance("c")
    assert by_c["arithmetic"] == ["C"] and by_c["versions"].keys() == {"python", "numpy"}
    without_extension()
    by_torch = provenance("torch")
    assert by_torch["arithmetic"] == ["torch"]
    assert by_torch["versions"].pop("torch").split("+")[0] == torch.__version__.split("+")[0]
    assert by_torch | {"arithmetic": ["C"]} == by_c


@pytest.mark.parametrize(
    "stored, made",
    [("F32", "F32"), ("BF16", "BF16"), ("F16", "F16"), ("F32", "BF16"), ("BF16", "F32")],
)
def test_without_the_extension_the_bytes_are_the_same(
    linear, pair, tmp_path, without_extension, stored, made
):
    how = {"dtype": made, "weights": (0.3, 0.7)}
    linear(*pair[stored], tmp_path / "c", **how)
    without_extension()
    linear(*pair[stored], tmp_path / "torch", **how)
    one, other = tree(tmp_path / "c"), tree(tmp_path / "torch")
    assert one.pop("frankenmerge.json") != other.pop("frankenmerge.json") and one == other


@needs_extension
@pytest.mark.parametrize("method", ["linear", "slerp", "model_stock", "ties", "dare_ties"])
@pytest.mark.parametrize(
    "stored, made",
    [("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16"), ("F32", "bfloat16")],
)
def test_without_the_extension_the_bytes_of_nan_are_the_same(
    pair, tmp_path, without_extension, method, stored, made
):
    donors = []
    for number, donor in enumerate(pair[stored]):
        donors.append(shutil.copytree(donor, tmp_path / f"donor{number}"))
        tensors = load_file(donors[-1] / "model.safetensors")
        for place, value in enumerate((math.nan, -math.nan, math.inf, -math.inf)):
            tensors[NAME].view(-1)[place + number :: 16] = value
        save_file(tensors, donors[-1] / "model.safetensors", {"format": "pt"})
    own = {
        "linear": {"weight": 0.4},
        "ties": {"weight": 0.4, "density": 0.6},
        "dare_ties": {"weight": 0.4, "density": 0.6},
    }
    weights = {"parameters": own.get(method, {})}
    recipe = {
        "models": [{"model": str(donor), **weights} for donor in (*donors, pair[stored][0])],
        "merge_method": method,
        "dtype": made,
    }
    recipe |= {} if method == "linear" else {"base_model": str(donors[0])}
    if method == "slerp":
        recipe |= {"models": recipe["models"][:2], "parameters": {"t": 0.3}}
    parsed = Recipe.model_validate(recipe)
    written(parsed, tmp_path / "c", allow_nan=True)
    without_extension()
    written(parsed, tmp_path / "torch", allow_nan=True)
    one, other = (tmp_path / name / "model.safetensors" for name in ("c", "torch"))
    assert one.read_bytes() == other.read_bytes() and load_file(one)[NAME].isnan().any()


@needs_extension
@pytest.mark.parametrize(
    "method",
    ["linear", "slerp", "task_arithmetic", "model_stock", "ties", "dare_linear", "breadcrumbs"],
)
def test_what_is_computed_in_c_is_so_without_torch(pair, tmp_path, method):
    first, second = map(str, pair["BF16"])
    weight = {} if method in ("slerp", "model_stock") else {"parameters": {"weight": 0.4}}
    listed = [{"model": name, **weight} for name in (first, second)]
    recipe = {"models": listed, "merge_method": method} | (
        {} if method == "linear" else {"base_model": first}
    )
    recipe |= {"parameters": {"t": 0.3}} if method == "slerp" else {}
    recipe |= {"models": [*listed, {"model": second}]} if method == "model_stock" else {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(tmp_path / "recipe.yaml"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


LIGHT = """
import sys
from frankenmerge.cli import main
try:
    main(["merge", *sys.argv[1:]])
except SystemExit as ended:
    assert not ended.code
print([name for name in ("torch", "transformers", "accelerate") if name in sys.modules])
"""


@needs_extension
def test_what_one_arithmetic_began_the_other_does_not_resume(
    linear, pair, tmp_path, without_extension
):
    def broken(done):
        raise OSError("the disk is gone")

    options = {"shard_size": 100_000, "resume": True}
    with pytest.raises(FrankenmergeError, match="the disk is gone"):
        linear(*pair["BF16"], tmp_path / "out", options=options, progress=meter(broken))
    without_extension()
    with pytest.raises(FrankenmergeError, match="another arithmetic"):
        linear(*pair["BF16"], tmp_path / "out", options=options)


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
    files = {reading.tensor.file for reading in readings(operation)}
    handles = {file: os.open(file, os.O_RDONLY) for file in files}
    target = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        write_computed(operation, Computation(handles, {}), target, 0, lambda _: None)
    finally:
        for handle in (*handles.values(), target):
            os.close(handle)
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
import test_computing
from frankenmerge.distributed import own_rank
from frankenmerge.merging.write_plan import MergeOptions
from frankenmerge.merging.writer import merge
first, second, output = sys.argv[2:5]
splice = test_computing.linear_splice(Path(first), Path(second))
merge(splice, Path(output), MergeOptions(shard_size=100_000), rank=own_rank())
"""


def test_two_processes_write_the_bytes_that_one_writes(linear, pair, tmp_path):
    linear(*pair["BF16"], tmp_path / "one", options={"shard_size": 100_000})
    here = str(Path(__file__).parent)
    path = os.pathsep.join([str(Path(here).parent), os.environ.get("PYTHONPATH", "")])
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


# NaN and Inf


NAME = "model.layers.2.mlp.up_proj.weight"


def spoiled(donor: Path, folder: Path, value: float) -> Path:
    def spoil(arrays):
        arrays[NAME].flat[-1] = value
        return arrays

    return changed(donor, folder, spoil)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 1])
def test_a_number_that_is_none_in_an_input_is_refused_by_name(
    linear, pair, tmp_path, value, position
):
    given = list(pair["F32"])
    given[position] = spoiled(given[position], tmp_path / "spoiled", value)
    (tmp_path / "room").mkdir()
    with pytest.raises(FrankenmergeError) as caught:
        linear(*given, tmp_path / "room" / "out")
    (fault,) = caught.value.faults
    assert fault.place == f"{given[position]}: {NAME}" and "--allow-nan" in fault.remedy
    assert not list((tmp_path / "room").iterdir())
    linear(*given, tmp_path / "room" / "out", options={"allow_nan": True})
    bad = [
        name
        for name, tensor in tensors_of(tmp_path / "room" / "out").items()
        if not tensor.isfinite().all()
    ]
    assert bad == [NAME]


def test_finite_numbers_whose_sum_is_not_are_no_fault(linear, pair, tmp_path):
    large = [
        changed(
            donor,
            tmp_path / f"large{number}",
            lambda arrays: arrays | {NAME: np.full_like(arrays[NAME], 3e38)},
        )
        for number, donor in enumerate(pair["F32"])
    ]
    linear(*large, tmp_path / "out")
    assert torch.allclose(tensors_of(tmp_path / "out")[NAME], torch.tensor(3e38))


def test_a_result_that_overflows_its_type_is_refused(linear, pair, tmp_path):
    large = changed(
        pair["F32"][0],
        tmp_path / "large",
        lambda arrays: arrays | {NAME: np.full_like(arrays[NAME], 1e6)},
    )
    with pytest.raises(FrankenmergeError) as caught:
        linear(large, pair["F32"][1], tmp_path / "out", dtype="F16")
    (fault,) = caught.value.faults
    assert fault.place == NAME and "F16" in fault.remedy and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_copied_tensor_is_read_for_nan_where_that_is_asked_for(pair, tmp_path, dtype, value):
    import shutil

    donor = Path(shutil.copytree(pair[dtype][0], tmp_path / "donor"))
    tensors = load_file(donor / "model.safetensors")
    tensors[NAME].view(-1)[17] = float(value)
    largest = torch.finfo(TYPES[dtype]).max
    tensors["model.norm.weight"].fill_(largest)
    save_file(tensors, donor / "model.safetensors", {"format": "pt"})
    recipe = recipe_of([Block(str(donor), index) for index in (0, 2, 2)])
    opened = open_donors(recipe)
    with pytest.raises(FrankenmergeError) as caught:
        written(recipe, tmp_path / "out", donors=opened, check_finite=True)
    assert [fault.place for fault in caught.value.faults] == [f"{donor}: {NAME}"] and not (
        tmp_path / "out"
    ).exists()
    written(recipe, tmp_path / "out", donors=opened)
    sound = recipe_of([Block(str(donor), index) for index in (0, 1, 3)])
    written(sound, tmp_path / "sound", donors=opened, check_finite=True)


def test_whole_numbers_are_never_nan(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff" * 16)
    operation = Copy("t", "d", "t", Tensor(tmp_path / "x", "I32", (4,), 0, 16))
    assert finite_faults([operation]) == []


# What cannot be computed


def test_a_device_that_is_not_there_is_reported_before_anything_is_written(linear, pair, tmp_path):
    (tmp_path / "room").mkdir()
    with pytest.raises(FrankenmergeError) as caught:
        linear(*pair["F32"], tmp_path / "room" / "out", options={"device": "toaster"})
    assert "toaster" in caught.value.faults[0].place and not list((tmp_path / "room").iterdir())


def test_an_unknown_device_is_no_matter_where_nothing_is_computed(pair, tmp_path):
    recipe = recipe_of([Block(str(pair["F32"][0]), 0)])
    written(recipe, tmp_path / "out", device="toaster")


def test_a_donor_that_shrinks_while_it_is_computed_with_is_reported(linear, pair, tmp_path):
    donor = changed(pair["F32"][0], tmp_path / "donor")
    (tmp_path / "room").mkdir()
    with pytest.raises(FrankenmergeError) as caught:
        linear(
            donor,
            pair["F32"][1],
            tmp_path / "room" / "out",
            progress=meter(lambda _: os.truncate(donor / "model.safetensors", 9000)),
        )
    assert "ended at byte 9,000" in caught.value.faults[0].found and not list(
        (tmp_path / "room").iterdir()
    )


# Memory


PEAK = """
import sys
from pathlib import Path
from frankenmerge.merging.writer import merge
from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.resolve import resolve
recipe = recipe_of([Block(sys.argv[1], index) for index in (0, 1, 0, 1)])
result = merge(resolve(recipe, open_donors(recipe)), Path(sys.argv[2]))
heavy = sum(name in sys.modules for name in ("torch", "transformers", "numpy"))
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(result.bytes, int(peak) * 1024, heavy)
"""


def test_a_copy_holds_a_small_part_of_what_it_copies_and_needs_no_torch(donors, tmp_path):
    """Against a donor of zeros that takes no room on the disk."""
    donor = Path(
        shutil.copytree(
            donors["a"], tmp_path / "donor", ignore=shutil.ignore_patterns("*.safetensors")
        )
    )
    config = json.loads((donor / "config.json").read_text())
    shape = {
        "hidden_size": 1024,
        "intermediate_size": 6144,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "head_dim": 256,
    }
    (donor / "config.json").write_text(json.dumps(config | shape))
    weights = {"model.embed_tokens": (48, 1024), "lm_head": (48, 1024), "model.norm": (1024,)}
    for block in range(2):
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
        ):
            weights[f"model.layers.{block}.{name}"] = (1024, 1024)
        weights |= {
            f"model.layers.{block}.mlp.{name}_proj": (6144, 1024) for name in ("gate", "up")
        }
        weights[f"model.layers.{block}.mlp.down_proj"] = (1024, 6144)
        weights |= {
            f"model.layers.{block}.{name}": (1024,)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
    header, position = {}, 0
    for name, size in weights.items():
        stop = position + 4 * int(np.prod(size))
        header[f"{name}.weight"] = {"dtype": "F32", "shape": size, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    (donor / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(donor / "model.safetensors", 8 + len(text) + position)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(donor), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    written, peak, heavy = map(int, done.stdout.split())
    assert written > 350e6 and peak < 150e6 and heavy == 0
