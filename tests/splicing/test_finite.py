"""NaN, Inf and other obstacles to a computed tensor; memory of a copy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import changed, meter, written
from means import NAME, TYPES, tensors_of
from safetensors.torch import load_file, save_file

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging.finite import finite_faults
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.operations import Copy
from frankenmerge.storage.safetensors_header import Tensor


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
