"""Which token has which row of the embedding, in the donors and in the result."""

from typing import NamedTuple

import numpy as np

from frankenmerge.checkpoint import Tensor


class Rows(NamedTuple):
    """A matrix with one row a token, in the result's order: each row one of a donor's rows, or zeros."""

    donors: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    """What the rows are taken from, one for each donor."""
    origin: np.ndarray
    """For each row of the result the number of its donor, -1 for zeros; int16 `[v]`."""
    row: np.ndarray
    """For each row of the result its place in the donor's matrix; int32 `[v]`."""
