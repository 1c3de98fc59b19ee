"""What a splice costs on tokens that its donors drew: measured on the model itself, and no text is needed."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from frankenmerge.drawing import draw
from frankenmerge.evaluation.together import logits_together
from frankenmerge.recipe import Block


@torch.no_grad()
def damage_on_drawn(
    stacks: Sequence[Sequence[Block]], models: Mapping[str, PreTrainedModel], *, progress: Callable[[int], None] = lambda _: None
) -> np.ndarray:
    """Nats per token that every stack loses on tokens which its donors drew, each donor's by its share of the blocks, `[r]`.

    On a donor's own tokens the expected loss above the donor's is the Kullback-Leibler divergence of the donor's predictions
    from the stack's: it is summed over the vocabulary, where a token that was drawn would only sample it.

    Args:
        stacks: each the blocks of one recipe.
        models: the donors by name; they read the same tokens.
        progress: called for every stack on every donor's tokens.
    """
    damage = np.zeros(len(stacks))
    for name, model in models.items():
        shares = np.array([sum(block.model == name for block in stack) / len(stack) for stack in stacks])
        using = np.flatnonzero(shares)
        ids = draw(model).to(model.device)
        said = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        for index, logits in logits_together([stacks[number] for number in using], models, ids, ids.shape[1]):
            divergence = (said.exp() * (said - logits.float().log_softmax(-1))).sum(-1).mean()
            damage[using[index]] += shares[using[index]] * float(divergence)
            progress(1)
    return damage
