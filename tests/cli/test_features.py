"""`features`: the source document's tables from the command line."""

import json

import numpy as np
import pytest
import torch
from conftest import changed, write_donor

from frankenmerge.analysis.complete import complete_search
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.analysis.greedy import greedy_search
from frankenmerge.analysis.prior import prior_search
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.loading import Placement, load_model, untrained_model

METHODS = ("complete", "greedy", "ascent", "gradient", "softmax-prior")
LETTERS = "\0abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def loaded(path):
    return load_model(open_checkpoint(str(path)))


def record_of(run, *arguments) -> dict:
    code, out, err = run("features", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def by_feature(run, *arguments) -> dict[tuple[int, str], list[int]]:
    return {
        (row["block"], row["feature"]): row["tokens"]
        for row in record_of(run, *arguments)["features"]
    }


def refused(run, *arguments) -> str:
    code, out, err = run("features", *arguments)
    assert code == 2 and not out and "Traceback" not in err
    return err


def rows(run, *arguments) -> dict[tuple[int, int], list[int]]:
    code, out, err = run("features", *arguments, "--json")
    assert code == 0, err
    return {(row["block"], row["neuron"]): row["tokens"] for row in json.loads(out)["features"]}


@pytest.mark.parametrize("name", ["a", "g"])
def test_complete_shows_the_best_tokens(donors, run, name):
    top = complete_search(load_model(open_checkpoint(str(donors[name]))), k=3)
    found = rows(run, donors[name], "--layers", "1,3-4", "--neurons", "0,5", "--tokens", 3)
    assert found == {
        (layer, neuron): top.tokens[layer, neuron].tolist()
        for layer in (1, 3, 4)
        for neuron in (0, 5)
    }


def test_complete_after_bos_at_the_attention_isolated_and_bottom(donors, run):
    model = load_model(open_checkpoint(str(donors["a"])))
    top = complete_search(model, k=2, prefix=(0,), site="attention", isolated=True, bottom=True)
    found = rows(
        run,
        donors["a"],
        "--layers",
        "4",
        "--tokens",
        2,
        "--bos",
        "--site",
        "attention",
        "--isolated",
        "--bottom",
    )
    assert found == {(4, neuron): top.tokens[4, neuron].tolist() for neuron in range(4)}


def test_greedy_begins_with_the_best_token(donors, run):
    greedy = rows(run, donors["a"], "--method", "greedy", "--layers", "2", "--tokens", 3)
    complete = rows(run, donors["a"], "--layers", "2", "--tokens", 1)
    assert {key: tokens[0] for key, tokens in greedy.items()} == {
        key: tokens[0] for key, tokens in complete.items()
    }
    assert all(len(tokens) == 3 for tokens in greedy.values())


def test_the_untrained_control_searches_the_seeds_random_weights(donors, run):
    checkpoint = open_checkpoint(str(donors["a"]))
    top = complete_search(untrained_model(checkpoint, 7), k=4)
    found = rows(run, donors["a"], "--untrained", 7, "--layers", "3")
    assert found == {(3, neuron): top.tokens[3, neuron].tolist() for neuron in range(4)}
    assert (
        found
        != rows(run, donors["a"], "--untrained", 8, "--layers", "3")
        != rows(run, donors["a"], "--layers", "3")
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prints_a_table_of_80_columns(donors, run, method):
    code, out, _ = run(
        "features", donors["a"], "--method", method, "--layers", "1", "--neurons", "0-1"
    )
    assert code == 0 and "[:, :, 1]" in out and method in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    "options",
    [
        ("--layers", "9"),
        ("--neurons", "0-99"),
        ("--layers", "x"),
        ("--neurons", "3-1"),
        ("--method", "guess"),
    ],
)
def test_what_the_donor_does_not_have_is_a_mistake(donors, run, options):
    code, out, err = run("features", donors["a"], *options)
    assert code == 2 and not out and err and "Traceback" not in err


# The source document's notation


@pytest.mark.parametrize("method", METHODS)
def test_the_notation_and_its_short_form_find_the_same(donors, run, method):
    short = record_of(
        run, donors["a"], "--method", method, "--layers", "1,3", "--neurons", "2-4", "--tokens", 2
    )
    long = record_of(
        run,
        donors["a"],
        "--method",
        method,
        "--layers",
        "1,3",
        "--features",
        "[:, :, 2-4]",
        "--tokens",
        2,
    )
    assert short == long
    assert [(row["block"], row["neuron"]) for row in long["features"]] == [
        (block, neuron) for block in (1, 3) for neuron in (2, 3, 4)
    ]


def test_ranges_of_positions_and_neurons_reach_the_gradient_and_prior_searches(donors, run):
    model = loaded(donors["a"])
    for method, search in (("gradient", gradient_search), ("softmax-prior", prior_search)):
        features = [
            Feature(block, range(3, 7), range(t, t + 1)) for block in (1, 4) for t in (0, 1)
        ]
        expected = search(model, features, tokens=3).tokens.tolist()
        found = by_feature(
            run,
            donors["a"],
            "--method",
            method,
            "--layers",
            "1,4",
            "--features",
            "[:, 0-1, 3:7]",
            "--tokens",
            3,
        )
        assert found == {
            (f.block, f"[:, {f.positions.start}, 3:7]"): row
            for f, row in zip(features, expected, strict=True)
        }
    rows = record_of(
        run,
        donors["a"],
        "--method",
        "gradient",
        "--layers",
        "1",
        "--features",
        "[:, :, 0:2]",
        "--steps",
        1,
    )["features"]
    assert [row["neuron"] for row in rows] == [None]


def test_other_options_reach_the_gradient_and_prior_searches(donors, run):
    model, features = loaded(donors["a"]), [Feature.of(2, neuron) for neuron in range(4)]
    gradient = gradient_search(
        model, features, tokens=2, steps=7, target=30.0, optimizer="adam"
    ).tokens.tolist()
    options = ("--layers", 2, "--tokens", 2, "--steps", 7, "--target", 30)
    found = rows(run, donors["a"], "--method", "gradient", *options, "--optimizer", "adam")
    assert (
        list(found.values())
        == gradient
        != gradient_search(model, features, tokens=2).tokens.tolist()
    )
    prior = prior_search(model, features, tokens=2, steps=7, target=30.0).tokens.tolist()
    assert list(rows(run, donors["a"], "--method", "softmax-prior", *options).values()) == prior


def test_beam_and_positions_reach_the_greedy_search(donors, run):
    model, features = loaded(donors["g"]), [Feature.of(4, neuron) for neuron in range(16)]
    expected = greedy_search(model, features, n=3, beam=4, positions="all").tokens.tolist()
    options = ("--method", "greedy", "--layers", 4, "--neurons", "0-15", "--tokens", 3)
    assert (
        list(rows(run, donors["g"], *options, "--beam", 4, "--positions", "all").values())
        == expected
    )
    assert list(rows(run, donors["g"], *options).values()) != expected


@pytest.mark.parametrize("method", ["complete", "greedy", "ascent"])
@pytest.mark.parametrize(
    ("notation", "found"), [("[:, :, 0:2]", "several neurons"), ("[:, 1, 3]", "chosen positions")]
)
def test_what_a_search_of_single_neurons_cannot_mean_is_refused_with_the_reason(
    donors, run, method, notation, found
):
    err = refused(run, donors["a"], "--method", method, "--layers", "1", "--features", notation)
    assert found in err and "use gradient or softmax-prior" in err and notation in err


def test_positions_beyond_the_input_are_a_mistake(donors, run):
    assert "within 0 to 2" in refused(
        run, donors["a"], "--method", "gradient", "--features", "[:, 3, 0]", "--tokens", 3
    )


@pytest.mark.parametrize(
    ("method", "options", "place"),
    [
        ("complete", ("--beam", 2), "--beam"),
        ("complete", ("--steps", 2), "--steps"),
        ("complete", ("--positions", "last"), "--positions"),
        ("greedy", ("--decode", "hidden"), "--decode"),
        ("greedy", ("--mask-special",), "--mask-special"),
        ("greedy", ("--fluent",), "--fluent"),
        ("greedy", ("--starts", "2"), "--starts"),
        ("ascent", ("--steps", "2"), "--steps"),
        ("inversion", ("--input", "a", "--separator", "b"), "--separator"),
        ("gradient", ("--bos",), "--bos"),
        ("softmax-prior", ("--optimizer", "adam"), "--optimizer"),
        ("gradient", ("--input", "abc"), "--input"),
        ("inversion", ("--neurons", "0", "--input", "abc"), "--neurons"),
        ("inversion", ("--features", "[:, :, 0]", "--input", "abc"), "--features"),
        ("inversion", (), "--input"),
    ],
)
def test_an_option_that_means_nothing_to_the_method_is_refused(donors, run, method, options, place):
    err = refused(run, donors["a"], "--method", method, *options)
    assert err.startswith(f"frankenmerge: {place}\n") and "remedy:" in err


def test_both_forms_at_once_are_refused(donors, run):
    assert "both" in refused(run, donors["a"], "--neurons", "0", "--features", "[:, :, 0]")


# What is printed with the tokens


def test_the_hidden_decode_is_flagged_as_an_artefact(donors, run):
    options = (donors["a"], "--method", "gradient", "--layers", "1", "--neurons", "0-15")
    hidden, real = record_of(run, *options, "--decode", "hidden"), record_of(run, *options)
    same = [token == row["neuron"] for row in hidden["features"] for token in row["tokens"]]
    assert hidden["artefact"] is True and "artefact" not in real
    assert hidden["token_id_equals_neuron"] == sum(same) / len(same) > 0.5  # 1 / 16 by chance
    warning = "Warning: these are neuron indices"
    assert warning in run("features", *options[:5], "--decode", "hidden")[1]
    assert warning not in run("features", *options[:5])[1]


def test_masked_tokens_are_not_shown_and_the_others_keep_their_order(tmp_path, run):
    """Special is id 0; ids 48 and 49 are beyond the tokenizer; 5, 9 and 30 share an embedding."""

    def doubled(tensors):
        embedding = tensors["model.embed_tokens.weight"].copy()
        embedding[[9, 30]] = embedding[5]
        return tensors | {"model.embed_tokens.weight": embedding}

    donor = changed(
        write_donor(tmp_path / "plain", seed=31, vocab_size=50), tmp_path / "donor", doubled
    )
    masked = [0, 5, 9, 30, 48, 49]
    found = record_of(run, donor, "--mask-special", "--layers", "2", "--tokens", 44)
    assert found["masked_tokens"] == masked
    every = rows(run, donor, "--layers", "2", "--tokens", 50)
    for row in found["features"]:
        assert row["tokens"] == [token for token in every[2, row["neuron"]] if token not in masked]
    assert "masked_tokens" not in record_of(run, donor, "--layers", "2")


def pairs(tokens, i, j):
    """The share of positions with the same token, for all pairs of features of two blocks."""
    return np.array(
        [
            [np.mean([x == y for x, y in zip(one, other, strict=True)]) for other in tokens[j]]
            for one in tokens[i]
        ]
    )


@pytest.mark.parametrize("untrained", [(), ("--untrained", "3")])
@pytest.mark.parametrize("method", METHODS)
def test_agreement_between_blocks_is_reported_with_permuted_features(
    donors, run, method, untrained
):
    found = record_of(
        run,
        donors["a"],
        "--method",
        method,
        "--layers",
        "1,2,4",
        "--neurons",
        "0-7",
        "--tokens",
        3,
        *untrained,
    )
    shown = [
        [row["tokens"] for row in found["features"] if row["block"] == block] for block in (1, 2, 4)
    ]
    tokens = [[own[:1] if method == "complete" else own for own in block] for block in shown]
    agreement = found["agreement"]
    assert agreement["blocks"] == [1, 2, 4]
    for i, j in np.ndindex(3, 3):
        every, others = pairs(tokens, i, j), ~np.eye(8, dtype=bool)
        assert agreement["same_tokens"][i][j] == pytest.approx(every.diagonal().mean())
        assert agreement["permuted"][i][j] == pytest.approx(every[others].mean(), abs=1e-7)


def test_the_printed_agreement_is_above_the_diagonal_and_chance_below(donors, run):
    options = (donors["a"], "--layers", "1,2", "--neurons", "0-15")
    agreement = record_of(run, *options)["agreement"]
    _, out, _ = run("features", *options)
    table = out[out.index("Same tokens in two blocks") :].splitlines()
    first, second = (
        [cell.strip() for cell in line.split("│")[1:-1]] for line in table if line.startswith("│")
    )
    assert first == ["1", "", f"{agreement['same_tokens'][0][1]:.2f}"]
    assert second == ["2", f"{agreement['permuted'][1][0]:.2f}", ""]


def test_a_single_feature_has_no_null_and_a_single_block_no_agreement(donors, run):
    assert record_of(run, donors["a"], "--layers", "1,2", "--neurons", "5")["agreement"][
        "permuted"
    ] == [
        [None, None],
        [None, None],
    ]
    assert "Same tokens" not in run("features", donors["a"], "--layers", "1")[1]


# Random weights


def test_random_weights_on_a_device_that_is_not_there_are_a_mistake(donors, run):
    assert "--device" in refused(run, donors["a"], "--untrained", 1, "--device", "cuda:99")


def test_random_weights_in_half_precision_are_those_of_the_seed_rounded(donors, run):
    checkpoint = open_checkpoint(str(donors["a"]))
    whole, half = (
        untrained_model(checkpoint, 5),
        load_model(checkpoint, Placement("bfloat16", "auto"), untrained=5),
    )
    for parameter, rounded in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(parameter.bfloat16(), rounded)
    top = complete_search(half, k=4)
    found = rows(run, donors["a"], "--untrained", 5, "--dtype", "bfloat16", "--layers", "1")
    assert found == {(1, neuron): top.tokens[1, neuron].tolist() for neuron in range(4)}
