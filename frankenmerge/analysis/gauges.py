"""Gauges from atlases: how far two donors agree once one rotation, the same at every depth, has brought their states together.

A rotation is fitted on three quarters of the probes, on pairs of states of about the same relative
depth, and everything told here is told of the last quarter. One rotation for all depths costs one SVD
for a pair of donors, not one for every seam, and does nearly as well.
"""

from typing import NamedTuple

import numpy as np

from frankenmerge.analysis.geometry import gram
from frankenmerge.analysis.nulls import interval_of, resampling_weights
from frankenmerge.artefacts.alignment import Score
from frankenmerge.artefacts.atlas import Atlas

MOST_DIRECTIONS = 1024
"""Wider donors are rotated within so many of their leading directions, found by random projection
(Halko et al., 2011).
"""


class Turned(NamedTuple):
    """States of the probes that the fit has not seen, B's in A's basis and of A's size."""

    a: np.ndarray
    """`[l_a+1, n, d]` float64"""
    b: np.ndarray
    """`[l_b+1, n, d]` float64"""


def turned_states(a: Atlas, b: Atlas, *, permuted: bool = False) -> Turned:
    """Rotation B's states to A's, both as wide as the wider donor; with `permuted`, those of other probes, as chance would have it."""
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
    return Turned(left[:, seen:], size * right[:, seen:] @ (u @ v))


def gauge_agreement(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """Share of A's state's squared length that B's, rotated and at its best scale, explains: R^2 about the origin, held out."""
    rotated, chance = turned_states(a, b), turned_states(a, b, permuted=True)
    inner, (own_a, own_b) = (
        np.einsum("ind,jnd->ijn", *rotated),
        (np.square(states).sum(axis=2) for states in rotated),
    )
    weights = resampling_weights(inner.shape[2]).T
    drawn = _explained(inner @ weights, own_a @ weights, own_b @ weights)
    null = _explained(
        np.einsum("ind,jnd->ij", *chance),
        *(np.square(states).sum(axis=(1, 2)) for states in chance),
    )
    matrix = _explained(inner.sum(axis=2), own_a.sum(axis=1), own_b.sum(axis=1)).astype(np.float32)
    detail = np.zeros((*matrix.shape, 0), dtype=np.float16)
    return Score(matrix, {"permuted_probes": null.astype(np.float32)}, detail, interval_of(drawn))


def rotated_gram(a: Atlas, b: Atlas) -> np.ndarray:
    """As `geometry.gram`, with B's states rotated to A's: what splices through a gauge are predicted from."""
    return gram(*turned_states(a, b))


def _explained(inner: np.ndarray, own_a: np.ndarray, own_b: np.ndarray) -> np.ndarray:
    square = own_a[:, None] * own_b[None]
    return np.divide(np.maximum(inner, 0) ** 2, square, out=np.zeros_like(inner), where=square > 0)


def _leading(states: np.ndarray) -> np.ndarray:
    """States `[l+1, n, d]` in float64, of wide donors their coordinates along `MOST_DIRECTIONS` leading directions."""
    width = states.shape[2]
    if width <= MOST_DIRECTIONS:
        return states.astype(np.float64)
    flat = states.reshape(-1, width)
    drawn = np.random.default_rng(0).standard_normal((width, MOST_DIRECTIONS)).astype(np.float32)
    basis, _ = np.linalg.qr(flat.T @ (flat @ drawn))
    return (states @ basis).astype(np.float64)


def _unit(states: np.ndarray) -> np.ndarray:
    """Scaled to unit size, so that deep states count no more than early ones."""
    return states / (np.linalg.norm(states) or 1)
