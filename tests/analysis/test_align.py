"""Scores of an alignment and their nulls, compared with plain Python, numpy and closed forms."""

from dataclasses import replace
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import changed, write_donor, write_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from frankenmerge.analysis.align import FUNCTIONS, INPUT_METHODS, align, jaccard
from frankenmerge.analysis.analyze import analyze
from frankenmerge.analysis.geometry import BLIND
from frankenmerge.artefacts.atlas import Atlas
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.loading import load_model


def atlas_of(path) -> Atlas:
    return analyze(open_checkpoint(str(path)))


@pytest.fixture(scope="module")
def atlases(donors) -> dict[str, Atlas]:
    return {name: atlas_of(donors[name]) for name in ("a", "b", "deep", "wide")}


PAIRS = [("a", "b"), ("a", "deep"), ("deep", "b"), ("a", "wide")]


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request, atlases):
    return atlases[request.param[0]], atlases[request.param[1]]


def overlap(one, other) -> float:
    one, other = set(one), set(other)
    return len(one & other) / len(one | other)


def test_jaccard_is_python_s_set_arithmetic():
    generator = np.random.default_rng(0)
    a, b = (
        np.array([[generator.permutation(20)[:6] for _ in range(5)] for _ in range(blocks)])
        for blocks in (3, 4)
    )
    found = jaccard(a, b)
    assert found.shape == (3, 4, 5)
    for i, j, f in np.ndindex(found.shape):
        assert found[i, j, f] == np.float32(overlap(a[i, f], b[j, f]))


@pytest.mark.parametrize("context", ["plain", "bos"])
def test_jaccard_of_every_neuron_is_the_overlap_of_its_ten_tokens(pair, context):
    a, b = (atlas.top[context].tokens for atlas in pair)
    score = align(*pair, context=context).scores["jaccard"]
    expected = np.array(
        [[[overlap(x, y) for x, y in zip(row, column, strict=False)] for column in b] for row in a]
    )
    assert score.detail.shape == expected.shape == (len(a), len(b), 16)
    np.testing.assert_allclose(score.detail, expected, atol=2**-11)
    np.testing.assert_allclose(score.matrix, expected.mean(axis=2), rtol=1e-6)


@pytest.mark.parametrize("context", ["plain", "bos"])
def test_argmax_is_the_share_of_neurons_with_the_same_best_token(pair, context):
    a, b = (atlas.top[context].tokens for atlas in pair)
    score = align(*pair, context=context).scores["argmax"]
    for i, j in np.ndindex(score.matrix.shape):
        same = [int(a[i, f, 0] == b[j, f, 0]) for f in range(16)]
        assert score.detail[i, j].tolist() == same
        assert score.matrix[i, j] == np.float32(sum(same) / 16)


def correlations(a: Atlas, b: Atlas, i: int, j: int) -> np.ndarray:
    """Of every shared neuron of A with every one of B, `[d, d]`."""
    x, y = (
        atlas.activations(block)[:, :16].astype(np.float64).T for atlas, block in ((a, i), (b, j))
    )
    return np.corrcoef(x, y)[:16, 16:]


def test_correlation_is_numpy_s(pair):
    score = align(*pair).scores["correlation"]
    for i, j in np.ndindex(score.matrix.shape):
        expected = correlations(*pair, i, j).diagonal()
        np.testing.assert_allclose(score.detail[i, j], expected, atol=1e-3)  # float16
        np.testing.assert_allclose(score.matrix[i, j], expected.mean(), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("still", [("a",), ("b",), ("a", "b")])
def test_a_neuron_that_never_changes_correlates_with_none(atlases, still, value):
    pair = []
    for name in ("a", "b"):
        probes = atlases[name].probes.copy()
        if name in still:
            probes[:, :, 3] = value
        pair.append(replace(atlases[name], probes=probes))
    score = align(*pair).scores["correlation"]
    np.testing.assert_allclose(score.detail[:, :, 3], 0, atol=1e-6)
    assert np.isfinite(score.matrix).all() and np.isfinite(score.nulls["residual_law"]).all()


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"distance", *INPUT_METHODS}))
@pytest.mark.parametrize("donor", ["a", "b", "deep"])
def test_a_donor_agrees_wholly_with_itself(atlases, donor, name):
    score = align(atlases[donor], atlases[donor]).scores[name]
    np.testing.assert_allclose(score.matrix.diagonal(), 1, atol=1e-5)
    np.testing.assert_allclose(score.detail.diagonal(), 1, atol=1e-3)


