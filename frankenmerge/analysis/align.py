"""From two atlases to their alignment.

Every score of `artefacts.scores` is one entry of `FUNCTIONS`: a function of two atlases that
returns a `Score`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import rankdata

import frankenmerge
from frankenmerge.analysis import geometry
from frankenmerge.analysis.gauges import gauge_agreement, rotated_gram
from frankenmerge.analysis.nulls import derangement, mean_interval, mean_over, rounds_for
from frankenmerge.artefacts.alignment import Alignment, Score
from frankenmerge.artefacts.atlas import Atlas
from frankenmerge.artefacts.token_overlap import token_agreement
from frankenmerge.errors import Fault, fail, raise_all

INPUT_METHODS = ("greedy", "ascent", "gradient", "pixels")
"""Searches whose inputs an atlas may lack; their scores are computed on request."""


def align(
    a: Atlas,
    b: Atlas,
    *,
    context: str = "plain",
    method: str = "complete",
    states: Mapping[str, np.ndarray] | None = None,
) -> Alignment:
    """Score the agreement of A after `i` blocks with B after `j`, for every `i` and `j`.

    Args:
        a: one donor's atlas.
        b: another donor's atlas, with the same vocabulary and the same probes. If its width
            differs, the neurons with an index below both widths are compared.
        context: which complete search to compare, `plain` or `bos`.
        method: `greedy`, `ascent`, `gradient` or `pixels` adds the score of that name, over the
            neurons for which both atlases have such inputs.
        states: both donors' states `[l+1, n, d]` by name, such as `sampling.states_on_sampled`
            returns them: predictions use these instead of the states on random probes.

    Raises:
        FrankenmergeError: if the atlases cannot be compared.
    """
    check_comparable(a, b, context)
    if method != "complete":
        raise_all(_input_faults(a, b, method))
    width = min(a.width, b.width)
    names = [name for name in sorted(FUNCTIONS) if name not in INPUT_METHODS]
    names += [] if method == "complete" else [method]
    scores = {name: FUNCTIONS[name](a, b, context, width) for name in names}
    compared = [
        states[atlas.donor][:, :, :width] if states else geometry.states_of(atlas, width)
        for atlas in (a, b)
    ]
    return Alignment(
        donors=(a.donor, b.donor),
        fingerprints=(a.fingerprint, b.fingerprint),
        widths=(a.width, b.width),
        scores={name: _with_interval(score) for name, score in scores.items()},
        tokens=(a.top[context].tokens, b.top[context].tokens),
        vocabulary=a.vocabulary,
        provenance={
            "frankenmerge": frankenmerge.__version__,
            "context": context,
            "method": method,
            "searched": None if method == "complete" else _searched(a, b, method),
            "shared_neurons": width,
            "null_seed": 0,
            "predicted_from": "drawn tokens" if states else "random probes",
            **({"images": True} if a.of_images else {}),
            "atlases": [a.provenance, b.provenance],
        },
        gram=geometry.gram(*compared),
        rotated_gram=rotated_gram(a, b),
    )


def _with_interval(score: Score) -> Score:
    return (
        score
        if score.interval is not None
        else score._replace(interval=mean_interval(score.detail))
    )


def check_comparable(a: Atlas, b: Atlas, context: str = "plain") -> None:
    """Check that two atlases can be compared.

    Raises:
        FrankenmergeError: with every fault, if they differ in vocabulary or probes, or lack the
            context.
    """
    place = f"{a.donor} | {b.donor}"
    faults = []
    if a.of_images != b.of_images:
        expected = "two language models, or two vision transformers"
        raise fail(place, expected, "one of each", "choose another donor")
    if a.of_images and a.provenance["probes"] != b.provenance["probes"]:
        found, remedy = "different images", "analyze both with the same --images"
        raise fail(place, "atlases made with the same images", found, remedy)
    if a.vocabulary != b.vocabulary:
        found = f"{len(a.vocabulary)} and {len(b.vocabulary)} tokens, or different texts for them"
        faults.append(
            Fault(
                place,
                "donors with the same vocabulary",
                found,
                f"give one the other's tokenizer: transplant-tokenizer {a.donor} {b.donor} OUT",
            )
        )
    if a.provenance["probes"] != b.provenance["probes"]:
        faults.append(
            Fault(
                place,
                "atlases made with the same probes",
                "different probes",
                "analyze both again with the same version",
            )
        )
    for atlas in (a, b):
        if context not in atlas.top:
            remedy = "use another context, or a donor whose config.json names a bos_token_id"
            faults.append(
                Fault(
                    atlas.donor,
                    f"an atlas with the context {context!r}",
                    ", ".join(atlas.top),
                    remedy,
                )
            )
    raise_all(faults)


def missing_inputs(atlas: Atlas, method: str) -> list[Fault]:
    """The fault of an atlas without the inputs of a method; empty if it has them."""
    if atlas.pictures is not None if method == "pixels" else method in atlas.inputs:
        return []
    remedy = (
        f"run frankenmerge analyze DONOR --method {method} -o NAME.atlas.safetensors, "
        "or name the donor itself"
    )
    return [
        Fault(
            atlas.donor,
            f"an atlas with the inputs of a {method} search",
            ", ".join(atlas.inputs) or "none",
            remedy,
        )
    ]


def _input_faults(a: Atlas, b: Atlas, method: str) -> list[Fault]:
    if faults := [*missing_inputs(a, method), *missing_inputs(b, method)]:
        return faults
    place, remedy = (
        f"{a.donor} | {b.donor}: {method}",
        "search both with the same --neurons and --tokens",
    )
    shared = np.intersect1d(searched_neurons(a, method), searched_neurons(b, method))
    sizes = [atlas.pictures.pixels.shape[2:] for atlas in (a, b) if atlas.pictures is not None]
    if method == "pixels" and sizes[0] != sizes[1]:
        found = " and ".join(" x ".join(map(str, size)) for size in sizes)
        remedy = "align without --method pixels"
        faults.append(Fault(place, "donors of images of the same size", found, remedy))
    if method != "pixels" and len({atlas.inputs[method].tokens.shape[2] for atlas in (a, b)}) > 1:
        one, other = (atlas.inputs[method] for atlas in (a, b))
        faults.append(
            Fault(
                place,
                "inputs of the same length",
                f"{one.tokens.shape[2]} and {other.tokens.shape[2]} tokens",
                remedy,
            )
        )
    if len(shared) < 2:
        faults.append(
            Fault(
                place,
                "at least two neurons searched in both, for the null",
                f"{len(shared)}",
                remedy,
            )
        )
    return faults


def _searched(a: Atlas, b: Atlas, method: str) -> dict[str, Any]:
    neurons = np.intersect1d(searched_neurons(a, method), searched_neurons(b, method))
    tokens = None if method == "pixels" else a.inputs[method].tokens.shape[2]
    return {"neurons": neurons.tolist(), "tokens": tokens}


def searched_neurons(atlas: Atlas, method: str) -> np.ndarray:
    """The neurons for which an atlas has inputs of a method."""
    if method == "pixels":
        assert atlas.pictures is not None
        return atlas.pictures.neurons
    return atlas.inputs[method].neurons


def input_agreement(a: Atlas, b: Atlas, context: str, width: int, *, method: str) -> Score:
    """Share of the searched neurons' positions with the same token; NaN for other neurons."""
    one, other = a.inputs[method], b.inputs[method]
    neurons, rows_a, rows_b = np.intersect1d(one.neurons, other.neurons, return_indices=True)
    score = _agreement(one.tokens[:, rows_a], other.tokens[:, rows_b], len(a.vocabulary))
    detail = np.full((*score.matrix.shape, width), np.nan, dtype=np.float16)
    detail[:, :, neurons] = score.detail
    return score._replace(detail=detail, interval=mean_interval(score.detail))


