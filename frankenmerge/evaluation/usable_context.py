"""Windows that are longer than what a model can use: behind some position it loses much more."""

import math
from typing import NamedTuple

from frankenmerge.evaluation.language import Loss

RISE = 0.5
"""Nats per token by which the loss rises behind a position that ends the usable context."""
FEWEST_WINDOWS = 4
ERRORS = 3
"""By how many standard errors the rise must be above `RISE`."""


class Rise(NamedTuple):
    """Where the loss rises."""

    position: int
    """Tokens of a window that can be used."""
    nats: float
    """Loss per token behind them minus that before."""


def rise_of(loss: Loss, context: int) -> Rise | None:
    """The steepest rise of the loss by position in windows of `context` tokens, if there is one.

    Positions are compared in parts of a window (see `Loss.by_position`), window by window. At
    least a quarter of a window is behind the position.
    """
    parts = loss.by_position
    if parts is None or len(parts) < FEWEST_WINDOWS:
        return None
    rises, count = [], parts.shape[1]
    for part in range(1, count * 3 // 4 + 1):
        differences = parts[:, part:].mean(1) - parts[:, :part].mean(1)
        error = differences.std(ddof=1) / math.sqrt(len(differences))
        if differences.mean() - ERRORS * error > RISE:
            rises.append(Rise(context * part // count, float(differences.mean())))
    return max(rises, key=lambda rise: rise.nats, default=None)
