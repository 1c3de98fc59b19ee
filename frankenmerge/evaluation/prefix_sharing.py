"""Many recipes on one text: blocks that several of them begin with are run once."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from frankenmerge.artefacts.recipe import Block
from frankenmerge.evaluation.language import POSITIONS, Encoded, Loss, Window, loss_of, windows
from frankenmerge.models.hooks import blocks_of
from frankenmerge.models.passes import enter, leave, run_block
from frankenmerge.splicing.assemble import prefix_of
from frankenmerge.splicing.resolve import Splice

Assemble = Callable[[Splice], PreTrainedModel]
"""Gives the model of a splice."""


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
    nats = torch.full((len(stacks), encoded.predicted), torch.nan, dtype=torch.float64)
    for group in _groups(windows(encoded, context)):
        kept = group[0].kept
        # Shorter windows are padded on the right, where their predictions do not count.
        rows = pad_sequence(
            [ids[each.start : each.start + each.width + 1] for each in group], batch_first=True
        )
        for index, logits in logits_together(stacks, models, rows[:, :-1], kept):
            losses = functional.cross_entropy(
                logits.float().flatten(0, 1),
                rows[:, -kept:].flatten().to(logits.device),
                reduction="none",
            )
            measured = losses.double().cpu().view(len(group), kept)
            for window, line in zip(group, measured, strict=True):
                nats[index, window.place : window.place + window.kept] = line[: window.kept]
    return [loss_of(encoded, line.numpy()) for line in nats]


def _groups(placed: Sequence[Window]) -> list[list[Window]]:
    """Windows that are run as one batch: as many tokens count in each, or all of them."""
    groups: list[list[Window]] = []
    for window in sorted(placed, key=lambda each: (not each.whole, -each.width, -each.kept)):
        first = groups[-1][0] if groups else window
        alike = window.whole if first.whole else window[1:3] == first[1:3]
        if groups and alike and len(groups[-1]) < max(1, POSITIONS // first.width):
            groups[-1].append(window)
        else:
            groups.append([window])
    return groups


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


class Output(NamedTuple):
    """What one splice predicts for one batch."""

    splice: int
    """Its number."""
    batch: int
    """The number of the batch."""
    logits: Tensor
    """`[b, s, v]`."""
    blocks: int
    """How many blocks were run for it."""


@torch.no_grad()
def splices_together(
    splices: Sequence[Splice], assemble: Assemble, batches: Sequence[Tensor]
) -> Iterator[Output]:
    """Run splices of any kind on batches of tokens; what they have in common is run once.

    Splices are put in an order in which those that begin alike are neighbours. Of the current one,
    the hidden states after the last block that it shares with a later one are kept, for all
    batches. Each model is assembled when its turn comes.

    Args:
        splices: what to run; their donors read the same tokens.
        assemble: gives the model of a splice.
        batches: token ids, each `[b, s]`.
    """
    prefixes = _numbered([prefix_of(splice) for splice in splices])
    order = sorted(range(len(splices)), key=prefixes.__getitem__)
    kept: dict[int, list[Tensor]] = {}
    """States by the number of blocks that they have passed."""
    for place, index in enumerate(order):
        own = prefixes[index]
        shared = {_common(own, prefixes[other]) - 1 for other in order[place + 1 :]}
        earlier = _common(own, prefixes[order[place - 1]]) - 1 if place else 0
        kept = {passed: states for passed, states in kept.items() if passed <= earlier}
        start = max(kept, default=0)
        model = assemble(splices[index])
        blocks = list(blocks_of(model))
        made: dict[int, list[Tensor]] = {
            passed: [] for passed in shared if passed > 0 and passed not in kept
        }
        for number, ids in enumerate(batches):
            ids = ids.to(model.device)
            states, calls = enter(model, ids)
            if start:
                states = kept[start][number]
            for passed in range(start + 1, len(blocks) + 1):
                states = run_block(blocks[passed - 1], states, calls[passed - 1])
                if passed in made:
                    made[passed].append(states)
            yield Output(index, number, leave(model, ids, states), len(blocks) - start)
        kept |= made


def _numbered(prefixes: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """The same with numbers for entries, which can be sorted."""
    numbers: dict[Hashable, int] = {}
    return [[numbers.setdefault(entry, len(numbers)) for entry in each] for each in prefixes]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many entries two begin with alike."""
    pairs = zip(first, second, strict=False)
    return next(
        (place for place, (one, other) in enumerate(pairs) if one != other),
        min(len(first), len(second)),
    )
