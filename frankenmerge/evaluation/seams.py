"""Where a merged model diverges: its hidden states after every block, compared with the donors'.

Predictions after a block are read with the logit lens: the model's own final norm and head, applied
as if the block were the last one.
"""

from bisect import bisect_right
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
from frankenmerge.models.passes import leave
from frankenmerge.progress import Advance, ignore

WINDOWS, WIDTH = 4, 256
"""Number of windows of every text, and the tokens of each."""


class BlockComparison(NamedTuple):
    """A merged model after one of its blocks; the first position of windows does not count."""

    block: int
    """1-based, as block outputs are."""
    donor: str
    donor_block: int
    """0-based, as in `layer_range`."""
    seam: bool
    """Whether a seam is before this block."""
    norm_ratio: float
    """Mean norm of its hidden states over that of the donor's after the same block."""
    cosine: dict[str, float]
    """Mean cosine with the donor's hidden states after the same block, and with those of the other
    donors after the block of that number.
    """
    kl: dict[str, float]
    """Mean KL divergence in nats of the logit lens here from each donor's own prediction,
    `KL(donor || here)`.
    """
    kl_alone: float
    """The same for the donor alone, after its own block: the divergence of the lens itself."""


def windows_of(texts: Mapping[str, Encoded], context: int) -> list[Tensor]:
    """`WINDOWS` evenly spaced windows of every text, token ids `[1, s]`, each in one document."""
    rows = []
    for encoded in texts.values():
        width, edges = min(WIDTH, context, len(encoded.ids)), [*encoded.starts, len(encoded.ids)]
        for start in sorted(set(np.linspace(0, edges[-1] - width, WINDOWS).astype(int).tolist())):
            number = bisect_right(edges, start)
            end = edges[number]  # of the document
            first = max(edges[number - 1], min(start, end - width))
            rows.append(torch.from_numpy(encoded.ids[first : min(first + width, end)])[None])
    return [row for row in rows if row.shape[1] > 1]


@torch.no_grad()
def compared_blocks(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    donors: Mapping[str, PreTrainedModel],
    rows: Sequence[Tensor],
    advance: Advance = ignore,
) -> list[BlockComparison]:
    """Compare a merged model with its donors, block by block.

    Cost: one pass of every model over the windows, and two passes of a head for each block of the
    merged model. Memory: all models, and their hidden states of one window.

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
        _comparison(number, blocks, donors, total, positions)
        for number, total in enumerate(totals, 1)
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
    )  # further rows are padding
    streams, predicted = {}, {}
    for name, donor in donors.items():
        streams[name], predicted[name] = _states(donor, ids, shared)
    alone: dict[Block, Tensor] = {}
    for here, block in zip(_states(model, ids, shared)[0][1:], blocks, strict=True):
        own = streams[block.model][block.index + 1]
        if block not in alone:
            alone[block] = _divergence(
                predicted[block.model], _lens(donors[block.model], ids, own, shared)
            )
        lens = _lens(model, ids, here, shared)
        values = {
            "norm": _compared(here).norm(dim=-1).sum(),
            "own_norm": _compared(own).norm(dim=-1).sum(),
            "alone": alone[block],
        }
        for name, stream in streams.items():
            other = stream[min(block.index + 1, len(stream) - 1)]
            values[f"cosine {name}"] = cosine_similarity(
                _compared(here), _compared(other), dim=-1
            ).sum()
            values[f"kl {name}"] = _divergence(predicted[name], lens)
        yield values


def _states(model: PreTrainedModel, ids: Tensor, shared: int) -> tuple[list[Tensor], Tensor]:
    """The states `[b, s, d]` before the first block and after each, and log-probabilities."""
    with block_outputs(model) as states:
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        return list(states), _log_probabilities(logits, shared)


def _lens(model: PreTrainedModel, ids: Tensor, states: Tensor, shared: int) -> Tensor:
    return _log_probabilities(leave(model, ids.to(model.device), states), shared)


def _log_probabilities(logits: Tensor, shared: int) -> Tensor:
    """Log-probabilities of the tokens that all models have."""
    return _compared(logits[..., :shared]).log_softmax(dim=-1)


def _compared(values: Tensor) -> Tensor:
    """All positions but the first, whose activations are outliers; on the CPU, for any device."""
    return values[:, 1:].float().cpu()


def _divergence(truth: Tensor, predicted: Tensor) -> Tensor:
    return kl_div(predicted, truth, log_target=True, reduction="sum")


def _comparison(
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