@pytest.mark.parametrize("context", ["plain", "bos"])
def test_transposing_is_aligning_the_other_way_round(pair, context):
    rotated, other = align(*pair, context=context).transposed, align(*pair[::-1], context=context)
    for field in ("donors", "fingerprints", "widths", "vocabulary", "blocks"):
        assert getattr(rotated, field) == getattr(other, field)
    for name, score in other.scores.items():
        twin = rotated.scores[name]
        np.testing.assert_allclose(twin.matrix, score.matrix, atol=1e-6)
        np.testing.assert_allclose(twin.detail, score.detail, atol=1e-3)
        for null in score.nulls:  # permutations are drawn anew; 1024 samples of a score in [-1, 1]
            np.testing.assert_allclose(
                twin.nulls[null], score.nulls[null], atol=1e-6 if null == "residual_law" else 0.05
            )
    for tokens, twin in zip(rotated.tokens, other.tokens, strict=True):
        np.testing.assert_array_equal(tokens, twin)


def test_aligning_twice_gives_the_same(atlases):
    one, other = (align(atlases["a"], atlases["b"]) for _ in range(2))
    for name, score in one.scores.items():
        np.testing.assert_array_equal(score.matrix, other.scores[name].matrix)
        assert all(
            (matrix == other.scores[name].nulls[null]).all() for null, matrix in score.nulls.items()
        )


def test_every_score_stands_beside_its_nulls_and_an_interval(pair):
    alignment = align(*pair)
    assert set(alignment.scores) == set(FUNCTIONS) - set(INPUT_METHODS)
    for name, score in alignment.scores.items():
        assert {"permuted_neurons"} <= set(score.nulls) or name in BLIND
        assert {"permuted_probes"} <= set(score.nulls) or name in {
            "influence",
            "distance",
            "relative_depth",
        }
        assert all(
            matrix.shape == score.matrix.shape and matrix.dtype == np.float32
            for matrix in score.nulls.values()
        )
        low, high = score.interval
        assert (low <= score.matrix + 2e-3).all() and (score.matrix <= high + 2e-3).all()


def test_the_interval_of_a_mean_over_neurons_is_about_two_standard_errors(pair):
    score = align(*pair).scores["correlation"]
    error = score.detail.astype(float).std(axis=2) / np.sqrt(score.detail.shape[2])
    width = score.interval[1] - score.interval[0]
    np.testing.assert_allclose(width.mean(), 2 * 1.96 * error.mean(), rtol=0.15)


def test_every_probe_counts_alike_in_the_inner_products(pair):
    found = align(*pair).gram
    states = [
        atlas.activations(block)[:, :16].astype(np.float64)
        for atlas in pair
        for block in range(atlas.blocks + 1)
    ]
    size = np.mean([np.linalg.norm(state, axis=1) for state in states], axis=0)
    expected = [[((x * y).sum(axis=1) / size**2).mean() for y in states] for x in states]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    rotated, other = align(*pair).transposed.gram, align(*pair[::-1]).gram
    np.testing.assert_allclose(rotated, other, rtol=1e-6)


def test_debiased_cka_is_the_ratio_of_unbiased_hsic(pair):
    """Song et al. (2012), equation 5, term by term."""

    def hsic(k, m):
        n = len(k)
        k, m = k - np.diag(k.diagonal()), m - np.diag(m.diagonal())
        cross = (
            np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
        )
        return cross / (n * (n - 3))

    score = align(*pair).scores["cka"]
    for i, j in ((0, 1), (2, 2), (4, 3)):
        x, y = (
            atlas.activations(block)[::2, :16].astype(np.float64)
            for atlas, block in zip(pair, (i, j), strict=True)
        )
        k, m = x @ x.T, y @ y.T
        assert score.matrix[i, j] == pytest.approx(
            hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)), abs=1e-4
        )


