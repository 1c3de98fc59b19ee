"""Where a merged model breaks: its stream behind every block beside the donors' streams, and what could be read out there.

The read-out is the logit lens: a model's own final norm and head, applied behind a block as if it
were the last one.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div
from transformers import PreTrainedModel

from frankenmerge.artefacts.recipe import Block
from frankenmerge.evaluation.language import Encoded
from frankenmerge.models.hooks import block_outputs, embedding_of
from frankenmerge.models.streaming import leave
from frankenmerge.progress import Advance, ignore

WINDOWS, WIDTH = 4, 256
"""How many windows of every text are looked at, and their tokens."""


class BlockComparison(NamedTuple):
    """A merged model behind one of its blocks, over all positions looked at but the first of every window."""

    block: int
    """1-based, as block outputs are."""
    donor: str
    donor_block: int
    """0-based, as in `layer_range`."""
    seam: bool
    """Whether a seam lies before this block."""
    norm_ratio: float
    """Mean length of its hidden states over that of the donor's behind the same block."""
    cosine: dict[str, float]
    """Mean cosine with the donor's hidden states behind the same block; with another donor's behind
    the block of that number.
    """
    kl: dict[str, float]
    """Mean KL divergence, in nats, of what the logit lens reads here from each donor's own
    prediction, `KL(donor || here)`.
    """
    kl_alone: float
    """The same of the donor alone, read behind its own block: what the lens costs where nothing was
    spliced.
    """


def windows_of(texts: Mapping[str, Encoded], context: int) -> list[Tensor]:
    """The windows that are looked at, token ids `[1, s]`: of every text `WINDOWS`, evenly spread."""
    rows = []
    for encoded in texts.values():
        width = min(WIDTH, context, len(encoded.ids))
        starts = sorted(set(np.linspace(0, len(encoded.ids) - width, WINDOWS).astype(int).tolist()))
        rows += [torch.from_numpy(encoded.ids[start : start + width])[None] for start in starts]
    return [row for row in rows if row.shape[1] > 1]


@torch.no_grad()
def compared_blocks(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    donors: Mapping[str, PreTrainedModel],
    rows: Sequence[Tensor],
    advance: Advance = ignore,
) -> list[BlockComparison]:
    """Hold a merged model against its donors, block by block.

    Cost: one pass of every model over the windows, and for each block of the merged model two
        read-outs by a head. Memory: all models, and their hidden states of one window.

    Args:
        model: the merged model.
        blocks: where each of its blocks is from.
        donors: the models that the blocks are from, by name, of the same width and the same tokens.
        rows: windows of token ids `[1, s]`, `s` at least 2.
        advance: called with the number of windows done since its last call.
    """
    totals: list[dict[str, float]] = [defaultdict(float) for _ in blocks]
    positions = 0
    for ids in rows:
        for total, values in zip(totals, _window(model, blocks, donors, ids), strict=True):
            for key, value in values.items():
                total[key] += float(value)
        positions += ids.shape[1] - 1
        advance(1)
    return [
        _behind(number, blocks, donors, total, positions) for number, total in enumerate(totals, 1)
    ]


def _window(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    donors: Mapping[str, PreTrainedModel],
    ids: Tensor,
) -> Iterator[dict[str, Tensor]]:
    """Sums over a window's positions, block by block."""
    shared = min(
        len(embedding_of(each)) for each in (model, *donors.values())
    )  # rows beyond are padding, of which some have more
    streams, predicted = {}, {}
    for name, donor in donors.items():
        streams[name], predicted[name] = _passed(donor, ids, shared)
    alone: dict[Block, Tensor] = {}
    for here, block in zip(_passed(model, ids, shared)[0][1:], blocks, strict=True):
        own = streams[block.model][block.index + 1]
        if block not in alone:
            alone[block] = _divergence(
                predicted[block.model], _read(donors[block.model], ids, own, shared)
            )
        read = _read(model, ids, here, shared)
        values = {
            "norm": _kept(here).norm(dim=-1).sum(),
            "own_norm": _kept(own).norm(dim=-1).sum(),
            "alone": alone[block],
        }
        for name, stream in streams.items():
            other = stream[min(block.index + 1, len(stream) - 1)]
            values[f"cosine {name}"] = cosine_similarity(_kept(here), _kept(other), dim=-1).sum()
            values[f"kl {name}"] = _divergence(predicted[name], read)
        yield values


def _passed(model: PreTrainedModel, ids: Tensor, shared: int) -> tuple[list[Tensor], Tensor]:
    """The stream `[b, s, d]` before the first block and behind every one, and the logarithms of the model's prediction."""
    with block_outputs(model) as states:
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        return list(states), _logarithms(logits, shared)


def _read(model: PreTrainedModel, ids: Tensor, states: Tensor, shared: int) -> Tensor:
    return _logarithms(leave(model, ids.to(model.device), states), shared)


def _logarithms(logits: Tensor, shared: int) -> Tensor:
    """Of the probabilities of the tokens that all models have."""
    return _kept(logits[..., :shared]).log_softmax(dim=-1)


def _kept(values: Tensor) -> Tensor:
    """All positions but the first, which holds activations that are no token's own; on the CPU, where models may differ in place."""
    return values[:, 1:].float().cpu()


def _divergence(truth: Tensor, read: Tensor) -> Tensor:
    return kl_div(read, truth, log_target=True, reduction="sum")


def _behind(
    number: int,
    blocks: Sequence[Block],
    donors: Mapping[str, Any],
    total: Mapping[str, float],
    positions: int,
) -> BlockComparison:
    block = blocks[number - 1]
    return BlockComparison(
        number,
        block.model,
        block.index,
        number > 1 and block != (blocks[number - 2].model, blocks[number - 2].index + 1),
        total["norm"] / total["own_norm"],
        {name: total[f"cosine {name}"] / positions for name in donors},
        {name: total[f"kl {name}"] / positions for name in donors},
        total["alone"] / positions,
    )
