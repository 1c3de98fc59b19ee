"""The best tokens of every feature, updated batch by batch; ties go to the lowest token id."""

import numpy as np
import torch
from torch import Tensor

from frankenmerge.artefacts.atlas import TopTokens
from frankenmerge.errors import fail

_LOW = 0xFFFFFFFF


def pack(activations: Tensor, tokens: Tensor, place: str) -> Tensor:
    """Pack activations `[n, b]`, float32, and tokens `[b]` into sortable integers `[n, b]`.

    They sort by activation, then by lowest id. The bits of a float32, its lower 31 flipped if
    negative, sort as the numbers do; adding 0.0 makes -0.0 equal 0.0.

    Raises:
        FrankenmergeError: if an activation is not finite; names `place`.
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
    """Unpack keys, best first, whose activations were multiplied by `sign` before packing."""
    tokens, activations = unpack(keys)
    return TopTokens(tokens.numpy().astype(np.int32), sign * activations.numpy())


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens, int64, and activations, float32, of packed keys; both of the keys' shape."""
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return _LOW - (keys & _LOW), bits.view(torch.float32)