def test_influence_is_that_of_the_blocks_between(atlases):
    states = [atlases["a"].activations(block).astype(np.float64) for block in range(5)]
    cosine = [
        (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        for x, y in zip(states, states[1:], strict=False)
    ]
    found = align(atlases["a"], atlases["a"]).scores["influence"].matrix
    assert found[1, 3] == pytest.approx(
        1 - (1 - cosine[1]).mean() - (1 - cosine[2]).mean(), abs=1e-5
    )


def test_permuted_probes_do_not_correlate(pair):
    # 1024 samples or more, each of standard deviation 1 / sqrt(1024 probes)
    assert np.abs(align(*pair).scores["correlation"].nulls["permuted_probes"]).max() < 6 / 1024


def test_tokens_under_permuted_names_overlap_as_the_hypergeometric_law_says(pair):
    scores = align(*pair).scores
    law = [comb(10, c) * comb(38, 10 - c) / comb(48, 10) for c in range(11)]
    expected = sum(p * c / (20 - c) for c, p in enumerate(law))
    # 64 draws, whose 16 neurons may go together: at worst a standard error of 0.06 / 8
    np.testing.assert_allclose(scores["jaccard"].nulls["permuted_probes"], expected, atol=0.03)
    np.testing.assert_allclose(scores["argmax"].nulls["permuted_probes"], 1 / 48, rtol=1e-6)


@pytest.mark.parametrize("names", [("a", "a"), ("a", "b")])
def test_permuted_neurons_are_the_mean_over_all_other_neurons(atlases, names):
    """Each neuron of A meets every other neuron of B equally often, so the mean is exact."""
    a, b = (atlases[name] for name in names)
    scores = align(a, b).scores
    others = ~np.eye(16, dtype=bool)
    for i, j in np.ndindex(scores["jaccard"].matrix.shape):
        tops = [atlas.top["plain"].tokens[block] for atlas, block in ((a, i), (b, j))]
        expected = {
            "jaccard": np.array([[overlap(x, y) for y in tops[1]] for x in tops[0]])[others].mean(),
            "argmax": (tops[0][:, :1] == tops[1][:, 0])[others].mean(),
            "correlation": correlations(a, b, i, j)[others].mean(),
        }
        for (
            name,
            value,
        ) in (
            expected.items()
        ):  # argmax in closed form; of the others, 64 permutations of 16 neurons
            assert scores[name].nulls["permuted_neurons"][i, j] == pytest.approx(
                value, abs=1e-6 if name == "argmax" else 0.02
            )


@pytest.mark.parametrize("name, most", [("argmax", 0.1), ("jaccard", 0.2), ("correlation", 0.1)])
def test_a_donor_s_own_agreement_is_far_above_permuted_neurons(atlases, name, most):
    score = align(atlases["a"], atlases["a"]).scores[name]
    assert score.nulls["permuted_neurons"].diagonal().max() < most


def test_the_residual_law_is_the_root_of_the_smaller_variance_over_the_larger(pair):
    law = align(*pair).scores["correlation"].nulls["residual_law"]
    for i, j in np.ndindex(law.shape):
        x, y = (
            atlas.activations(block)[:, :16].astype(np.float64).var(axis=0)
            for atlas, block in zip(pair, (i, j), strict=True)
        )
        assert law[i, j] == pytest.approx(
            np.sqrt(np.minimum(x, y) / np.maximum(x, y)).mean(), abs=1e-5
        )


def test_an_untrained_model_s_correlations_follow_the_residual_law(tmp_path):
    """What looks like agreement between the blocks of a random model is the residual stream.

    The law holds for writes that do not correlate with the stream; those of a random model of width
    d do by about 1 / sqrt(d). At d = 256 the largest deviation was 0.011 to 0.019 over four seeds,
    while the law runs from 0.34 to 1.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=256,
        n_layer=4,
        n_head=4,
        vocab_size=512,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    atlas = atlas_of(tmp_path)
    score = align(atlas, atlas).scores["correlation"]
    assert 0.3 < score.matrix.min() < 0.4
    np.testing.assert_allclose(score.matrix, score.nulls["residual_law"], atol=0.03)
    assert np.abs(score.nulls["permuted_neurons"]).max() < 0.01


def permuted(path: Path, folder: Path, order: np.ndarray) -> Path:
    """The same function of tokens, its residual neurons in another order."""

    def reordered(tensors):
        gpt2 = "transformer.wte.weight" in tensors
        return {
            name: np.take(value, order, axis)
            if (axis := residual_axis(name, value, gpt2)) is not None
            else value
            for name, value in tensors.items()
        }

    return changed(path, folder, reordered)


def residual_axis(name: str, value: np.ndarray, gpt2: bool) -> int | None:
    """The axis of the residual neurons: Llama's maps are [out, in], GPT-2's [in, out]."""
    if value.ndim == 1:
        return None if "c_attn" in name or "c_fc" in name else 0
    if any(part in name for part in ("embed", "lm_head", "wte", "wpe")):
        return 1
    writes = any(part in name for part in ("o_proj", "down_proj", "c_proj"))
    return 1 if writes == gpt2 else 0


@pytest.mark.parametrize("family, size", [("llama", {"hidden_size": 64}), ("gpt2", {"n_embd": 64})])
def test_another_order_of_the_residual_neurons_drives_every_score_to_chance(tmp_path, family, size):
    path = write_donor(tmp_path / "straight", family, seed=8, **size)
    order = np.random.default_rng(0).permutation(64)
    other = permuted(path, tmp_path / "permuted", order)
    ids = torch.arange(48)[None]
    with torch.no_grad():
        logits = [
            load_model(open_checkpoint(str(folder)))(input_ids=ids).logits
            for folder in (path, other)
        ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    straight, rotated = atlas_of(path), atlas_of(other)
    moved = order != np.arange(64)
    assert moved.sum() > 56
    scores, own = align(straight, rotated).scores, align(straight, straight).scores
    for name in BLIND:
        np.testing.assert_allclose(scores[name].matrix, own[name].matrix, atol=1e-4)
    for name, score in scores.items():
        if name in BLIND or not score.detail.shape[2]:
            continue
        chance = score.nulls["permuted_neurons"].diagonal()
        np.testing.assert_allclose(own[name].matrix.diagonal(), 1, atol=1e-5)
        # 64 neurons, whose scores spread by 0.2 at most: a standard error below 0.03
        np.testing.assert_allclose(
            score.detail.diagonal()[moved].mean(axis=0, dtype=np.float64), chance, atol=0.09
        )


def test_neighbours_do_not_depend_on_the_order_in_which_neurons_are_summed(pair):
    """Not even at the embedding, where probes of the same token are equally near."""
    first, other = pair
    assert len(np.unique(first.activations(0)[::2], axis=0)) <= 48 < 512
    order = np.random.default_rng(1).permutation(first.width)
    reordered = replace(
        first, probes=first.probes[:, :, order], probe_scale=first.probe_scale[:, order]
    )
    if other.width > first.width:
        other = replace(
            other,
            probes=other.probes[:, :, : first.width],
            probe_scale=other.probe_scale[:, : first.width],
        )
    found, expected = (align(atlas, other).scores["neighbours"] for atlas in (reordered, first))
    np.testing.assert_array_equal(found.matrix, expected.matrix)
    np.testing.assert_array_equal(found.interval, expected.interval)
    np.testing.assert_array_equal(found.nulls["permuted_probes"], expected.nulls["permuted_probes"])


def test_real_models_that_grew_apart_agree_no_more_than_chance(real):
    """Models of two authors with one shape and tokenizer, but no common ancestor."""
    atlases = [atlas_of(path) for path in real]
    own, across = align(atlases[0], atlases[0]).scores, align(*atlases).scores
    for name in ("argmax", "correlation", "jaccard", "rank_correlation"):
        chance = across[name].nulls["permuted_neurons"][1:, 1:]
        assert np.abs(across[name].matrix[1:, 1:] - chance).max() < 0.1
        assert own[name].matrix.diagonal().min() > 0.999


def test_angles_and_errors_are_those_of_every_pair_of_states(pair):
    a, b = pair
    width = min(a.width, b.width)
    scores = align(a, b).scores
    for i, j in np.ndindex(a.blocks + 1, b.blocks + 1):
        x, y = (
            atlas.activations(block)[:, :width].astype(np.float64)
            for atlas, block in ((a, i), (b, j))
        )
        norms = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
        cosines = (x * y).sum(axis=1) / (norms[0] * norms[1])
        angles = 1 - np.arccos(np.clip(cosines, -1, 1)) / np.pi
        errors = 1 - np.linalg.norm(x - y, axis=1) / np.sqrt(norms[0] * norms[1])
        assert scores["angular"].matrix[i, j] == pytest.approx(angles.mean(), abs=1e-6)
        assert scores["relative_error"].matrix[i, j] == pytest.approx(errors.mean(), abs=1e-6)


def test_a_donor_agrees_with_itself_exactly(atlases):
    scores = align(atlases["a"], atlases["a"]).scores
    for name in ("angular", "relative_error"):
        assert (scores[name].matrix.diagonal() == 1).all()
