"""Examples from texts: the windows in which a feature has its highest activations."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from frankenmerge.analysis.features import Feature
from frankenmerge.models.hooks import Site, block_outputs, embedding_of, forward
from frankenmerge.progress import Advance, ignore

EXAMPLES = 5
"""How many windows are kept of each feature."""
BEFORE, AFTER = 12, 6
"""Tokens of a window that are shown around the one with the highest activation."""
_POSITIONS = 4096
"""Positions in a pass."""


class Stretch(NamedTuple):
    """Consecutive tokens of a text that are read at once."""

    ids: Tensor
    """Token ids `[s]`."""
    kept: int
    """How many of them count, at the end."""
    text: str
    """The name of the text."""


class Example(NamedTuple):
    """A place in a text with a high activation."""

    tokens: tuple[int, ...]
    """The tokens around it, and itself."""
    place: int
    """Which of them it is."""
    activation: float
    text: str


@torch.no_grad()
def text_examples(
    model: PreTrainedModel,
    features: Sequence[Feature],
    stretches: Sequence[Stretch],
    *,
    k: int = EXAMPLES,
    site: Site = "block",
    isolated: bool = False,
    advance: Advance = ignore,
) -> list[list[Example]]:
    """Find for each feature the `k` stretches with its highest activation.

    Args:
        model: the donor.
        features: any number of them, each one neuron of any block.
        stretches: what is read; the longest first, so that little is padded.
        k: how many to keep; one example of each stretch at most.
        site: `block` for the residual stream after the block, `attention` for the output of its
            attention.
        isolated: whether every block is fed the embedding instead of its predecessor's output.
        advance: called with the number of tokens read since its last call.

    Returns:
        Examples in the order of the features, the highest activation first.
    """
    peaks, places = [], []
    device, deepest = embedding_of(model).device, max(feature.block for feature in features)
    with block_outputs(model, site=site, isolated=isolated, last=max(1, deepest)) as states:
        for batch in _batches(stretches):
            # Any id will do; transformers warns of rows that end in the model's padding token.
            filler = float(batch[0].ids[0])
            ids = [each.ids for each in batch]
            padded = pad_sequence(ids, batch_first=True, padding_value=filler)
            forward(model, input_ids=padded.to(device))
            position = torch.arange(padded.shape[1])
            lengths = torch.tensor([len(each.ids) for each in batch])[:, None]
            kept = torch.tensor([each.kept for each in batch])[:, None]
            counted = (position < lengths) & (position >= lengths - kept)
            outputs = [states[each.block][..., each.neuron].float().cpu() for each in features]
            peak = torch.stack(outputs).masked_fill(~counted, -torch.inf).max(dim=2)
            peaks.append(peak.values)
            places.append(peak.indices)
            advance(int(counted.sum()))
    best = torch.cat(peaks, dim=1).topk(min(k, len(stretches)), dim=1)
    where = torch.cat(places, dim=1).gather(1, best.indices)
    return [
        [
            _example(stretches[stretch], place, value)
            for stretch, place, value in zip(*rows, strict=True)
        ]
        for rows in zip(best.indices.tolist(), where.tolist(), best.values.tolist(), strict=True)
    ]


def _batches(stretches: Sequence[Stretch]) -> list[Sequence[Stretch]]:
    """Stretches that are read in one pass."""
    batches, first = [], 0
    while first < len(stretches):
        size = max(1, _POSITIONS // len(stretches[first].ids))
        batches.append(stretches[first : first + size])
        first += size
    return batches


def _example(stretch: Stretch, place: int, activation: float) -> Example:
    first = max(0, place - BEFORE)
    tokens = stretch.ids[first : place + AFTER + 1].tolist()
    return Example(tuple(tokens), place - first, activation, stretch.text)
