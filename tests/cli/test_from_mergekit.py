"""Command lines written for mergekit: their options mean the same, or are answered in one line."""

import json

import pytest
from safetensors.torch import load_file

from frankenmerge.cli.from_mergekit import SAID, SAID_OF_VALUES


@pytest.fixture
def recipe(donors, tmp_path):
    path = tmp_path / "r.yaml"
    models = [{"model": str(donors[name]), "parameters": {"weight": 1}} for name in ("a", "b")]
    more = {"base_model": str(donors["b"]), "parameters": {"density": 0.5}}
    path.write_text(json.dumps({"merge_method": "dare_linear", "models": models} | more))
    return path


def merged(run, recipe, output, *options):
    code, out, err = run("merge", recipe, output, "--json", *options)
    assert code == 0, err
    files = sorted(output.glob("*.safetensors"))
    return {name: each for file in files for name, each in load_file(file).items()}, err, files


def test_a_pasted_command_line_works(recipe, run, tmp_path):
    pasted = "--copy-tokenizer --lazy-unpickle --allow-crimes --low-cpu-memory --no-cuda"
    values = ("--out-shard-size", "20K", "--lora-merge-cache", "/tmp/x", "-j", 4)
    _, err, files = merged(run, recipe, tmp_path / "out", *pasted.split(), *values)
    assert len(files) > 1  # the size of shards is meant
    said = err.replace("\n", " ")
    for name in ("--copy-tokenizer", "--lazy-unpickle", "--allow-crimes", "--lora-merge-cache"):
        assert said.count(f"{name} has no effect") == 1
    assert "--multi-gpu" not in said and "transplant-tokenizer" in said
    quiet = merged(run, recipe, tmp_path / "quiet", "--lazy-unpickle", "--quiet")
    assert "no effect" not in quiet[1]


@pytest.mark.parametrize("names", SAID)
def test_every_flag_is_taken(names, recipe, run, tmp_path):
    for name in names.split("/"):
        code, _, err = run("merge", recipe, tmp_path / "out", "--dry-run", name)
        assert code == 0 and "has no effect" in err


@pytest.mark.parametrize("name", SAID_OF_VALUES)
def test_every_option_with_a_value_is_taken(name, recipe, run, tmp_path):
    code, _, err = run("merge", recipe, tmp_path / "out", "--dry-run", name, "4")
    assert code == 0 and f"{name} has no effect" in err


def test_a_random_seed_is_meant(recipe, run, tmp_path):
    found = [
        merged(run, recipe, tmp_path / f"{number}", *options)[0]
        for number, options in enumerate(((), ("--random-seed", 0), ("--random-seed", 7)))
    ]
    name = "model.layers.0.mlp.up_proj.weight"
    assert found[0][name].equal(found[1][name]) and not found[0][name].equal(found[2][name])


def test_cuda_is_meant(recipe, run, tmp_path):
    import torch

    code, _, err = run("merge", recipe, tmp_path / "out", "--cuda")
    assert code == 0 if torch.cuda.is_available() else (code == 2 and "device cuda" in err)


def test_they_are_not_shown(run):
    assert "lazy-unpickle" not in run("merge", "--help")[1]
