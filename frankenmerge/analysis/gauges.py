"""Gauges from atlases: how far two donors agree after one rotation, the same at every depth.

A rotation is fitted on three quarters of the probes, on pairs of states of about the same relative
depth; everything reported here is measured on the last quarter. One rotation for all depths costs
one SVD per pair of donors instead of one per seam, and is nearly as good.
"""

from typing import NamedTuple

import numpy as np

from frankenmerge.analysis.geometry import gram
from frankenmerge.analysis.nulls import interval_of, resampling_weights
from frankenmerge.artefacts.alignment import Score
from frankenmerge.artefacts.atlas import Atlas

MOST_DIRECTIONS = 1024
"""Wider donors are rotated within this many of their leading directions, from random projection
(Halko et al., 2011).
"""


class Rotated(NamedTuple):
    """States of the held-out probes, B's in A's basis and scaled to A's size."""

    a: np.ndarray
    """`[l_a+1, n, d]` float64"""
    b: np.ndarray
    """`[l_b+1, n, d]` float64"""


def rotated_states(a: Atlas, b: Atlas, *, permuted: bool = False) -> Rotated:
    """Rotate B's states to A's, both padded to the wider donor's width.

    With `permuted`, A's states are paired with those of other probes: the null model.
    """
    left, right = (
        _leading(np.stack([atlas.activations(block) for block in range(atlas.blocks + 1)]))
        for atlas in (a, b)
    )
    width = max(
        left.shape[2], right.shape[2]
    )  # the narrower one's states lie within the wider one's space
    left, right = (
        np.pad(states, ((0, 0), (0, 0), (0, width - states.shape[2]))) for states in (left, right)
    )
    seen = 3 * left.shape[1] // 4
    if permuted:  # backwards within both parts: then A with B and B with A are the same pairs
        right = np.concatenate([right[:, :seen][:, ::-1], right[:, seen:][:, ::-1]], axis=1)
    product = np.zeros((width, width))
    for i, j in np.ndindex(len(left), len(right)):
        if 2 * abs(i / a.blocks - j / b.blocks) <= 1 / min(a.blocks, b.blocks):
            product += _unit(right[j, :seen]).T @ _unit(left[i, :seen])
    u, _, v = np.linalg.svd(product)
    size = np.sqrt(
        np.square(left[:, :seen]).mean(axis=(0, 1)).sum()
        / np.square(right[:, :seen]).mean(axis=(0, 1)).sum()
    )
    return Rotated(left[:, seen:], size * right[:, seen:] @ (u @ v))


def gauge_agreement(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """Share of A's squared norm that B's rotated, scaled state explains: held-out R^2 about 0."""
    rotated, chance = rotated_states(a, b), rotated_states(a, b, permuted=True)
    inner, (own_a, own_b) = (
        np.einsum("ind,jnd->ijn", *rotated),
        (np.square(states).sum(axis=2) for states in rotated),
    )
    weights = resampling_weights(inner.shape[2]).T
    resampled = _explained(inner @ weights, own_a @ weights, own_b @ weights)
    null = _explained(
        np.einsum("ind,jnd->ij", *chance),
        *(np.square(states).sum(axis=(1, 2)) for states in chance),
    )
    matrix = _explained(inner.sum(axis=2), own_a.sum(axis=1), own_b.sum(axis=1)).astype(np.float32)
    detail = np.zeros((*matrix.shape, 0), dtype=np.float16)
    return Score(
        matrix, {"permuted_probes": null.astype(np.float32)}, detail, interval_of(resampled)
    )


def rotated_gram(a: Atlas, b: Atlas) -> np.ndarray:
    """`geometry.gram` with B's states rotated to A's, for predictions of splices with a gauge."""
    return gram(*rotated_states(a, b))


def _explained(inner: np.ndarray, own_a: np.ndarray, own_b: np.ndarray) -> np.ndarray:
    square = own_a[:, None] * own_b[None]
    return np.divide(np.maximum(inner, 0) ** 2, square, out=np.zeros_like(inner), where=square > 0)


def _leading(states: np.ndarray) -> np.ndarray:
    """States `[l+1, n, d]` in float64; of wide donors the `MOST_DIRECTIONS` leading coordinates."""
    width = states.shape[2]
    if width <= MOST_DIRECTIONS:
        return states.astype(np.float64)
    flat = states.reshape(-1, width)
    random = np.random.default_rng(0).standard_normal((width, MOST_DIRECTIONS)).astype(np.float32)
    basis, _ = np.linalg.qr(flat.T @ (flat @ random))
    return (states @ basis).astype(np.float64)


def _unit(states: np.ndarray) -> np.ndarray:
    """Scaled to unit norm, so that deep states have no more weight than early ones."""
    return states / (np.linalg.norm(states) or 1)
