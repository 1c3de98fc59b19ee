"""The damage of splices on tokens that their donors generated: no text is needed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.evaluation.prefix_sharing import Assemble, logits_together
from frankenmerge.models.sampling import sample_unprompted
from frankenmerge.progress import Advance, ignore
from frankenmerge.splicing.resolve import Splice


@torch.no_grad()
def damage_on_sampled(
    splices: Sequence[Splice],
    models: Mapping[str, PreTrainedModel],
    assemble: Assemble,
    *,
    advance: Advance = ignore,
) -> np.ndarray:
    """Nats per token that every splice loses above its donors, each by its share, `[r]`.

    The text is what all donors generated, of each as much; a donor's loss is on the whole of it, as
    on any text: what two fine-tunes lose on each other's tokens is no damage. Losses are expected
    ones, cross-entropies with the predictions of the donor that generated, summed over the
    vocabulary, where the token that was sampled would only estimate them. Of a splice of one donor
    that is the Kullback-Leibler divergence.

    Args:
        splices: what to run; their donors read the same tokens.
        models: the donors in memory, by name.
        assemble: gives the model of a splice that does more than stack whole blocks.
        advance: called for every splice on every donor's tokens.
    """
    shares = np.array(
        [[splice.shares.get(name, 0.0) for name in models] for splice in splices]
    ).reshape(len(splices), len(models))
    damage = np.zeros(len(splices))
    for model in models.values():
        ids, target, own = _generated(model, models)
        for index, predicted in _logits(splices, models, assemble, ids):
            damage[index] += (_loss(target, predicted) - shares[index] @ own) / len(models)
            advance(1)
    return damage


@torch.no_grad()
def cross_losses(models: Mapping[str, PreTrainedModel]) -> np.ndarray:
    """What each donor loses on what each one generated, nats per token `[generating, reading]`."""
    return np.array([_generated(model, models).losses for model in models.values()])


def disagreement(cross: np.ndarray) -> float:
    """What donors lose on each other's tokens beyond the donor that generated them.

    In nats per token: the mean over all pairs of a Kullback-Leibler divergence; 0 for one donor.

    Args:
        cross: as `cross_losses` returns it.
    """
    count = len(cross)
    excess = (cross - cross.diagonal()[:, None]).sum()
    return float(excess / (count * (count - 1))) if count > 1 else 0.0


class _Generated(NamedTuple):
    """Tokens that a model generated."""

    ids: Tensor
    """`[n, s]`"""
    target: Tensor
    """The model's probabilities on them, `[n, s, v]`."""
    losses: list[float]
    """What every donor loses on them, nats per token."""


def _generated(model: PreTrainedModel, models: Mapping[str, PreTrainedModel]) -> _Generated:
    ids = sample_unprompted(model).to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    target = _probabilities(logits)
    losses = [
        _loss(
            target,
            logits if reader is model else reader(input_ids=ids, use_cache=False).logits,
        )
        for reader in models.values()
    ]
    return _Generated(ids, target, losses)


def _probabilities(logits: Tensor) -> Tensor:
    """The probabilities of logits, `[n, s, v]` in float32.

    Row by row, as in `_loss`: of a large vocabulary each copy of all rows takes a gigabyte.
    """
    target = torch.empty_like(logits, dtype=torch.float32)
    for row, given in zip(target, logits, strict=True):
        row.copy_(given.float().softmax(-1))
    return target


def _loss(target: Tensor, logits: Tensor) -> float:
    """Mean cross-entropy of the probabilities `target` `[n, s, v]` with what logits predict."""
    rows = [
        (given * row.float().log_softmax(-1)).sum(-1).double().mean()
        for given, row in zip(target, logits, strict=True)
    ]
    return -float(torch.stack(rows).mean())


def _logits(
    splices: Sequence[Splice],
    models: Mapping[str, PreTrainedModel],
    assemble: Assemble,
    ids: Tensor,
) -> Iterator[tuple[int, Tensor]]:
    """Every splice's number and its logits; stacks of whole blocks share what they begin with."""
    whole = [index for index, splice in enumerate(splices) if splice.stacks_whole_blocks]
    stacks = [splices[index].blocks for index in whole]
    for place, logits in logits_together(stacks, models, ids, ids.shape[1]):
        yield whole[place], logits
    for index in sorted(set(range(len(splices))) - set(whole)):
        yield index, assemble(splices[index])(input_ids=ids, use_cache=False).logits
