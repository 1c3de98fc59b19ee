"""Preserved features, compared with a search token by token."""

import json

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, in_memory, resolved, write_donor

from frankenmerge.analysis.analyze import analyze
from frankenmerge.analysis.complete import complete_search
from frankenmerge.artefacts.atlas import TopTokens
from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.retention import retained
from frankenmerge.models.hooks import block_outputs
from frankenmerge.models.loading import load_model


@torch.no_grad()
def favourites(model) -> np.ndarray:
    """The top-activating token of each neuron after every block, `[l+1, d]`, token by token."""
    values = []
    with block_outputs(model) as states:
        for token in range(VOCABULARY):
            model(input_ids=torch.tensor([[token]]))
            values.append(torch.stack([state[0, -1] for state in states]))
    return torch.stack(values).argmax(dim=0).numpy()


@pytest.mark.parametrize("pair", [("a", "b"), ("g", "h")])
def test_kept_is_the_share_of_neurons_with_the_donor_s_token(donors, pair):
    a, b = (str(donors[name]) for name in pair)
    recipe = recipe_of([Block(a, 0), Block(a, 1), Block(b, 1), Block(b, 2), Block(a, 3)])
    opened = resolved(recipe).donors
    models = {name: load_model(donor) for name, donor in opened.items()}
    merged = in_memory(recipe, opened)
    tops = {name: analyze(donor).top["plain"] for name, donor in opened.items()}
    found = {
        entry.donor: entry for entry in retained(complete_search(merged, k=1), tops, recipe.blocks)
    }
    here, own = favourites(merged), {name: favourites(model) for name, model in models.items()}
    assert [(block.block, block.donor_block) for block in found[a].blocks] == [
        (1, 0),
        (2, 1),
        (5, 3),
    ]
    assert [(block.block, block.donor_block) for block in found[b].blocks] == [(3, 1), (4, 2)]
    for name, entry in found.items():
        for block in entry.blocks:
            assert block.kept == pytest.approx(
                (here[block.block] == own[name][block.donor_block + 1]).mean()
            )
        assert entry.kept == pytest.approx(np.mean([block.kept for block in entry.blocks]))
    assert [block.kept for block in found[a].blocks[:2]] == [1, 1]  # no other donor came before


def test_chance_is_what_exchanged_neurons_share():
    tokens = np.random.default_rng(0).integers(0, 5, size=(3, 40, 1))
    top = TopTokens(tokens.astype(np.int32), np.zeros(tokens.shape, np.float32))
    (entry,) = retained(top, {"a": top}, [Block("a", 0), Block("a", 1)])
    pairs = [
        [(t[i] == t[j]).item() for i in range(40) for j in range(40) if i != j] for t in tokens[1:]
    ]
    assert entry.kept == 1 and entry.chance == pytest.approx(np.mean(pairs))


def test_the_command_reports_it_for_recipes_and_checkpoints(donors, text, run, tmp_path):
    a, b = str(donors["a"]), str(donors["b"])
    recipe = recipe_of([Block(a, 0), Block(a, 1), Block(b, 2)])
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert run("merge", tmp_path / "recipe.yaml", tmp_path / "merged")[0] == 0
    code, out, _ = run(
        "evaluate",
        tmp_path / "recipe.yaml",
        tmp_path / "merged",
        "--text",
        text,
        "--retention",
        "--json",
    )
    rows = json.loads(out)["retention"]
    assert code == 0 and [(entry["model"], entry["donor"]) for entry in rows] == [
        (str(tmp_path / name), donor) for name in ("recipe.yaml", "merged") for donor in (a, b)
    ]
    assert rows[0]["blocks"] == [
        {"block": 1, "donor_block": 0, "kept": 1},
        {"block": 2, "donor_block": 1, "kept": 1},
    ]
    assert [entry | {"model": ""} for entry in rows[:2]] == [
        entry | {"model": ""} for entry in rows[2:]
    ]


def test_donors_of_other_tokens_are_refused(donors, text, run, tmp_path):
    other = write_donor(tmp_path / "other", seed=9)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"a": 2, "b": 1}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "recipe.yaml").write_text(
        recipe_of([Block(str(donors["a"]), 0), Block(str(other), 1)]).dump()
    )
    for option in ("--retention", "--seams"):
        code, _, err = run("evaluate", tmp_path / "recipe.yaml", "--text", text, option)
        assert code == 2 and "other tokens" in err and str(other) in err
    assert (
        open_checkpoint(str(other)).tokenizer_hash
        != open_checkpoint(str(donors["a"])).tokenizer_hash
    )
