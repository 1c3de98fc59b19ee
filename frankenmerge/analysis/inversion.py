"""Inversion: recover an input from a block's output, by the descent of the gradient search."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from frankenmerge.analysis.decode import Decoder, decoder_of, embedding_table
from frankenmerge.analysis.descent import Optimizer, descend, frozen
from frankenmerge.analysis.gradient import default_rates, start_tokens
from frankenmerge.errors import fail
from frankenmerge.models.hooks import Site, block_outputs, blocks_of, forward

Loss = Literal["l1", "cosine"]


@dataclass(frozen=True)
class InversionResult:
    """The inputs that an inversion recovered."""

    tokens: Tensor
    """What the embeddings decode to, `[n, s]`."""
    embeddings: Tensor
    """`[n, s, d]`, float32."""
    losses: Tensor
    """`[steps + 1, n]`, before every step and after the last."""
    excluded: tuple[int, ...]
    """Tokens that nothing decodes to, because their own embedding does not."""


def invert(
    model: PreTrainedModel,
    outputs: Tensor,
    block: int,
    *,
    loss: Loss = "l1",
    steps: int = 300,
    optimizer: Optimizer = "adam",
    rates: tuple[float, float] | None = None,
    seed: int = 0,
    site: Site = "block",
    isolated: bool = False,
    decoder: Decoder | None = None,
) -> InversionResult:
    """Recover the inputs that produced some outputs of a block.

    Args:
        model: the donor, in evaluation mode; its parameters and their gradients stay as they are.
        outputs: `[n, s, d]`, as `outputs_of` gives them.
        block: the block they came from, 1-based; 0 is what enters the first block.
        loss: `l1`, the mean absolute difference of each input's outputs, or `cosine`, one minus
            their cosine as one vector each.
        steps: how many steps to take.
        optimizer: `adam`, or plain `descent`.
        rates: first and last step size; by default those of the gradient search, falling to a
            hundredth.
        seed: the seed of the tokens that the inputs start from.
        site: the blocks' outputs, or their attention's.
        isolated: whether every block is fed the embeddings directly.
        decoder: a decoder to reuse; by default one of the model, without the tokens that do not
            decode to themselves.

    Raises:
        FrankenmergeError: for a block that the model does not have, or outputs of another width.
    """
    table = embedding_table(model)
    _check(model, block, outputs, table.shape[1])
    start = table[list(start_tokens(model, outputs.shape[1], None, seed))].float()
    first = default_rates(table, optimizer)[0]
    with (
        frozen(model),
        block_outputs(model, site=site, isolated=isolated, last=max(1, block)) as states,
    ):

        def distances(rows: Tensor) -> Tensor:
            forward(model, inputs_embeds=rows.to(model.dtype))
            return _DISTANCES[loss](states[block].float(), outputs)

        ended = descend(
            start.expand(len(outputs), -1, -1),
            distances,
            steps=steps,
            optimizer=optimizer,
            rates=rates or (first, first / 100),
        )
    decoder = decoder or decoder_of(table, excluded=None)
    return InversionResult(
        decoder(ended.rows).cpu(), ended.rows.cpu(), ended.losses.cpu(), decoder.left_out
    )


@torch.no_grad()
def outputs_of(
    model: PreTrainedModel,
    tokens: Tensor,
    block: int,
    *,
    site: Site = "block",
    isolated: bool = False,
) -> Tensor:
    """A block's outputs for `tokens` `[n, s]`: `[n, s, d]` float32, to be inverted.

    Raises FrankenmergeError for a block that the model does not have.
    """
    _check_block(model, block)
    with block_outputs(model, site=site, isolated=isolated, last=max(1, block)) as states:
        forward(model, input_ids=tokens)
        return states[block].float()


def recall(found: Tensor, true: Tensor) -> Tensor:
    """The share of the `n` inputs with the true token at each position, `[s]`, of `[n, s]`."""
    return (found == true).double().mean(dim=0)


def _l1(outputs: Tensor, wanted: Tensor) -> Tensor:
    return (outputs - wanted).abs().mean(dim=(1, 2))


def _cosine(outputs: Tensor, wanted: Tensor) -> Tensor:
    return 1 - functional.cosine_similarity(outputs.flatten(1), wanted.flatten(1))


_DISTANCES: dict[Loss, Callable[[Tensor, Tensor], Tensor]] = {"l1": _l1, "cosine": _cosine}


def _check_block(model: PreTrainedModel, block: int) -> None:
    if not 0 <= block <= (blocks := len(blocks_of(model))):
        raise fail("block", f"0 to {blocks}", str(block), "choose a block the model has")


def _check(model: PreTrainedModel, block: int, outputs: Tensor, width: int) -> None:
    _check_block(model, block)
    if outputs.ndim != 3 or outputs.shape[2] != width:
        raise fail(
            "outputs",
            f"[n, s, {width}]",
            str(list(outputs.shape)),
            "take them from a model of this width",
        )
