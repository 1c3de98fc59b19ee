"""What a splice costs on tokens that its donors drew: measured on the model itself, and no text is needed."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.checkpoint import Checkpoint
from frankenmerge.drawing import draw
from frankenmerge.evaluation.together import logits_together
from frankenmerge.models import virtual_splice
from frankenmerge.recipe import Recipe


@torch.no_grad()
def damage_on_drawn(
    recipes: Sequence[Recipe],
    donors: Mapping[str, Checkpoint],
    models: Mapping[str, PreTrainedModel],
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """Nats per token that every recipe loses on tokens which its donors drew, each donor's by its share of the blocks, `[r]`.

    On a donor's own tokens the expected loss above the donor's is the Kullback-Leibler divergence of the donor's predictions
    from the splice's: it is summed over the vocabulary, where a token that was drawn would only sample it.

    Args:
        recipes: what to run as virtual splices.
        donors: their donors by name; they read the same tokens.
        models: the same, loaded.
        progress: called for every recipe on every donor's tokens.
    """
    damage = np.zeros(len(recipes))
    for name, model in models.items():
        shares = np.array([sum(block.model == name for block in recipe.blocks) / len(recipe.blocks) for recipe in recipes])
        using = np.flatnonzero(shares).tolist()
        ids = draw(model).to(model.device)
        said = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        for index, logits in _logits([recipes[number] for number in using], donors, models, ids):
            divergence = (said.exp() * (said - logits.float().log_softmax(-1))).sum(-1).mean()
            damage[using[index]] += shares[using[index]] * float(divergence)
            progress(1)
    return damage


def _logits(
    recipes: Sequence[Recipe], donors: Mapping[str, Checkpoint], models: Mapping[str, PreTrainedModel], ids: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Every recipe's number and its logits; plain ones share what they begin with."""
    plain = [index for index, recipe in enumerate(recipes) if recipe.plain]
    for place, logits in logits_together([recipes[index].blocks for index in plain], models, ids, ids.shape[1]):
        yield plain[place], logits
    for index in sorted(set(range(len(recipes))) - set(plain)):
        recipe = recipes[index]
        parts = {name: donors[name] for name in recipe.donors}
        yield index, virtual_splice(recipe, parts, {name: models[name] for name in parts})(input_ids=ids, use_cache=False).logits
