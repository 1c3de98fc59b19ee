"""Random numbers that are a function of the seed, the tensor, the model and the element: of nothing else."""

import hashlib

import numpy as np
import torch
from numpy.random import SFC64, SeedSequence
from torch import Tensor

from frankenmerge.merging.methods.inputs import BLOCK

SCALE = 2**31
"""`words` are uniform in `[0, SCALE)`."""


def words(seed: int, name: str, model: int, start: int, stop: int) -> Tensor:
    """Uniform integers for elements `[start, stop)`, int32.

    Every block of 2**17 elements has its own stream: SFC64 seeded by NumPy's SeedSequence, whose hash keeps streams apart, from the
    seed and the tensor's name, with the model's position and the block's number as spawn key. Drawn on the CPU for all devices.
    """
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    entropy = int.from_bytes(digest[:16], "little")
    pieces = []
    for block in range(start // BLOCK, (stop - 1) // BLOCK + 1):
        first, last = max(start - block * BLOCK, 0), min(stop - block * BLOCK, BLOCK)
        stream = SFC64(SeedSequence(entropy, spawn_key=(model, block)))
        raw = stream.random_raw((last + 1) // 2).astype("<u8", copy=False).view("<i4")
        pieces.append(raw[first:last])
    return torch.from_numpy(np.concatenate(pieces)).bitwise_and_(SCALE - 1)
