"""The best tokens of every feature, kept while the vocabulary goes by: of equal activations the lowest token id wins."""

import numpy as np
import torch
from torch import Tensor

from frankenmerge.artefacts.atlas import TopTokens
from frankenmerge.errors import fail

_LOW = 0xFFFFFFFF


def pack(activations: Tensor, tokens: Tensor, place: str) -> Tensor:
    """Pack activations `[n, b]`, float32, and tokens `[b]` into integers `[n, b]` that sort by activation, then by lowest id.

    The bits of a float32, its lower 31 flipped when negative, order as the numbers do; adding 0.0
    makes -0.0 equal 0.0.

    Raises:
        FrankenmergeError: when an activation is not finite; names `place`.
    """
    if not torch.isfinite(activations).all():
        raise fail(
            place,
            "finite activations",
            "NaN or infinity",
            "analyze in float32, or check the donor's weights",
        )
    bits = (activations + 0.0).contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_LOW - tokens)


def merge(best: Tensor | None, keys: Tensor, k: int) -> Tensor:
    """The `k` best of two sets of packed keys, `[n, k]`, best first."""
    new = keys.topk(min(k, keys.shape[1]), dim=1).values
    return (
        new
        if best is None
        else torch.cat([best, new], dim=1).topk(min(k, best.shape[1] + new.shape[1]), dim=1).values
    )


def top_tokens(keys: Tensor, sign: float = 1.0) -> TopTokens:
    """Packed keys, best first, as tokens and activations; those were multiplied by `sign` before they were packed."""
    tokens, activations = unpack(keys)
    return TopTokens(tokens.numpy().astype(np.int32), sign * activations.numpy())


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Take the tokens, int64, and the activations, float32, out of packed keys; both have the keys' shape."""
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return _LOW - (keys & _LOW), bits.view(torch.float32)
