"""Donors in more shards than a process may open files."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_donor
from safetensors.torch import load_file

import frankenmerge as fm
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.reading import DonorFiles

BLOCKS, LIMIT = 32, 64


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("shards")
    return [
        write_donor(root / name, seed=seed, shard="1KB", num_hidden_layers=BLOCKS)
        for name, seed in (("a", 1), ("b", 2))
    ]


def tensors(folder: Path) -> dict:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT))


@pytest.mark.parametrize("method", ["passthrough", "linear"])
def test_400_shards_are_merged_with_64_open_files(pair, tmp_path, method):
    assert all(len(list(folder.glob("*.safetensors"))) >= 200 for folder in pair)
    a, b = pair
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n- {{model: {a}, parameters: {{weight: 1}}}}\n"
        f"- {{model: {b}, parameters: {{weight: 3}}}}\ndtype: float32\n"
        if method == "linear"
        else f"merge_method: passthrough\nslices:\n"
        f"- sources: [{{model: {a}, layer_range: [0, {BLOCKS}]}}]\n"
        f"- sources: [{{model: {b}, layer_range: [0, {BLOCKS}]}}]\n"
    )
    command = [sys.executable, "-m", "frankenmerge", "merge", recipe, output]
    found = subprocess.run(
        command, preexec_fn=few_files, env=dict(os.environ), capture_output=True, check=False
    )
    assert found.returncode == 0, found.stderr.decode()
    merged, one, other = (tensors(folder) for folder in (output, a, b))
    if method == "linear":
        for name, value in merged.items():
            expected = (one[name].double() + 3 * other[name].double()) / 4
            assert (value - expected).abs().max() < 1e-6
    else:
        for name, value in merged.items():
            parts = name.split(".")
            index = int(parts[2]) if parts[1] == "layers" else None
            if index is not None and index >= BLOCKS:
                source = other[name.replace(f".{index}.", f".{index - BLOCKS}.")]
                assert value.equal(source)


@pytest.mark.slow
def test_400_shards_are_evaluated_with_64_open_files(pair, tmp_path):
    a, b = map(str, pair)
    half = BLOCKS // 2
    recipe, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    recipe.write_text(
        f"merge_method: passthrough\nslices:\n"
        f"- sources: [{{model: {a}, layer_range: [0, {half}]}}]\n"
        f"- sources: [{{model: {b}, layer_range: [{half}, {BLOCKS}]}}]\n"
    )
    text.write_text("The sea is calm, and the ships are far away. " * 4)
    command = [sys.executable, "-m", "frankenmerge", "evaluate", a, b, recipe, "--text", text]
    found = subprocess.run(
        [*command, "--json"],
        preexec_fn=few_files,
        env=dict(os.environ),
        capture_output=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr.decode()
    limited = {each["name"]: each for each in json.loads(found.stdout)["models"]}
    for each in fm.evaluate(a, b, recipe, texts=[text]).results:
        assert limited[each.name]["bits_per_byte"] == pytest.approx(each.total.bits_per_byte)


def test_open_files_are_bounded_and_those_in_use_stay_open(pair):
    files = sorted(pair[0].glob("*.safetensors"))[:100]
    donor = DonorFiles()
    before = len(os.listdir("/proc/self/fd"))
    with donor.opened(files[0]) as first:
        for file in files[1:]:
            with donor.opened(file):
                pass
        assert len(os.listdir("/proc/self/fd")) - before <= 16
        assert os.pread(first, 8, 0) == files[0].read_bytes()[:8]
    donor.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(FrankenmergeError) as caught, DonorFiles().opened(tmp_path / "none"):
        pass
    assert caught.value.faults[0].place == str(tmp_path / "none")


def test_the_fingerprint_of_many_shards_needs_few_files(pair):
    assert open_checkpoint(str(pair[0])).fingerprint != open_checkpoint(str(pair[1])).fingerprint
