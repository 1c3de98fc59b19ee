"""Probes: random tokens, the same for every donor with the same vocabulary."""

import hashlib
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from frankenmerge.errors import fail

SEED, COUNT, LENGTH = 0, 64, 17


def random_probes(
    vocabulary: int, *, count: int = COUNT, length: int = LENGTH, seed: int = SEED
) -> np.ndarray:
    """Token ids `[count, length]`, uniform over the vocabulary."""
    return np.random.default_rng(seed).integers(0, vocabulary, size=(count, length), dtype=np.int64)


def probe_hash(probes: np.ndarray) -> str:
    """A hash that is equal for equal probes."""
    return hashlib.sha256(str(probes.shape).encode() + probes.tobytes()).hexdigest()[:16]


def probe_states(outputs: Iterable[tuple[slice, Tensor]], place: str) -> np.ndarray:
    """The hidden states of all probes after one block, `[n, d]`, float32.

    `n = count * (length - 1)`: the first position of every probe is left out, as trained models
    have activations there that do not depend on the token (attention sinks), and two or three
    neurons would outweigh the others.

    Args:
        outputs: rows of the probes and their hidden states `[b, s, d]`, in order.
        place: what to name in an error.

    Raises:
        FrankenmergeError: when an activation is not a number.
    """
    states = np.concatenate(
        [output[:, 1:].flatten(0, 1).float().cpu().numpy() for _, output in outputs]
    )
    if not np.isfinite(states).all():
        raise fail(
            place,
            "finite activations",
            "NaN or infinity",
            "analyze in float32, or check the donor's weights",
        )
    return states
