"""Planned costs: operations as torch counts them, memory and tokens as the commands report them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEMO
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from frankenmerge.analysis.analyze import analyze
from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.donors.costs import checkpoint_shape
from frankenmerge.models.loading import load_model
from frankenmerge.workflows.costs import analyze_cost

EVALS = Path(__file__).parents[2] / "evals"
PLAN = {"dry_run", "command", "counts", "operations", "seconds", "rate", "read", "memory", "notes"}


def counted(function) -> int:
    # The counter knows the products that attention is made of, not all of its kernels.
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["base", "gpt2"])
def test_a_pass_costs_what_torch_counts(name):
    checkpoint = open_checkpoint(str(DEMO / "donors" / name))
    model, shape = load_model(checkpoint), checkpoint_shape(checkpoint)
    rows = torch.zeros((3, 40), dtype=torch.long)
    found = counted(lambda: model(input_ids=rows, use_cache=False))
    assert shape.forward(rows.numel(), 40) == found
    assert shape.parameters == checkpoint.parameters


def test_an_analysis_costs_what_torch_counts():
    checkpoint = open_checkpoint(str(DEMO / "donors" / "base"))
    planned = analyze_cost(checkpoint, dtype="float32").operations
    assert planned == pytest.approx(counted(lambda: analyze(checkpoint)), rel=0.02)


def planned(run, *arguments):
    code, out, err = run(*arguments, "--dry-run", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found.keys() == PLAN
    assert found["seconds"] == pytest.approx(found["operations"] / found["rate"]["operations"])
    assert found["memory"]["total"] == sum(found["memory"].values()) - found["memory"]["total"]
    return found


def recipe_blocks(donors):
    return [Block(str(donors["a"]), 0), Block(str(donors["a"]), 1), Block(str(donors["b"]), 2)]


def test_a_plan_counts_what_the_commands_do(run, donors, tmp_path):
    recipe, text = tmp_path / "r.yaml", tmp_path / "text.txt"
    recipe.write_text(recipe_of(recipe_blocks(donors)).dump())
    text.write_text("the quick brown fox jumps over the lazy dog " * 8)
    arguments = "evaluate", recipe, "--text", text
    plan = planned(run, *arguments)
    measured = json.loads(run(*arguments, "--json")[1])["models"]
    assert plan["counts"]["models"] == len(measured) == 3
    assert plan["counts"]["tokens"] == sum(model["tokens"] for model in measured)


@pytest.mark.slow
def test_a_plan_of_healing_has_the_memory_that_healing_reports(run, donors, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(recipe_of(recipe_blocks(donors)).dump())
    options = "heal", recipe, tmp_path / "out", "--steps", 2, "--scope", "norms"
    plan = planned(run, *options)
    assert not list(tmp_path.glob("out*"))
    healed = json.loads(run(*options, "--json")[1])
    assert {**healed["memory"], **plan["memory"]} == healed["memory"]
    assert plan["counts"]["steps"] == 2


def test_headers_are_enough(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EVALS))
    big_donor = pytest.importorskip("big_donor")
    llama = big_donor.Llama(64, 176, 4, 2, 6, 1024)
    donors = [tmp_path / name for name in "ab"]
    for donor in donors:
        big_donor.make_donor(donor, llama, hollow=True)
        assert all(file.stat().st_blocks < 64 for file in donor.glob("*.safetensors"))
    alone = planned(run, "analyze", donors[0], "-o", tmp_path / "x")
    both = planned(run, "align", *donors, "-o", tmp_path / "y")
    assert both["operations"] == 2 * alone["operations"]
    twice = planned(run, "align", donors[0], donors[0], "-o", tmp_path / "y")
    assert twice["operations"] == alone["operations"]
    code, out, _ = run("analyze", donors[0], "-o", tmp_path / "x", "--dry-run")
    assert code == 0 and "Gflop/s" in out and not (tmp_path / "x").exists()
    assert sys.modules.pop("big_donor")
