"""Softmax prior: descend on weights over the vocabulary, sharpened after every step.

The source document (see docs/method.md) has `a <- softmax(a - grad_a ||C - O_f(a E)||_1)`, from
uniform weights. As printed it does not work: of weights within [0, 1] a softmax over a vocabulary
is almost flat, and the gradient's size depends on the model. So the gradient is divided by its
largest entry at each position, times `STEP`, and the softmax has a temperature that falls
geometrically through `TEMPERATURES`.

`python evals/search_activations.py` on the demo's donor `base` (8 blocks, d = 128, v = 1024), one
token, neurons 64 to 127, which were not used to choose the settings; the neuron's relative
activation on the decoded token, 0 for the vocabulary's mean and 1 for its best token (a standard
error of about 0.05), and how far `a` is from one-hot:

| temperature | step | relative activation at blocks 1, 4, 8 | `1 - max(a)` |
|---|---|---|---|
| 1 | 0.01 (and 0.1, 1) | 0.25, 0.27, 0.16 (0.27, 0.25, 0.14; 0.18, 0.18, 0.10) | 0.999 |
| 0.1 | 10 | 0.46, 0.40, 0.36 | 0.07 |
| 0.03 | 0.2, 0.4 | 0.39, 0.48, 0.49; 0.40, 0.32, 0.32 | 0.00 to 0.06; 0.00 |
| 0.01 | 0.1, 1 | 0.32, 0.32, 0.20; 0.43, 0.39, 0.37 | 0.00; 0.00 to 0.02 |
| 0.05 to 0.02 | 0.2 | 0.36, 0.44, 0.47 | 0.00 |
| 0.1 to 0.01 | 0.3 | 0.39, 0.46, 0.43 | 0.00 |
| 0.1 to 0.01 | 0.1 | 0.42, 0.42, 0.37 | 0.00 |
| embedding gradient, no prior: descent | 0.5 to 0.4 | 0.65, 0.53, 0.49 | - |
| embedding gradient, no prior: Adam | 0.1 | 0.71, 0.59, 0.45 | - |

A temperature makes `a` one-hot and increases the activation; the differences between the settings
that do are hardly more than noise. Whether the prior helps depends on the donor: on this one the
embedding gradient is as good or better, on the demo's `gpt2` (blocks 1, 3, 6) the default reaches
0.92, 0.87, 0.86, as printed (temperature 1) 0.90 to 0.92, 0.79 to 0.84, 0.73 to 0.81, and the
embedding gradient 0.49, 0.41, 0.36.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.analysis.decode import embedding_table
from frankenmerge.analysis.descent import frozen
from frankenmerge.analysis.features import Feature, check_features
from frankenmerge.analysis.gradient import check_length, feature_batches, feature_loss
from frankenmerge.models.hooks import Site, block_outputs, blocks_of
from frankenmerge.progress import Advance, ignore

STEP = 0.1
"""How far the largest entry of the gradient moves a weight."""
TEMPERATURES = (0.1, 0.01)
"""Of the softmax at the first and at the last step."""


@dataclass(frozen=True)
class PriorResult:
    """The inputs that the search with a softmax prior found, one per feature."""

    tokens: Tensor
    """The token of the largest weight, `[n, s]`."""
    gap: Tensor
    """How far the weights are from one-hot, `1 - max(a)`, `[n, s]`: near 0, the model's
    input is that token.
    """
    losses: Tensor
    """`[steps, n]`: `0.1 ||C - O_f||_1` before every step."""


def prior_search(
    model: PreTrainedModel,
    features: Sequence[Feature],
    *,
    tokens: int = 5,
    steps: int = 60,
    target: float = 100.0,
    step: float = STEP,
    temperatures: tuple[float, float] = TEMPERATURES,
    site: Site = "block",
    isolated: bool = False,
    batch: int = 64,
    advance: Advance = ignore,
) -> PriorResult:
    """Find for every feature an input of several tokens with a high activation. Nothing is random.

    Args:
        model: the donor, in evaluation mode; its parameters and their gradients stay as they are.
        features: what to maximise, in any blocks, neurons and positions.
        tokens: the length of the inputs.
        steps: how many steps to take.
        target: `C`, above all activations.
        step: how far the largest entry of the gradient moves a weight.
        temperatures: of the softmax at the first and at the last step.
        site: the blocks' outputs, or their attention's.
        isolated: whether every block is fed the embeddings directly.
        batch: how many features go through the model at once; `batch * tokens * v` weights are
            held.
        advance: called with the number of features done since its last call.

    Raises:
        FrankenmergeError: for features that the model or the input does not have, or more tokens
            than it has positions for.
    """
    table = embedding_table(model)
    check_length(model, tokens)
    check_features(features, blocks=len(blocks_of(model)), width=table.shape[1], tokens=tokens)
    falling = torch.logspace(
        math.log10(temperatures[0]), math.log10(temperatures[1]), steps
    ).tolist()
    batches, back = feature_batches(features, batch)
    found, losses = [], []
    for chunk in batches:
        with (
            frozen(model),
            block_outputs(
                model, site=site, isolated=isolated, last=max(1, chunk[-1].block)
            ) as states,
        ):
            weights, lost = _press(
                table,
                feature_loss(model, states, chunk, target),
                (len(chunk), tokens),
                step,
                falling,
            )
        found.append(weights.max(dim=-1))
        losses.append(lost)
        advance(len(chunk))
    return PriorResult(
        tokens=torch.cat([best.indices for best in found])[back].cpu(),
        gap=1 - torch.cat([best.values for best in found])[back].cpu(),
        losses=torch.cat(losses, dim=1)[:, back].cpu(),
    )


def _press(
    table: Tensor,
    loss: Callable[[Tensor], Tensor],
    size: tuple[int, int],
    step: float,
    temperatures: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Weights `[n, s, v]` after the descent, and the losses `[steps, n]` of the rows they mix."""
    vocabulary = table.float()
    weights = torch.full((*size, len(vocabulary)), 1 / len(vocabulary), device=table.device)
    losses = []
    for temperature in temperatures:
        rows = (weights @ vocabulary).requires_grad_()
        current = loss(rows)
        gradient = torch.autograd.grad(current.sum(), rows)[0] @ vocabulary.T
        gradient /= (
            gradient.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        )
        weights = ((weights - step * gradient) / temperature).softmax(dim=-1)
        losses.append(current.detach())
    return weights, torch.stack(losses)
