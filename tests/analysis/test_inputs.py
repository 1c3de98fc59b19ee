"""Inputs of several tokens in atlases, and alignments by the searches that find them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_donor

from frankenmerge.analysis.align import FUNCTIONS, INPUT_METHODS, align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.analysis.ascent import ascent_search
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.analysis.greedy import greedy_search
from frankenmerge.analysis.inputs import even_neurons, search_inputs, with_inputs
from frankenmerge.artefacts.alignment import load_alignment
from frankenmerge.artefacts.atlas import Atlas, Inputs, load_atlas, save_atlas
from frankenmerge.artefacts.scores import SCORES
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model, untrained_model

METHODS = ("greedy", "ascent", "gradient")
SEARCHES = {"greedy": (greedy_search, "n"), "ascent": (ascent_search, "n")}


def found_by(method, model, neurons, tokens) -> np.ndarray:
    """What the search itself finds, looked up feature by feature: `[l+1, m, n]`."""
    features = [Feature.of(block, neuron) for block in range(5) for neuron in neurons]
    function, length = SEARCHES.get(method, (gradient_search, "tokens"))
    search = function(model, features, **{length: tokens})
    found = dict(zip(features, search.tokens.tolist(), strict=True))
    return np.array(
        [[found[Feature.of(block, neuron)] for neuron in neurons] for block in range(5)]
    )


@pytest.fixture(scope="module")
def atlases(donors) -> dict[str, Atlas]:
    return {name: analyze(open_checkpoint(str(donors[name]))) for name in ("a", "b", "wide")}


def invented(atlas: Atlas, neurons, tokens, method="greedy") -> Atlas:
    return replace(
        atlas, inputs={method: Inputs(np.array(neurons, np.int32), np.asarray(tokens, np.int32))}
    )


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (128, range(0, 128, 8)),
        (16, range(16)),
        (5, range(5)),
        (24, [n * 3 // 2 for n in range(16)]),
    ],
)
def test_neurons_nobody_names_are_spread_evenly(width, expected):
    assert even_neurons(width) == list(expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["a", "g"])
def test_every_block_is_searched_and_what_enters_the_first(donors, name, method):
    model, done = load_model(open_checkpoint(str(donors[name]))), []
    inputs = search_inputs(model, method, [3, 0, 11], tokens=3, advance=done.append)
    assert inputs.neurons.tolist() == [3, 0, 11] and inputs.tokens.shape == (5, 3, 3)
    assert (inputs.neurons.dtype, inputs.tokens.dtype) == (np.int32, np.int32)
    np.testing.assert_array_equal(inputs.tokens, found_by(method, model, [3, 0, 11], 3))
    assert sum(done) == 15 if method == "gradient" else sum(done) > 15 * 48
    assert method != "greedy" or sum(done) % 48 == 0


@pytest.mark.parametrize("method", METHODS)
def test_neurons_that_the_donor_does_not_have_are_told_once(donors, method):
    with pytest.raises(FrankenmergeError) as caught:
        search_inputs(load_model(open_checkpoint(str(donors["a"]))), method, [1, 16])
    assert [(fault.place, fault.expected) for fault in caught.value.faults] == [
        ("[:, :, 16]: neuron", "within 0 to 15")
    ]


def test_inputs_survive_the_disk_and_atlases_without_them_are_still_read(atlases, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 48, (5, 3, 2))
    atlas = replace(
        invented(atlases["a"], [4, 1, 9], tokens), provenance={"inputs": {"greedy": {"tokens": 2}}}
    )
    save_atlas(atlas, tmp_path / "with")
    loaded = load_atlas(tmp_path / "with")
    assert list(loaded.inputs) == ["greedy"] and loaded.provenance == atlas.provenance
    for array, twin in zip(loaded.inputs["greedy"], atlas.inputs["greedy"], strict=True):
        assert array.dtype == twin.dtype
        np.testing.assert_array_equal(array, twin)
    save_atlas(atlases["a"], tmp_path / "without")
    content = (tmp_path / "without").read_bytes()
    old = b'\\"inputs\\": [], '  # as it stands in the header, inside a string
    assert content.count(old) == 1
    (tmp_path / "old").write_bytes(content.replace(old, b" " * len(old)))
    assert load_atlas(tmp_path / "old").inputs == {}


def test_inputs_are_searched_once_and_kept(donors, atlases, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(str(donors["a"]))

    def searched(**options):
        return with_inputs(
            atlases["a"], checkpoint, "greedy", [1, 2], cache=tmp_path, **{"tokens": 2} | options
        )

    first = searched()
    assert first.provenance["inputs"] == {"greedy": {"tokens": 2}}
    (kept,) = tmp_path.iterdir()
    for options in ({"tokens": 1}, {"untrained": 3}, {"dtype": "bfloat16"}):
        searched(**options)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr("frankenmerge.analysis.inputs.load_model", None)  # nothing is run again
    np.testing.assert_array_equal(searched().inputs["greedy"].tokens, first.inputs["greedy"].tokens)
    assert kept.exists()


def expected_score(a: Inputs, b: Inputs, shared):
    """Plain loops: the share of positions per pair of neurons, `[l_a, l_b, m, m]`."""
    rows = [[one.neurons.tolist().index(neuron) for neuron in shared] for one in (a, b)]
    result = np.empty((len(a.tokens), len(b.tokens), len(shared), len(shared)))
    for i, j, f, g in np.ndindex(result.shape):
        result[i, j, f, g] = np.mean(a.tokens[i, rows[0][f]] == b.tokens[j, rows[1][g]])
    return result


@pytest.mark.parametrize("method", METHODS)
def test_the_score_compares_the_neurons_that_both_have_searched(atlases, method):
    generator = np.random.default_rng(1)
    a = invented(atlases["a"], [9, 2, 4, 0], generator.integers(0, 5, (5, 4, 3)), method)
    b = invented(atlases["wide"], [4, 30, 9, 2], generator.integers(0, 5, (5, 4, 3)), method)
    alignment = align(a, b, method=method)
    score, every = (
        alignment.scores[method],
        expected_score(a.inputs[method], b.inputs[method], [2, 4, 9]),
    )
    np.testing.assert_allclose(
        score.matrix, every.diagonal(axis1=2, axis2=3).mean(axis=2), rtol=1e-6
    )
    np.testing.assert_allclose(
        score.nulls["permuted_neurons"], every[:, :, ~np.eye(3, dtype=bool)].mean(axis=2), rtol=1e-6
    )
    np.testing.assert_allclose(score.nulls["permuted_probes"], 1 / 48, rtol=1e-6)
    assert score.detail.shape == (5, 5, 16) and score.detail.dtype == np.float16
    np.testing.assert_allclose(
        score.detail[:, :, [2, 4, 9]], every.diagonal(axis1=2, axis2=3), atol=2**-11
    )
    assert np.isnan(score.detail[:, :, [n for n in range(16) if n not in (2, 4, 9)]]).all()
    assert alignment.provenance["searched"] == {"neurons": [2, 4, 9], "tokens": 3}
    assert set(alignment.scores) == {*FUNCTIONS} - {*INPUT_METHODS} | {method}
    assert method not in align(a, b).scores


def test_relabelled_tokens_meet_one_time_in_v():
    """The closed form of the null, against all relabellings of a small vocabulary."""
    from itertools import permutations

    from frankenmerge.artefacts.token_overlap import token_agreement

    generator = np.random.default_rng(2)
    a, b = generator.integers(0, 5, (2, 3, 2)), generator.integers(0, 5, (2, 3, 2))
    shares = [token_agreement(a, np.array(names)[b]).matrix for names in permutations(range(5))]
    np.testing.assert_allclose(np.mean(shares, axis=0), 1 / 5, rtol=1e-5)


@pytest.mark.parametrize(
    ("neurons", "tokens", "words"),
    [
        ([7, 8, 9], 3, "at least two neurons"),
        ([1, 2, 3], 2, "inputs of the same length"),
        ([1, 8, 9], 3, "at least two neurons"),
    ],
)
def test_inputs_that_cannot_be_compared_are_refused(atlases, neurons, tokens, words):
    a = invented(atlases["a"], [1, 2, 3], np.zeros((5, 3, 3)))
    b = invented(atlases["b"], neurons, np.zeros((5, len(neurons), tokens)))
    with pytest.raises(FrankenmergeError, match=words):
        align(a, b, method="greedy")
    with pytest.raises(FrankenmergeError, match="the inputs of a gradient search"):
        align(a, b, method="gradient")


# The command line


@pytest.mark.parametrize("method", METHODS)
def test_align_searches_both_donors_alike_and_prints_that_method(donors, run, tmp_path, method):
    path = tmp_path / "ab.alignment.safetensors"
    options = ("-o", path, "--method", method, "--neurons", "0,5,9-10", "--tokens", 2)
    code, out, err = run("align", donors["a"], donors["b"], *options)
    assert code == 0, err
    a, b = (
        Inputs(
            np.array([0, 5, 9, 10]),
            found_by(method, load_model(open_checkpoint(str(donors[n]))), [0, 5, 9, 10], 2),
        )
        for n in "ab"
    )
    every = expected_score(a, b, [0, 5, 9, 10])
    score = load_alignment(path).scores[method]
    np.testing.assert_allclose(
        score.matrix, every.diagonal(axis1=2, axis2=3).mean(axis=2), rtol=1e-6
    )
    flat = " ".join(out.split())
    assert (
        f"{SCORES[method].title} (rows A, columns B" in flat
        and f"{method}: 4 of 16 neurons, 2 tokens each." in flat
    )
    row = next(line for line in out.splitlines() if line.startswith("│ 3 "))
    assert [cell.strip() for cell in row.split("│")[2:-1]] == [
        f"{value:.2f}" for value in score.matrix[3]
    ]
    record = json.loads(run("align", donors["a"], donors["b"], *options, "--json")[1])
    assert (
        record["searched"] == {"neurons": [0, 5, 9, 10], "tokens": 2} and record["method"] == method
    )
    np.testing.assert_array_equal(np.float32(record["scores"][method]["matrix"]), score.matrix)
    assert run("plan", path, "-o", tmp_path / "recipe.yaml", "--depth", 6)[0] == 0
    evidence = (tmp_path / "recipe.evidence.json").read_text()
    assert (
        "NaN" not in evidence and method in json.loads(evidence)["plans"][0]["seams"][0]["scores"]
    )


def test_donors_of_different_widths_are_searched_at_the_same_neurons(donors, run, tmp_path):
    code, out, _ = run(
        "align",
        donors["a"],
        donors["wide"],
        "-o",
        tmp_path / "x",
        "--method",
        "greedy",
        "--tokens",
        1,
    )
    flat = " ".join(out.split())
    assert (
        code == 0
        and "16 of 16 neurons" in flat
        and "Widths 16 and 32: the first 16 neurons are compared." in flat
    )
    score = load_alignment(tmp_path / "x").scores
    np.testing.assert_array_equal(
        score["greedy"].matrix, score["argmax"].matrix
    )  # one token, greedily, is complete search


def test_analyze_keeps_inputs_that_align_takes_up(donors, run, tmp_path):
    paths = [tmp_path / f"{name}.atlas.safetensors" for name in "ab"]
    for name, path in zip("ab", paths, strict=True):
        code, out, err = run(
            "analyze",
            donors[name],
            "-o",
            path,
            "--method",
            "greedy",
            "--neurons",
            "2,7",
            "--tokens",
            2,
        )
        assert code == 0 and "greedy: inputs of 2 tokens for 2 of 16 neurons" in " ".join(
            out.split()
        ), err
    model = load_model(open_checkpoint(str(donors["a"])))
    np.testing.assert_array_equal(
        load_atlas(paths[0]).inputs["greedy"].tokens, found_by("greedy", model, [2, 7], 2)
    )
    both, mixed = tmp_path / "both", tmp_path / "mixed"
    assert run("align", *paths, "-o", both, "--method", "greedy")[0] == 0
    assert run("align", paths[0], donors["b"], "-o", mixed, "--method", "greedy")[0] == 0
    one, other = (load_alignment(path).scores["greedy"] for path in (both, mixed))
    np.testing.assert_array_equal(one.detail, other.detail)
    code, _, err = run(
        "align", paths[0], donors["b"], "-o", mixed, "--method", "greedy", "--tokens", 3
    )
    assert code == 2 and "2 neurons, 2 tokens" in err
    code, _, err = run("align", paths[0], donors["b"], "-o", mixed, "--method", "gradient")
    assert code == 2 and "the inputs of a gradient search" in err and "greedy" in err


@pytest.mark.parametrize(
    "options", [("--neurons", "1"), ("--tokens", 2), ("--bos", "--method", "greedy")]
)
def test_align_refuses_options_that_mean_nothing_to_its_method(donors, run, tmp_path, options):
    code, _, err = run("align", donors["a"], donors["b"], "-o", tmp_path / "x", *options)
    assert code == 2 and options[0] in err and not (tmp_path / "x").exists()


def test_donors_that_cannot_be_compared_are_refused_before_a_search(
    donors, run, tmp_path, monkeypatch
):
    monkeypatch.setattr("frankenmerge.analysis.inputs.search_inputs", None)
    other = write_donor(tmp_path / "other", vocab_size=50)
    code, _, err = run("align", donors["a"], other, "-o", tmp_path / "x", "--method", "greedy")
    assert code == 2 and "48 and 50 tokens" in err


def test_the_untrained_control_is_an_atlas_of_the_seeds_weights_under_its_own_name(
    donors, run, tmp_path
):
    paths = {seed: tmp_path / f"{seed}.atlas.safetensors" for seed in (None, 3, 4)}
    for seed, path in paths.items():
        options = () if seed is None else ("--untrained", seed)
        assert (
            run(
                "analyze",
                donors["a"],
                "-o",
                path,
                "--method",
                "gradient",
                "--neurons",
                "0-3",
                "--tokens",
                2,
                *options,
            )[0]
            == 0
        )
    found = {seed: load_atlas(path) for seed, path in paths.items()}
    checkpoint = open_checkpoint(str(donors["a"]))
    for seed in (3, 4):
        atlas, model = found[seed], untrained_model(checkpoint, seed)
        assert (
            atlas.donor == f"{donors['a']}, random weights (seed {seed})"
            and atlas.provenance["untrained"] == seed
        )
        assert (
            atlas.top["plain"].values[0, :, 0].tolist()
            == model.get_input_embeddings().weight.max(dim=0).values.tolist()
        )
        np.testing.assert_array_equal(
            atlas.inputs["gradient"].tokens, found_by("gradient", model, range(4), 2)
        )
    assert found[None].donor == str(donors["a"]) and found[None].provenance["untrained"] is None
    assert run("align", paths[None], paths[3], "-o", tmp_path / "x", "--method", "gradient")[0] == 0
