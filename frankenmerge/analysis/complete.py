"""Complete search: every token of the vocabulary through the model once, the best of them for every feature.

For block `l` and neuron `f` the feature is `argmax_a O^l_f(a)` over all tokens `a` (the document, "Complete Search
Features"). One pass serves every block and neuron; only a running top-k is kept, `[l+1, d, k]`.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.analysis.ranking import merge, pack, unpack
from frankenmerge.atlas import TopTokens
from frankenmerge.models import Site, block_outputs, embedding_of, forward

BATCH = 1024


@torch.no_grad()
def complete_search(
    model: PreTrainedModel,
    *,
    k: int = 10,
    prefix: tuple[int, ...] = (),
    site: Site = "block",
    isolated: bool = False,
    bottom: bool = False,
    masked: Sequence[int] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> TopTokens:
    """Find for every feature of every block the `k` tokens that excite it most.

    Args:
        model: the donor; block outputs are compared in float32.
        k: how many tokens to keep.
        prefix: tokens put before the searched one, such as BOS; none by default.
        site: the blocks' outputs, or their attention's.
        isolated: whether every block is fed the embedding directly.
        bottom: look for the tokens that excite it least instead, the least first.
        masked: tokens that are not searched, such as special and never trained ones.
        progress: called with the number of tokens done since its last call.

    Returns:
        Tokens and activations `[l+1, d, k]`, best first; of equal activations the lowest token id wins.

    Raises:
        FrankenmergeError: when an activation is not a number.
    """
    size, device = embedding_of(model).shape[0], embedding_of(model).device
    searched = torch.tensor(sorted(set(range(size)) - set(masked)), device=device)
    k = min(k, len(searched))
    before = torch.tensor(prefix, dtype=torch.long, device=device)
    sign = -1.0 if bottom else 1.0
    best: list[Tensor | None] = []
    with block_outputs(model, site=site, isolated=isolated) as states:
        for tokens in searched.split(BATCH):
            forward(model, input_ids=torch.cat([before.expand(len(tokens), -1), tokens[:, None]], dim=1))
            best = best or [None] * len(states)
            for block, state in enumerate(states):
                keys = pack(sign * state[:, -1].float().T, tokens, f"block {block}")
                best[block] = merge(best[block], keys, k)
            progress(len(tokens))
    stacked = torch.stack([entry.cpu() for entry in best if entry is not None])
    ids, values = unpack(stacked)
    return TopTokens(ids.numpy().astype(np.int32), sign * values.numpy())
