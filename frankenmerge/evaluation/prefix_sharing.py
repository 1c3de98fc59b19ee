"""Many recipes on one text: blocks that several of them begin with are run once."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from frankenmerge.artefacts.recipe import Block
from frankenmerge.evaluation.language import POSITIONS, Encoded, Loss, windows
from frankenmerge.models.hooks import blocks_of
from frankenmerge.models.passes import enter, leave, run_block


class _Group(NamedTuple):
    """Windows that are run as one batch: the same number of tokens count in each."""

    starts: list[int]
    kept: int
    """Number of tokens that count, at the end of each window."""


@torch.no_grad()
def measure_together(
    stacks: Sequence[Sequence[Block]],
    models: Mapping[str, PreTrainedModel],
    encoded: Encoded,
    *,
    context: int,
) -> list[Loss]:
    """Predict every token of a text with every stack of blocks, as `measure` does with one model.

    Args:
        stacks: each the blocks of one recipe.
        models: the donors by name.
        encoded: the text.
        context: tokens in a window.
    """
    ids = torch.from_numpy(encoded.ids)
    width, groups = _groups(len(ids), context)
    nats = torch.full((len(stacks), len(ids) - 1), torch.nan, dtype=torch.float64)
    for starts, kept in groups:
        rows = torch.stack([ids[start : start + width + 1] for start in starts])
        places = torch.tensor(
            [[start + width - kept + offset for offset in range(kept)] for start in starts]
        )
        for index, logits in logits_together(stacks, models, rows[:, :-1], kept):
            losses = functional.cross_entropy(
                logits.float().flatten(0, 1),
                rows[:, -kept:].flatten().to(logits.device),
                reduction="none",
            )
            nats[index, places.flatten()] = losses.double().cpu()
    return [Loss(line.numpy(), encoded.bytes) for line in nats]


def _groups(length: int, context: int) -> tuple[int, list[_Group]]:
    width, starts = windows(length, context)
    kept = [width, *(later - earlier for earlier, later in zip(starts, starts[1:], strict=False))]
    size, groups = max(1, POSITIONS // width), []
    for start, count in zip(starts, kept, strict=True):
        if groups and groups[-1].kept == count and len(groups[-1].starts) < size:
            groups[-1].starts.append(start)
        else:
            groups.append(_Group([start], count))
    return width, groups


@torch.no_grad()
def logits_together(
    stacks: Sequence[Sequence[Block]], models: Mapping[str, PreTrainedModel], ids: Tensor, kept: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield every stack's number and its logits `[b, kept, v]` at the last positions of `ids`.

    Stacks are run in lexicographic order, and the hidden states after every block of the current
    one are kept: the next stack starts after the last block that both have in common. Memory: the
    states of one stack.

    Args:
        stacks: the blocks of every recipe.
        models: the donors by name.
        ids: token ids `[b, s]`.
        kept: number of positions.
    """
    ids = ids.to(next(iter(models.values())).device)
    blocks = {name: list(blocks_of(model)) for name, model in models.items()}
    entered = {name: enter(model, ids) for name, model in models.items()}
    passed: list[tuple[Block, Tensor]] = []
    for index in sorted(range(len(stacks)), key=lambda index: list(stacks[index])):
        stack = stacks[index]
        common = next(
            (at for at, (block, _) in enumerate(passed) if at == len(stack) or stack[at] != block),
            len(passed),
        )
        del passed[common:]
        states = passed[-1][1] if passed else entered[stack[0].model][0]
        for block in stack[len(passed) :]:
            states = run_block(
                blocks[block.model][block.index], states, entered[block.model][1][block.index]
            )
            passed.append((block, states))
        yield index, leave(models[stack[-1].model], ids[:, -kept:], states[:, -kept:])
