"""Whether blocks can be exchanged: replacement and interchange of every pair, on random tokens.

Replacement puts another block in a block's place; interchange swaps two blocks of one donor. The
cost is the Kullback-Leibler divergence of the changed donor's predictions from its own.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.artefacts.alignment import Exchange
from frankenmerge.artefacts.recipe import Block
from frankenmerge.evaluation.prefix_sharing import logits_together
from frankenmerge.models.hooks import embedding_of
from frankenmerge.progress import Advance, ignore

ROWS, LENGTH, SEED = 16, 32, 0


def exchange(
    a: tuple[str, int],
    b: tuple[str, int],
    models: Mapping[str, PreTrainedModel],
    *,
    advance: Advance = ignore,
) -> Exchange:
    """Measure replacement and interchange in two donors, or in one that is given twice.

    Args:
        a: a donor's name and its number of blocks.
        b: another's, of the same shape.
        models: both by name.
        advance: called for every change that was measured.
    """
    vocabulary = min(len(embedding_of(model)) for model in models.values())
    ids = torch.from_numpy(np.random.default_rng(SEED).integers(0, vocabulary, (ROWS, LENGTH)))
    tables = []
    for (host, blocks), (guest, others) in ((a, b), (b, a)):
        home = [Block(host, index) for index in range(blocks)]
        replaced = [
            [*home[:i], Block(guest, j), *home[i + 1 :]]
            for i in range(blocks)
            for j in range(others)
        ]
        swapped = [_swapped(home, i, j) for i in range(blocks) for j in range(blocks)]
        found = _divergences(home, [*replaced, *swapped], models, ids, advance)
        tables.append(
            (
                found[: len(replaced)].reshape(blocks, others),
                found[len(replaced) :].reshape(blocks, blocks),
            )
        )
    (replaced_a, swapped_a), (replaced_b, swapped_b) = tables
    return Exchange((replaced_a, replaced_b), (swapped_a, swapped_b))


def _swapped(home: Sequence[Block], i: int, j: int) -> list[Block]:
    stack = list(home)
    stack[i], stack[j] = home[j], home[i]
    return stack


@torch.no_grad()
def _divergences(
    home: Sequence[Block],
    stacks: Sequence[Sequence[Block]],
    models: Mapping[str, PreTrainedModel],
    ids: Tensor,
    advance: Advance,
) -> np.ndarray:
    """The divergence of every stack's predictions from those of `home`, float32 `[r]`.

    It is in nats per token. Equal stacks are run once.
    """
    host = models[home[0].model]
    own = host(input_ids=ids.to(host.device), use_cache=False).logits.float().log_softmax(-1)
    different = [list(stack) for stack in dict.fromkeys(map(tuple, stacks))]
    divergence = {}
    for index, logits in logits_together(different, models, ids, ids.shape[1]):
        divergence[tuple(different[index])] = float(
            (own.exp() * (own - logits.float().log_softmax(-1))).sum(-1).mean()
        )
        advance(1)
    return np.array([divergence[tuple(stack)] for stack in stacks], dtype=np.float32)
