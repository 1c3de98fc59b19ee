"""What a splice costs on tokens that its donors drew: measured on the model itself, and no text is needed."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.evaluation.prefix_sharing import logits_together
from frankenmerge.models.loading import virtual_splice
from frankenmerge.models.sampling import draw
from frankenmerge.progress import Advance, ignore


@torch.no_grad()
def damage_on_sampled(
    recipes: Sequence[Recipe],
    donors: Mapping[str, Checkpoint],
    models: Mapping[str, PreTrainedModel],
    *,
    advance: Advance = ignore,
) -> np.ndarray:
    """Nats per token that every recipe loses above its donors, each donor's loss by its share of the blocks, `[r]`.

    The text is what all donors drew, of each as much; a donor's loss is on the whole of it, as on
    any text: what two fine-tunes lose on each other's tokens is no damage. Losses are expected
    ones, cross-entropies with the predictions of the donor that drew, summed over the vocabulary,
    where the token that was drawn would only sample them. Of a recipe of one donor that is the
    Kullback-Leibler divergence.

    Args:
        recipes: what to run as virtual splices.
        donors: their donors by name; they read the same tokens.
        models: the same, loaded.
        advance: called for every recipe on every donor's tokens.
    """
    shares = np.array(
        [
            [np.mean([block.model == name for block in recipe.blocks]) for name in models]
            for recipe in recipes
        ]
    )
    damage = np.zeros(len(recipes))
    for model in models.values():
        ids = draw(model).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        said = logits.float().softmax(-1)
        own = [
            _loss(said, logits if other is model else other(input_ids=ids, use_cache=False).logits)
            for other in models.values()
        ]
        for index, logits in _logits(recipes, donors, models, ids):
            damage[index] += (_loss(said, logits) - shares[index] @ own) / len(models)
            advance(1)
    return damage


def _loss(said: Tensor, logits: Tensor) -> float:
    """Mean cross-entropy of the probabilities `said` `[n, s, v]` with what logits predict."""
    return -float((said * logits.float().log_softmax(-1)).sum(-1).double().mean())


def _logits(
    recipes: Sequence[Recipe],
    donors: Mapping[str, Checkpoint],
    models: Mapping[str, PreTrainedModel],
    ids: Tensor,
) -> Iterator[tuple[int, Tensor]]:
    """Every recipe's number and its logits; plain ones share what they begin with."""
    plain = [index for index, recipe in enumerate(recipes) if recipe.plain]
    for place, logits in logits_together(
        [recipes[index].blocks for index in plain], models, ids, ids.shape[1]
    ):
        yield plain[place], logits
    for index in sorted(set(range(len(recipes))) - set(plain)):
        recipe = recipes[index]
        parts = {name: donors[name] for name in recipe.donors}
        yield (
            index,
            virtual_splice(recipe, parts, {name: models[name] for name in parts})(
                input_ids=ids, use_cache=False
            ).logits,
        )
