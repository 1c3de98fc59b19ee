"""What exchanging single modules of two donors costs, predicted without exchanging them.

The guest's module is run on what the host gives its own. Where its output differs by `d`, the
host's predictions change by half the mean of `(g · d)²` nats per token, to second order: `g` is the
gradient, with respect to that output, of the log probability of tokens drawn from the host's own
predictions (the Fisher information; Amari 1998, eq. 2.6).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from frankenmerge.errors import fail
from frankenmerge.models.hooks import blocks_of
from frankenmerge.progress import Advance, ignore

REACH = 1
"""How many blocks two modules may be apart."""
ROWS, DRAWS = 8, 4
"""Rows in one pass; how many tokens are drawn for every position."""


def modules_in(block: nn.Module) -> list[str]:
    """The paths of a block's parts that have matrices, and of its linear maps.

    `self_attn`, `self_attn.q_proj`, ..., `mlp`, ...; the whole block is the empty path.
    """
    parts = [
        name
        for name, child in block.named_children()
        if any(parameter.dim() > 1 for parameter in child.parameters())
    ]
    maps = [
        name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]
    return ["", *sorted({*parts, *maps})]


class Call(NamedTuple):
    """What a module was called with, and what it returned."""

    args: tuple
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def input(self) -> Tensor:
        """The hidden states, which most modules take first and some by name."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]


def module_damage(
    host: PreTrainedModel,
    guest: PreTrainedModel,
    ids: Tensor,
    *,
    seed: int = 0,
    advance: Advance = ignore,
) -> dict[str, np.ndarray]:
    """Predict the damage of putting one module of the guest into the host.

    Args:
        host: whose module is replaced.
        guest: whose module is put there; of the host's shapes, or the host itself.
        ids: the tokens that the host is run on, `[b, s]`.
        seed: of the tokens that are drawn.
        advance: called for every row.

    Returns:
        By path of the module, `[l_host, l_guest]` float32: nats per token that the host's block
        `i` costs with the module of the guest's block `j`; NaN where they are more than `REACH`
        blocks apart.

    Raises:
        FrankenmergeError: for donors whose modules have other shapes.
    """
    blocks, others = blocks_of(host), blocks_of(guest)
    paths = modules_in(blocks[0])
    check_alike(host, guest, paths)
    pairs = [(i, j) for i in range(len(blocks)) for j in range(len(others)) if abs(i - j) <= REACH]
    found = {path: np.full((len(blocks), len(others)), np.nan, np.float32) for path in paths}
    for table in found.values():
        table[tuple(np.array(pairs).T)] = 0
    generator = torch.Generator().manual_seed(seed)
    for rows in ids.split(ROWS):
        with torch.enable_grad(), module_calls(blocks, paths) as calls:
            logits = host(input_ids=rows.to(host.device), use_cache=False).logits.float()
        differences = _differences(calls, others, pairs, paths)
        for draw in range(DRAWS):
            gradients = _gradients(logits, calls, generator, last=draw == DRAWS - 1)
            for (i, j, path), difference in differences.items():
                changes = (gradients[i, path] * difference).sum((-1, -2))
                found[path][i, j] += float(changes.square().sum()) / (2 * DRAWS * ids.numel())
        advance(len(rows))
    return found


def check_alike(host: PreTrainedModel, guest: PreTrainedModel, paths: Sequence[str]) -> None:
    """Raise FrankenmergeError unless the modules of two donors can be exchanged."""
    shapes = [
        {
            (path, name): parameter.shape
            for path in paths
            if path in modules_in(block)
            for name, parameter in block.get_submodule(path).named_parameters()
        }
        for block in (blocks_of(host)[0], blocks_of(guest)[0])
    ]
    if shapes[0] != shapes[1]:
        different = sorted({path for (path, _), _ in shapes[0].items() ^ shapes[1].items()})
        expected, remedy = "donors whose modules have the same shapes", "leave --modules out"
        raise fail("--modules", expected, f"others in {', '.join(different[:3])}", remedy)


@torch.no_grad()
def _differences(
    calls: dict[tuple[int, str], Call],
    others: nn.ModuleList,
    pairs: Sequence[tuple[int, int]],
    paths: Sequence[str],
) -> dict[tuple[int, int, str], Tensor]:
    """What the guests' modules return beyond what the host's do, on the same inputs."""
    found = {}
    for i, j in pairs:
        for path in paths:
            args, kwargs, output = calls[i, path]
            returned = _hidden(others[j].get_submodule(path)(*args, **kwargs))
            found[i, j, path] = (returned - output).float()
    return found


def _gradients(
    logits: Tensor, calls: dict[tuple[int, str], Call], generator: torch.Generator, *, last: bool
) -> dict[tuple[int, str], Tensor]:
    """Of the log probability of drawn tokens, with respect to every module's output."""
    predicted = logits.log_softmax(-1)
    chances = predicted.detach().exp().flatten(0, -2).cpu()
    drawn = torch.multinomial(chances, 1, generator=generator).to(logits.device)
    total = predicted.flatten(0, -2).gather(-1, drawn).sum()
    outputs = [call.output for call in calls.values()]
    gradients = torch.autograd.grad(total, outputs, retain_graph=not last)
    return {key: each.float() for key, each in zip(calls, gradients, strict=True)}


@contextmanager
def module_calls(
    blocks: nn.ModuleList, paths: Sequence[str]
) -> Iterator[dict[tuple[int, str], Call]]:
    """Collect every module's call within the context, by block and path."""
    found: dict[tuple[int, str], Call] = {}

    def called(
        place: tuple[int, str], _module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> None:
        found[place] = Call(args, kwargs, _hidden(output))

    handles = [
        block.get_submodule(path).register_forward_hook(
            partial(called, (number, path)), with_kwargs=True
        )
        for number, block in enumerate(blocks)
        for path in paths
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output: Any) -> Tensor:
    """A module's output: some return a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]
