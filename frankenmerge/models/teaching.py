"""What descents towards models' predictions share: the target, the divergence, the schedule."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def mean_log_probabilities(predicted: Sequence[Tensor]) -> Tensor:
    """Logarithms of the mean of several probabilities, given as logarithms `[n, s, v]` each."""
    return torch.logsumexp(torch.stack(list(predicted)), 0) - math.log(len(predicted))


def divergence(taught: Tensor, predicted: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of every position `[n, s]`, of log-probabilities."""
    return (taught.exp() * (taught - predicted)).sum(-1)


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the rate at a step: it rises linearly for `warmup` steps, falls as a cosine."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
