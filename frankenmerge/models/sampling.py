"""Tokens sampled from donors: text of the kind that a donor predicts, without any data."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from frankenmerge.donors.config import quantity
from frankenmerge.models.hooks import block_outputs
from frankenmerge.models.passes import caches_keys

ROWS, LENGTH, SEED = 16, 64, 0
"""Default number of rows and tokens, and their seed."""


@torch.no_grad()
def sample_tokens(model: PreTrainedModel, rows: int, length: int, start: int, seed: int) -> Tensor:
    """Sample token ids `[rows, length]` from a model, on the CPU; each row begins with `start`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, 1), start)
    # Families with linear attention and the like have caches of their own.
    cache = DynamicCache() if caches_keys(model) else None
    while ids.shape[1] < length:
        if cache is None:
            output = model(input_ids=ids.to(model.device), use_cache=False)
        else:
            last = ids[:, -1:].to(model.device)
            output = model(input_ids=last, past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1]
        ids = torch.cat(
            [ids, torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)], 1
        )
    return ids


def sample_unprompted(
    model: PreTrainedModel, rows: int = ROWS, length: int = LENGTH, seed: int = SEED
) -> Tensor:
    """Sample text from the BOS token (or EOS, or token 0): `[rows, length]` tokens.

    Rows are shorter where the model has fewer positions.
    """
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
    longest = quantity(config, "positions") or length
    return sample_tokens(model, rows, min(length, longest), start, seed)


@torch.no_grad()
def states_on_sampled(models: Mapping[str, PreTrainedModel]) -> dict[str, np.ndarray]:
    """Every donor's states `[l+1, n, d]`, float32, on the tokens that all of them generated.

    The first position of each row is omitted, as trained models have outlier activations there.
    """
    sampled = [sample_unprompted(model) for model in models.values()]
    result: dict[str, np.ndarray] = {}
    for name, model in models.items():
        parts = []
        for ids in sampled:
            with block_outputs(model) as states:
                model(input_ids=ids.to(model.device), use_cache=False)
                parts.append(
                    np.stack([state[:, 1:].flatten(0, 1).float().cpu().numpy() for state in states])
                )
        result[name] = np.concatenate(parts, axis=1)
    return result
