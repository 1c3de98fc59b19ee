"""How far tokens of the same neurons in two places agree, and of permuted neurons."""

from typing import NamedTuple

import numpy as np


class Agreement(NamedTuple):
    """Tokens of `m` neurons in `l_a` and in `l_b` places, compared place by place."""

    detail: np.ndarray
    """`[l_a, l_b, m]` float32: the share of a neuron's positions at which the token is the same."""
    permuted: np.ndarray
    """`[l_a, l_b]` float32: the same for permuted neurons, the exact mean over all pairs of
    different neurons. NaN for a single neuron.
    """

    @property
    def matrix(self) -> np.ndarray:
        """The share of neurons and positions with the same token, `[l_a, l_b]` float32."""
        return self.detail.mean(axis=2, dtype=np.float64).astype(np.float32)


def token_agreement(a: np.ndarray, b: np.ndarray) -> Agreement:
    """Compare tokens `[l_a, m, n]` with `[l_b, m, n]`, `n` positions for each of `m` neurons."""
    _, m, n = a.shape
    same = np.stack([(tokens == b).sum(axis=2) for tokens in a])
    # All pairs of neurons at once: products of how often each token is at each position.
    kinds, names = np.unique(
        np.concatenate([a, b]).astype(np.int64) * n + np.arange(n), return_inverse=True
    )
    counts = np.stack(
        [
            np.bincount(place, minlength=len(kinds))
            for place in names.reshape(len(a) + len(b), m * n)
        ]
    ).astype(np.float64)
    others = counts[: len(a)] @ counts[len(a) :].T - same.sum(axis=2)
    permuted = others / (n * m * (m - 1)) if m > 1 else np.full(others.shape, np.nan)
    return Agreement((same / n).astype(np.float32), permuted.astype(np.float32))
