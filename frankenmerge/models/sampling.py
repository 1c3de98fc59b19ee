"""Tokens drawn from donors: text that nobody has to bring, and what a donor's blocks are used to."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from frankenmerge.donors.config import quantity
from frankenmerge.models.loading import block_outputs

ROWS, LENGTH, SEED = 16, 64, 0
"""What a donor draws where nothing else is asked for."""


@torch.no_grad()
def drawn(model: PreTrainedModel, rows: int, length: int, start: int, seed: int) -> Tensor:
    """Tokens drawn from a model's own predictions behind `start`, `[rows, length]`, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    ids, cache = torch.full((rows, 1), start), DynamicCache()
    while ids.shape[1] < length:
        logits = model(
            input_ids=ids[:, -1:].to(model.device), past_key_values=cache, use_cache=True
        ).logits[:, -1]
        ids = torch.cat(
            [ids, torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)], 1
        )
    return ids


def draw(model: PreTrainedModel) -> Tensor:
    """What a donor says when nothing was said: `[ROWS, LENGTH]` tokens behind its BOS, or its EOS, or token 0."""
    config = model.config.to_dict()
    named = [config.get(key) for key in ("bos_token_id", "eos_token_id")]
    flat = [token[0] if isinstance(token, list) else token for token in named]
    start = next(
        (
            token
            for token in flat
            if isinstance(token, int) and token < (quantity(config, "vocabulary") or 0)
        ),
        0,
    )
    return drawn(model, ROWS, min(LENGTH, quantity(config, "positions") or LENGTH), start, SEED)


@torch.no_grad()
def states_on_sampled(models: Mapping[str, PreTrainedModel]) -> dict[str, np.ndarray]:
    """Every donor's states `[l+1, n, d]`, float32, on the tokens that all of them drew, the first position of each row left out.

    Trained models put activations at the first position that are no token's own.
    """
    shown = [draw(model) for model in models.values()]
    found: dict[str, np.ndarray] = {}
    for name, model in models.items():
        parts = []
        for ids in shown:
            with block_outputs(model) as states:
                model(input_ids=ids.to(model.device), use_cache=False)
                parts.append(
                    np.stack([state[:, 1:].flatten(0, 1).float().cpu().numpy() for state in states])
                )
        found[name] = np.concatenate(parts, axis=1)
    return found
