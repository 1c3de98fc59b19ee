"""Gradient search: descend on the embeddings of an input, then decode its tokens.

The source document (see docs/method.md) has the equation `e <- e - eta grad ||C - O_f(e)||_1`
(printed there with `+`, which would increase the loss). Here it runs for many features at once:
every row of a batch is the input of one feature, and one forward and one backward pass updates all
of them.

Embeddings enter as `inputs_embeds`. What a model adds after its embedding module is still added:
GPT-2's learned positions are, so the resulting embeddings, like those of tokens, exclude them. What
the module itself does is skipped: Gemma multiplies by `sqrt(d)` there, so start and decoder use the
scaled embeddings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.analysis.decode import (
    Decoder,
    artefact_share,
    decode_hidden,
    decoder_of,
    embedding_table,
)
from frankenmerge.analysis.descent import Optimizer, descend, frozen
from frankenmerge.analysis.features import Feature, check_features
from frankenmerge.errors import fail
from frankenmerge.models.hooks import Site, block_outputs, blocks_of, embedding_of, forward
from frankenmerge.progress import Advance, ignore

Decode = Literal["pinv", "hidden"]
WEIGHT = 0.1
"""The factor of the loss that the author of the source document uses."""
RATES = (0.5, 0.4)
"""First and last step size for plain descent, of the source document's author."""
ADAM_RATES = (0.1, 0.1)
"""Step sizes for Adam, in units of the embedding matrix's root mean square."""


@dataclass(frozen=True)
class GradientResult:
    """The inputs that a gradient search found, one per feature."""

    tokens: Tensor
    """What the embeddings decode to, `[n, s]`."""
    embeddings: Tensor
    """`[n, s, d]`, float32."""
    losses: Tensor
    """`[steps + 1, n]`: `0.1 ||C - O_f||_1` before every step and after the last."""
    start: tuple[int, ...]
    """The tokens `[s]` whose embeddings are the start for every feature."""
    decode: Decode
    excluded: tuple[int, ...]
    """Tokens that nothing decodes to, because their own embedding does not."""
    artefact_share: float | None
    """Over the features of one neuron at all positions: the share of tokens whose id is the
    neuron's index. None without such features.
    """

    @property
    def artefact(self) -> bool:
        """Whether the tokens are neuron indices, which say nothing about the model."""
        return self.decode == "hidden"


def gradient_search(
    model: PreTrainedModel,
    features: Sequence[Feature],
    *,
    tokens: int = 5,
    start: Sequence[int] | None = None,
    seed: int = 0,
    steps: int = 100,
    target: float = 100.0,
    optimizer: Optimizer = "descent",
    rates: tuple[float, float] | None = None,
    site: Site = "block",
    isolated: bool = False,
    batch: int = 64,
    decode: Decode = "pinv",
    decoder: Decoder | None = None,
    advance: Advance = ignore,
) -> GradientResult:
    """Find for every feature an input of several tokens with a high activation.

    Args:
        model: the donor, in evaluation mode; its parameters and their gradients stay as they are.
        features: what to maximise, in any blocks, neurons and positions.
        tokens: the length of the inputs if `start` is not specified.
        start: the tokens whose embeddings to start from; random ones by default, the same for all
            features.
        seed: the seed of the random tokens.
        steps: how many steps to take.
        target: `C`, above all activations; the author used 100 to 200.
        optimizer: `descent`, as in the source document, or `adam`.
        rates: first and last step size; `RATES`, or for Adam `ADAM_RATES` times the embeddings'
            root mean square.
        site: the blocks' outputs, or their attention's.
        isolated: whether every block is fed the embeddings directly.
        batch: how many features go through the model at once.
        decode: `pinv`; or `hidden`, which reproduces the source document's artefact and marks
            the result as one.
        decoder: a decoder to reuse; by default one of the model, without the tokens that do not
            decode to themselves.
        advance: called with the number of features done since its last call.

    Raises:
        FrankenmergeError: for features that the model or the input does not have, or a start that
            is no input of the model.
    """
    table = embedding_table(model)
    begin = start_tokens(model, tokens, start, seed)
    check_features(features, blocks=len(blocks_of(model)), width=table.shape[1], tokens=len(begin))
    rates = rates or default_rates(table, optimizer)
    batches, back = feature_batches(features, batch)
    ends = []
    for chunk in batches:
        rows = table[list(begin)].float().expand(len(chunk), -1, -1)
        with (
            frozen(model),
            block_outputs(
                model, site=site, isolated=isolated, last=max(1, chunk[-1].block)
            ) as states,
        ):
            ends.append(
                descend(
                    rows,
                    feature_loss(model, states, chunk, target),
                    steps=steps,
                    optimizer=optimizer,
                    rates=rates,
                )
            )
        advance(len(chunk))
    embeddings = torch.cat([end.rows for end in ends])[back]
    decoded, excluded = _decoded(embeddings, table, decode, decoder)
    return GradientResult(
        tokens=decoded.cpu(),
        embeddings=embeddings.cpu(),
        losses=torch.cat([end.losses for end in ends], dim=1)[:, back].cpu(),
        start=begin,
        decode=decode,
        excluded=excluded,
        artefact_share=_artefact_share(features, decoded),
    )


