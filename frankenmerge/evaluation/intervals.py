"""Confidence intervals: a bootstrap over segments of text, the same for every model.

Tokens are not independent: a passage is hard or easy as a whole, and neighbours share their
context. Therefore segments of consecutive bytes are resampled with all their tokens (a block
bootstrap). As every model is resampled in the same segments, differences are paired. Segments are
measured in bytes, so that models with different tokenizers are compared on the same text.
"""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from frankenmerge.artefacts.bootstrap import percentile_interval, resample_counts
from frankenmerge.evaluation.language import Loss

RESAMPLES = 1000
SEGMENT, FEWEST = 2048, 20
"""Bytes of a segment; fewer if the text would have fewer than `FEWEST` segments."""
COUNTS = 10_000_000
"""Most numbers in memory that say how often a segment is in a resample."""
_NATS, _HITS, _TOKENS, _BYTES = range(4)


class Interval(NamedTuple):
    """The range of a figure in 95 % of the resamples."""

    low: float
    high: float


class Difference(NamedTuple):
    """Bits per byte of a model minus those of a donor."""

    bits_per_byte: float
    interval: Interval
    """Paired: both models on the same segments in every resample."""


def segment_sums(loss: Loss) -> np.ndarray:
    """Nats, hits, tokens and bytes of every segment of a text, `[4, n]`.

    No segment crosses documents; a short document is one. A token belongs to the segment in which
    it ends. Tokens without known ends are assumed to be
    equally long; unknown hits are NaN.
    """
    edges = _segment_edges(np.array([0, loss.bytes]) if loss.bounds is None else loss.bounds)
    count = len(edges) - 1
    ends = np.linspace(0, loss.bytes, loss.tokens + 1)[1:] if loss.ends is None else loss.ends
    place = np.clip(np.searchsorted(edges, ends, side="left") - 1, 0, count - 1)
    hits = np.full(loss.tokens, np.nan) if loss.hits is None else loss.hits
    sums = (
        np.bincount(place, weights=values, minlength=count)
        for values in (loss.nats, hits, np.ones(loss.tokens))
    )
    return np.stack([*sums, np.diff(edges)])


def _segment_edges(bounds: np.ndarray) -> np.ndarray:
    """Where segments begin, and the last ends, of documents at these byte offsets."""
    size = int(bounds[-1])
    segments = max(size // SEGMENT, min(FEWEST, size))
    edges = [np.zeros(1)]
    for begin, end in pairwise(bounds.tolist()):
        count = max(1, round((end - begin) * segments / size))
        edges.append(np.linspace(begin, end, count + 1).round()[1:])
    return np.concatenate(edges)


def resampled(losses: Mapping[str, Loss], seed: int) -> dict[str, np.ndarray]:
    """Bootstrap resamples of every text's sums, `[4, RESAMPLES]`.

    A resample has as many segments as the text, sampled with replacement. They depend on the seed,
    the position of the text and its number of bytes alone, and are thus the same for every model.
    """
    result = {}
    for position, (name, loss) in enumerate(losses.items()):
        sums = segment_sums(loss)
        result[name] = _resampled_sums(sums, np.random.default_rng([seed, position]))
    return result


def _resampled_sums(sums: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Sums of every resample, `[4, RESAMPLES]`; a part at a time, as there may be many segments."""
    count = sums.shape[1]
    size = max(1, COUNTS // count)
    parts = [min(size, RESAMPLES - first) for first in range(0, RESAMPLES, size)]
    made = [sums @ resample_counts(count, part, generator).T for part in parts]
    return np.concatenate(made, axis=1)


def pooled(sums: Mapping[str, np.ndarray]) -> np.ndarray:
    """The sums of all texts."""
    return np.sum(list(sums.values()), axis=0)


def _bits_per_byte(sums: np.ndarray) -> np.ndarray:
    return sums[_NATS] / math.log(2) / sums[_BYTES]


FIGURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bits_per_byte": _bits_per_byte,
    "nats_per_token": lambda sums: sums[_NATS] / np.maximum(sums[_TOKENS], 1),
    "accuracy": lambda sums: sums[_HITS] / np.maximum(sums[_TOKENS], 1),
}
"""Figures that have an interval, of sums `[4, n]`."""


def intervals(sums: np.ndarray) -> dict[str, Interval]:
    """Intervals of the figures of resampled sums; of accuracy only if hits are known."""
    values = {name: figure(sums) for name, figure in FIGURES.items()}
    return {name: _between(value) for name, value in values.items() if np.isfinite(value).all()}


def difference(
    model: Mapping[str, Loss], donor: Mapping[str, Loss], seed: int
) -> tuple[Difference, dict[str, Difference]]:
    """Bits per byte of a model minus those of a donor: on all texts together, and on each."""
    ours, theirs = resampled(model, seed), resampled(donor, seed)
    texts = {
        name: Difference(
            model[name].bits_per_byte - donor[name].bits_per_byte, _paired(ours[name], theirs[name])
        )
        for name in model
    }
    bits = [
        sum(loss.nats.sum() for loss in losses.values()) / math.log(2) for losses in (model, donor)
    ]
    total = float(bits[0] - bits[1]) / sum(loss.bytes for loss in model.values())
    return Difference(total, _paired(pooled(ours), pooled(theirs))), texts


def gain(
    model: Mapping[str, Loss], donors: Mapping[str, Mapping[str, Loss]], seed: int
) -> tuple[float, Interval]:
    """The loss of the best donor minus a model's, in nats per token on all texts together.

    All must have the same tokens. The best donor is chosen anew in every resample, so that the
    interval knows that which one is best is not certain.
    """

    def nats(losses: Mapping[str, Loss]) -> tuple[float, np.ndarray]:
        total = sum(float(loss.nats.sum()) for loss in losses.values())
        sums = pooled(resampled(losses, seed))
        return total / sum(loss.tokens for loss in losses.values()), sums[_NATS] / sums[_TOKENS]

    (ours, drawn), others = nats(model), [nats(losses) for losses in donors.values()]
    best = np.min([each for _, each in others], axis=0)
    return min(each for each, _ in others) - ours, _between(best - drawn)


def _paired(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    return _between(_bits_per_byte(ours) - _bits_per_byte(theirs))


def _between(values: np.ndarray) -> Interval:
    low, high = percentile_interval(values)
    return Interval(float(low), float(high))
