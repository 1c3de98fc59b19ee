"""Random numbers that are a function of the seed, the tensor, the model and the element: of nothing else."""

import hashlib
from typing import Any

import numpy as np
from numpy.random import SFC64, SeedSequence

from frankenmerge.splicing.methods.inputs import BLOCK

SCALE = 2**31
"""`words` are uniform in `[0, SCALE)`."""


def stream(seed: int, name: str, model: int, block: int) -> SFC64:
    """The generator of a block of 2**17 elements' words: two from every draw, the lower half first, each without its top bit.

    SFC64 seeded by NumPy's SeedSequence, whose hash keeps streams apart, from the seed and the
    tensor's name, with the model's position and the block's number as spawn key.
    """
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    return SFC64(SeedSequence(int.from_bytes(digest[:16], "little"), spawn_key=(model, block)))


def words(
    seed: int, name: str, model: int, start: int, stop: int
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Uniform integers for elements `[start, stop)`. Drawn on the CPU for all devices."""
    pieces = []
    for block in range(start // BLOCK, (stop - 1) // BLOCK + 1):
        first, last = max(start - block * BLOCK, 0), min(stop - block * BLOCK, BLOCK)
        raw = (
            stream(seed, name, model, block)
            .random_raw((last + 1) // 2)
            .astype("<u8", copy=False)
            .view("<i4")
        )
        pieces.append(raw[first:last])
    return np.concatenate(pieces) & (SCALE - 1)
