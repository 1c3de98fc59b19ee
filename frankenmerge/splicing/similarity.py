"""Whether donors' weights are nearly the same, from samples of their bytes. Imports no torch."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from frankenmerge.splicing.reading import DonorFiles, values_of
from frankenmerge.storage.dtypes import BYTES_OF
from frankenmerge.storage.safetensors_header import Tensor

if TYPE_CHECKING:
    import numpy as np

ALIKE = 0.005
"""Relative difference below which weights count as the same: rounding to bfloat16 makes 0.0017."""
_SAMPLE = 1024
"""Elements of each of the three samples of a tensor."""

Blocks = Sequence[Sequence[Tensor]]
"""Tensors of every block, in the same order in all donors."""


def alike(donors: Mapping[str, Blocks]) -> Iterator[tuple[str, str, float]]:
    """Yield pairs of donors whose weights are nearly the same in every block.

    Each with the largest relative difference of a block: the root of the mean squared difference
    over that of the mean square of both, of three samples of every tensor.
    """
    import numpy as np

    sampled = {name: _samples(blocks) for name, blocks in donors.items()}
    for one, other in combinations(sampled, 2):
        worst = 0.0
        for ours, theirs in zip(sampled[one], sampled[other], strict=True):
            squares = (np.square(ours).mean() + np.square(theirs).mean()) / 2
            difference = np.square(ours - theirs).mean()
            worst = max(worst, float(np.sqrt(difference / max(squares, 1e-30))))
        if worst < ALIKE:
            yield one, other, worst


def _samples(blocks: Blocks) -> "list[np.ndarray]":
    """Elements of every block, in float64."""
    import numpy as np

    files = DonorFiles()
    try:
        return [
            np.concatenate([_sample(tensor, files) for tensor in tensors]) for tensors in blocks
        ]
    finally:
        files.close()


def _sample(tensor: Tensor, files: DonorFiles) -> "np.ndarray":
    """Elements from the beginning, the middle and the end of a tensor."""
    import numpy as np

    count = tensor.bytes // BYTES_OF[tensor.dtype]
    size = min(_SAMPLE, count)
    starts = (0, (count - size) // 2, count - size)
    parts = [values_of(tensor, files, start, start + size) for start in starts]
    return np.concatenate(parts).astype(np.float64)