def picture_agreement(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """Correlation of the pixels of A's and B's image for the same neuron; NaN for other neurons.

    It is 0 for an image of a single value.
    """
    assert a.pictures is not None and b.pictures is not None
    neurons, rows_a, rows_b = np.intersect1d(
        a.pictures.neurons, b.pictures.neurons, return_indices=True
    )
    one, other = (
        _standardised(pixels[:, rows].reshape(len(pixels), len(rows), -1).transpose(0, 2, 1))[0]
        for pixels, rows in ((a.pictures.pixels, rows_a), (b.pictures.pixels, rows_b))
    )
    score = _correlation_score(one, other, {})
    detail = np.full((*score.matrix.shape, width), np.nan, dtype=np.float16)
    detail[:, :, neurons] = score.detail
    nulls = {"permuted_neurons": score.nulls["permuted_neurons"]}
    return Score(score.matrix, nulls, detail, mean_interval(score.detail))


def argmax_agreement(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """Share of neurons whose top-activating token is the same."""
    return _agreement(
        a.top[context].tokens[:, :width, :1],
        b.top[context].tokens[:, :width, :1],
        len(a.vocabulary),
    )


def _agreement(a: np.ndarray, b: np.ndarray, vocabulary: int) -> Score:
    """The agreement of tokens `[l_a, m, n]` with `[l_b, m, n]`.

    Both nulls are exact: a token and one under a random relabelling of the vocabulary are the same
    with probability `1 / v`.
    """
    agreement = token_agreement(a, b)
    nulls = {
        "permuted_probes": np.full_like(agreement.permuted, 1 / vocabulary),
        "permuted_neurons": agreement.permuted,
    }
    return Score(agreement.matrix, nulls, agreement.detail.astype(np.float16))


def top_jaccard(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """Mean over neurons of `|A & B| / |A | B|`, A and B the sets of the top k tokens."""
    k = min(a.top[context].tokens.shape[2], b.top[context].tokens.shape[2])
    tokens_a, tokens_b = a.top[context].tokens[:, :width, :k], b.top[context].tokens[:, :width, :k]
    detail = jaccard(tokens_a, tokens_b)
    generator, rounds = np.random.default_rng(0), rounds_for(width)

    def other_neurons() -> np.ndarray:
        return tokens_b[:, derangement(generator, width)]

    def other_probes() -> np.ndarray:
        return generator.permutation(len(a.vocabulary))[tokens_b]

    nulls = {
        name: mean_over(
            lambda shuffled=shuffled: jaccard(tokens_a, shuffled()).mean(axis=2), rounds
        )
        for name, shuffled in (
            ("permuted_probes", other_probes),
            ("permuted_neurons", other_neurons),
        )
    }
    return Score(_matrix(detail), nulls, detail.astype(np.float16))


def jaccard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jaccard index `[l_a, l_b, d]`, float32, of token sets `[l_a, d, k]` and `[l_b, d, k]`.

    The tokens of a set are distinct.
    """
    k = a.shape[2]
    result = np.empty((len(a), len(b), a.shape[1]), dtype=np.float32)
    for i, tokens_a in enumerate(a):
        for j, tokens_b in enumerate(b):
            common = (tokens_a[:, :, None] == tokens_b[:, None, :]).sum(
                axis=(1, 2), dtype=np.float32
            )
            result[i, j] = common / (2 * k - common)
    return result


def probe_correlation(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """Mean over neurons of the correlation (Pearson) over probes of A's and B's same neuron.

    The residual law is the correlation that the residual stream alone produces: if one state is the
    other plus independent writes, `corr = sqrt(var_i / var_j)`, the smaller variance over the
    larger.
    """
    (standard_a, variance_a), (standard_b, variance_b) = (
        _standardised(_activations(atlas, width)) for atlas in (a, b)
    )
    low = np.minimum(variance_a[:, None], variance_b[None])
    high = np.maximum(variance_a[:, None], variance_b[None])
    law = np.sqrt(np.divide(low, high, out=np.zeros_like(low), where=high > 0)).mean(axis=2)
    return _correlation_score(standard_a, standard_b, {"residual_law": law.astype(np.float32)})


def rank_correlation(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """Spearman's correlation instead: large activations have no more weight than others."""
    standard_a, standard_b = (_standardised(_ranks(each, width))[0] for each in (a, b))
    return _correlation_score(standard_a, standard_b, {})


def _ranks(atlas: Atlas, width: int) -> np.ndarray:
    """The probes' ranks in every neuron of every block, float32 `[l+1, n, width]`."""
    # Block by block: ranking takes several times the memory of what is ranked.
    return np.stack(
        [
            rankdata(atlas.activations(block)[:, :width], axis=0).astype(np.float32)
            for block in range(atlas.blocks + 1)
        ]
    )


def _correlation_score(a: np.ndarray, b: np.ndarray, nulls: dict[str, np.ndarray]) -> Score:
    detail = _correlations(a, b)
    generator, rounds = np.random.default_rng(0), rounds_for(len(a))
    permutations = {
        "permuted_probes": mean_over(
            lambda: _correlations(a, b[:, :, generator.permutation(b.shape[2])]).mean(axis=2),
            rounds,
        ),
        "permuted_neurons": mean_over(
            lambda: _correlations(a, b[derangement(generator, len(b))]).mean(axis=2), rounds
        ),
    }
    return Score(_matrix(detail), permutations | nulls, detail.astype(np.float16))


def _activations(atlas: Atlas, width: int) -> np.ndarray:
    """`[l+1, n, width]`."""
    return np.stack([atlas.activations(block)[:, :width] for block in range(atlas.blocks + 1)])


def _standardised(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States `[l+1, n, d]` as `[d, l+1, n]`, and their variances `[l+1, d]`.

    Over the probes, the mean is 0 and the norm 1, or 0 for a constant.
    """
    largest = np.abs(states.astype(np.float32, copy=False)).max(axis=1)
    states = states - states.mean(axis=1, keepdims=True, dtype=np.float64)
    variance = (states**2).mean(axis=1)
    variance[variance <= (1e-6 * largest) ** 2] = 0  # rounding errors of a constant
    length = np.sqrt(variance * states.shape[1])[:, None]
    states = np.divide(states, length, out=np.zeros_like(states), where=length > 0)
    return np.ascontiguousarray(states.transpose(2, 0, 1)), variance


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`[d, l_a, n] x [d, l_b, n] -> [l_a, l_b, d]`."""
    return np.matmul(a, b.transpose(0, 2, 1)).transpose(1, 2, 0)


def _matrix(detail: np.ndarray) -> np.ndarray:
    return detail.mean(axis=2, dtype=np.float64).astype(np.float32)


FUNCTIONS: dict[str, Callable[[Atlas, Atlas, str, int], Score]] = {
    "argmax": argmax_agreement,
    "jaccard": top_jaccard,
    "correlation": probe_correlation,
    "rank_correlation": rank_correlation,
    "cka": geometry.debiased_cka,
    "neighbours": geometry.mutual_neighbours,
    "angular": geometry.angular,
    "relative_error": geometry.relative_error,
    "norm_ratio": geometry.norm_ratio,
    "influence": geometry.influence,
    "distance": geometry.distance,
    "relative_depth": geometry.relative_depth,
    "gauge": gauge_agreement,
    **{
        method: partial(input_agreement, method=method)
        for method in ("greedy", "ascent", "gradient")
    },
    "pixels": picture_agreement,
}
"""From two atlases, the context and the number of shared neurons to a score; words for each are in
`artefacts.scores.SCORES`.
"""