def start_tokens(
    model: PreTrainedModel, tokens: int, start: Sequence[int] | None, seed: int
) -> tuple[int, ...]:
    """The tokens a search starts from: `start`, or random ones.

    Raises:
        FrankenmergeError: if they are not a valid input of the model.
    """
    vocabulary = len(embedding_of(model))
    if start is None:
        start = torch.randint(
            vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
    check_length(model, len(start))
    if outside := [token for token in start if not 0 <= token < vocabulary]:
        raise fail(
            "start",
            f"token ids below {vocabulary}",
            f"{outside}",
            "take them from the model's own tokenizer",
        )
    return tuple(start)


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """Raise FrankenmergeError for an empty input, or one with more tokens than positions."""
    longest = model.config.max_position_embeddings
    if not 1 <= tokens <= longest:
        raise fail(
            "tokens",
            f"1 to {longest}",
            str(tokens),
            "use an input that fits in the model's positions",
        )


def feature_batches(
    features: Sequence[Feature], size: int
) -> tuple[list[list[Feature]], list[int]]:
    """Batches of features of similar depth, and the position in them of each feature.

    A pass ends at the deepest block of its batch.
    """
    order = sorted(range(len(features)), key=lambda index: features[index].block)
    batches = [
        [features[index] for index in order[first : first + size]]
        for first in range(0, len(order), size)
    ]
    return batches, sorted(range(len(order)), key=order.__getitem__)


def default_rates(table: Tensor, optimizer: Optimizer) -> tuple[float, float]:
    """The first and last step size of an optimizer for a model with embeddings `[v, d]`."""
    unit = table.float().pow(2).mean().sqrt().item()
    return RATES if optimizer == "descent" else (ADAM_RATES[0] * unit, ADAM_RATES[1] * unit)


def feature_loss(
    model: PreTrainedModel, states: list[Tensor], features: Sequence[Feature], target: float
) -> Callable[[Tensor], Tensor]:
    """The loss `[n]` of rows `[n, s, d]`, one per feature: `0.1 ||C - O_f||_1`.

    `features` are sorted by block; `states` is the list that `block_outputs` fills.
    """
    groups = {
        block: len(list(group))
        for block, group in groupby(features, key=lambda feature: feature.block)
    }

    def loss(rows: Tensor) -> Tensor:
        forward(model, inputs_embeds=rows.to(model.dtype))
        ends = accumulate(groups.values())
        outputs = torch.cat(
            [
                states[block][end - size : end]
                for (block, size), end in zip(groups.items(), ends, strict=True)
            ]
        )
        return WEIGHT * ((target - outputs.float()).abs() * _mask(features, rows)).sum(dim=(1, 2))

    return loss


def _mask(features: Sequence[Feature], rows: Tensor) -> Tensor:
    """Which outputs belong to each feature: 1 or 0, of the shape of `rows`, `[n, s, d]`."""
    mask = torch.zeros_like(rows)
    for row, feature in zip(mask, features, strict=True):
        positions = feature.positions or range(rows.shape[1])
        row[positions.start : positions.stop, feature.neurons.start : feature.neurons.stop] = 1
    return mask


def _decoded(
    embeddings: Tensor, table: Tensor, decode: Decode, decoder: Decoder | None
) -> tuple[Tensor, tuple[int, ...]]:
    if decode == "hidden":
        return decode_hidden(embeddings), ()
    decoder = decoder or decoder_of(table, excluded=None)
    return decoder(embeddings), decoder.left_out


def _artefact_share(features: Sequence[Feature], tokens: Tensor) -> float | None:
    single = [
        index
        for index, feature in enumerate(features)
        if len(feature.neurons) == 1 and feature.positions is None
    ]
    return (
        artefact_share(tokens[single], [features[index].neurons.start for index in single])
        if single
        else None
    )
