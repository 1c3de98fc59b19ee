"""Random numbers that depend on the seed, the tensor, the model and the element only."""

import hashlib
from typing import Any

import numpy as np
from numpy.random import SFC64, SeedSequence

from frankenmerge.splicing.methods.inputs import BLOCK

SCALE = 2**31
"""`words` are uniform in `[0, SCALE)`."""


def stream(seed: int, name: str, model: int, block: int) -> SFC64:
    """Return the bit generator of the words of one block of 2**17 elements.

    Every number of 64 bits gives two words, the lower half first, each without its top bit. The
    generator is SFC64, seeded by NumPy's SeedSequence (whose hash separates streams) from the seed
    and the tensor's name, with the model's position and the block's number as spawn key.
    """
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    return SFC64(SeedSequence(int.from_bytes(digest[:16], "little"), spawn_key=(model, block)))


def words(
    seed: int, name: str, model: int, start: int, stop: int
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Return uniform integers for elements `[start, stop)`, always computed on the CPU."""
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


def normals(seed: int, name: str, block: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return standard normal numbers for the first `count` elements of one block."""
    generator = np.random.Generator(stream(seed, name, 0, block))
    return generator.standard_normal(count, dtype=np.float32)
