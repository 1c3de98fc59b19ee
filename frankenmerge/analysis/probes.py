"""Probes: random tokens that every donor is shown, the same for every donor with the same vocabulary."""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from frankenmerge.errors import fail
from frankenmerge.models import block_outputs, embedding_of, forward

SEED, COUNT, LENGTH = 0, 64, 17
BATCH = 16


def random_probes(vocabulary: int, *, count: int = COUNT, length: int = LENGTH, seed: int = SEED) -> np.ndarray:
    """Token ids `[count, length]`, uniform over the vocabulary."""
    return np.random.default_rng(seed).integers(0, vocabulary, size=(count, length), dtype=np.int64)


def probe_hash(probes: np.ndarray) -> str:
    """A hash that is equal for equal probes."""
    return hashlib.sha256(str(probes.shape).encode() + probes.tobytes()).hexdigest()[:16]


@torch.no_grad()
def probe_activations(model: PreTrainedModel, probes: np.ndarray, progress: Callable[[int], None] = lambda _: None) -> np.ndarray:
    """Run the probes and return the residual stream `[l+1, n, d]`, float32, with `n = count * (length - 1)`.

    The first position of every probe is left out: trained models put activations there that are no token's own
    (attention sinks), and two or three neurons would drown the others.

    Raises:
        FrankenmergeError: when an activation is not a number.
    """
    device = embedding_of(model).device
    parts = []
    with block_outputs(model) as states:
        for rows in torch.from_numpy(probes).split(BATCH):
            forward(model, input_ids=rows.to(device))
            parts.append(np.stack([state[:, 1:].flatten(0, 1).float().cpu().numpy() for state in states]))
            progress(len(rows))
    activations = np.concatenate(parts, axis=1)
    if broken := np.flatnonzero(~np.isfinite(activations).all(axis=(1, 2))).tolist():
        raise fail(f"block {broken[0]}", "finite activations", "NaN or infinity", "analyze in float32, or check the donor's weights")
    return activations
