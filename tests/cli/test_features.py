"""`features`: the document's tables from the command line."""

import json

import pytest

from frankenmerge.analysis.complete import complete_search
from frankenmerge.checkpoint import open_checkpoint
from frankenmerge.models import load_model, untrained_model

METHODS = ("complete", "greedy", "gradient", "softmax-prior")


def rows(run, *arguments) -> dict[tuple[int, int], list[int]]:
    code, out, err = run("features", *arguments, "--json")
    assert code == 0, err
    return {(row["block"], row["neuron"]): row["tokens"] for row in json.loads(out)["features"]}


@pytest.mark.parametrize("name", ["a", "g"])
def test_complete_shows_the_best_tokens(donors, run, name):
    top = complete_search(load_model(open_checkpoint(str(donors[name]))), k=3)
    found = rows(run, donors[name], "--layers", "1,3-4", "--neurons", "0,5", "--tokens", 3)
    assert found == {(layer, neuron): top.tokens[layer, neuron].tolist() for layer in (1, 3, 4) for neuron in (0, 5)}


def test_complete_behind_bos_at_the_attention_isolated_and_bottom(donors, run):
    model = load_model(open_checkpoint(str(donors["a"])))
    top = complete_search(model, k=2, prefix=(0,), site="attention", isolated=True, bottom=True)
    found = rows(run, donors["a"], "--layers", "4", "--tokens", 2, "--bos", "--site", "attention", "--isolated", "--bottom")
    assert found == {(4, neuron): top.tokens[4, neuron].tolist() for neuron in range(4)}


def test_greedy_begins_with_the_best_token(donors, run):
    greedy = rows(run, donors["a"], "--method", "greedy", "--layers", "2", "--tokens", 3)
    complete = rows(run, donors["a"], "--layers", "2", "--tokens", 1)
    assert {key: tokens[0] for key, tokens in greedy.items()} == {key: tokens[0] for key, tokens in complete.items()}
    assert all(len(tokens) == 3 for tokens in greedy.values())


def test_the_untrained_control_searches_the_seeds_random_weights(donors, run):
    checkpoint = open_checkpoint(str(donors["a"]))
    top = complete_search(untrained_model(checkpoint, 7), k=4)
    found = rows(run, donors["a"], "--untrained", 7, "--layers", "3")
    assert found == {(3, neuron): top.tokens[3, neuron].tolist() for neuron in range(4)}
    assert found != rows(run, donors["a"], "--untrained", 8, "--layers", "3") != rows(run, donors["a"], "--layers", "3")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prints_a_table_of_80_columns(donors, run, method):
    code, out, _ = run("features", donors["a"], "--method", method, "--layers", "1", "--neurons", "0-1")
    assert code == 0 and "[:, :, 1]" in out and method in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    "options",
    [("--layers", "9"), ("--neurons", "0-99"), ("--layers", "x"), ("--neurons", "3-1"), ("--method", "guess")],
)
def test_what_the_donor_does_not_have_is_a_mistake(donors, run, options):
    code, out, err = run("features", donors["a"], *options)
    assert code == 1 and not out and err and "Traceback" not in err
