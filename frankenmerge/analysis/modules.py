"""How far a block's result changes if one of its modules is another donor's.

For attention, MLP and every linear map of a block: the module is replaced by that of another block,
the block alone runs on its own inputs, and the stream after it is compared with what it was. One
block is run for each exchange, no model. `evals/module_swaps.py` has how this ranks the exchanges.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from frankenmerge.analysis.probes import random_probes
from frankenmerge.artefacts.alignment import ModuleScores
from frankenmerge.errors import fail
from frankenmerge.models.hooks import attention_of, blocks_of, embedding_of
from frankenmerge.models.passes import Call, enter, run_block
from frankenmerge.progress import Advance, ignore

APART = 1
"""The furthest blocks, by index, whose modules are exchanged."""
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


def modules_of_block(block: nn.Module) -> list[str]:
    """The paths of a block's attention and MLP, and of all its linear maps."""
    attention = attention_of(block)
    whole = [name for name, module in block.named_children() if module is attention or name in _MLP]
    maps = [
        name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]
    return list(dict.fromkeys([*whole, *maps]))


@torch.no_grad()
def module_scores(
    a: PreTrainedModel, b: PreTrainedModel, *, advance: Advance = ignore
) -> ModuleScores:
    """Score every exchange of one module, of A's blocks by B's and of B's by A's.

    Inputs are random tokens, as for all scores of `align`.

    Args:
        a: a language model.
        b: another one, whose blocks have modules of the same shapes, or the same.
        advance: called for every exchange that was scored.

    Raises:
        FrankenmergeError: for blocks whose modules differ in names or shapes.
    """
    names = modules_of_block(blocks_of(a)[0])
    _check(a, b, names)
    vocabulary = min(len(embedding_of(model)) for model in (a, b))
    probes = torch.from_numpy(random_probes(vocabulary))
    first = _replacements(a, b, names, probes, advance)
    return ModuleScores(
        names, (first, first if a is b else _replacements(b, a, names, probes, advance))
    )


def _check(a: PreTrainedModel, b: PreTrainedModel, names: list[str]) -> None:
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
        for model in (a, b)
        for block in blocks_of(model)
    ]
    for other in shapes[1:]:
        if other != shapes[0]:
            different = next(
                name for name in {**shapes[0], **other} if shapes[0].get(name) != other.get(name)
            )
            expected = "blocks whose modules have the same shapes"
            found = f"{different}: {shapes[0].get(different)} and {other.get(different)}"
            raise fail("--modules", expected, found, "leave --modules out, or align other donors")


def _replacements(
    host: PreTrainedModel,
    guest: PreTrainedModel,
    names: list[str],
    probes: Tensor,
    advance: Advance,
) -> np.ndarray:
    """`[modules, l_host, l_guest]`, float32, NaN for blocks that are further apart."""
    blocks, others = blocks_of(host), blocks_of(guest)
    scores = np.full((len(names), len(blocks), len(others)), np.nan, dtype=np.float32)
    states, calls = enter(host, probes.to(embedding_of(host).device))
    for i, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        after = run_block(block, states, call)
        for j in range(max(0, i - APART), min(len(others), i + APART + 1)):
            for row, name in enumerate(names):
                scores[row, i, j] = _unchanged(block, others[j], name, states, call, after)
                advance(1)
        states = after
    return scores


def _unchanged(
    block: nn.Module, other: nn.Module, name: str, states: Tensor, call: Call | None, after: Tensor
) -> float:
    """One minus the relative change of the stream after a block, a mean over positions.

    The first position of each probe is left out, as in `probe_states`.
    """
    with _exchanged(block, other, name):
        changed = run_block(block, states, call)
    kept, changed = after[:, 1:].float(), changed[:, 1:].float()
    size = (kept.norm(dim=-1) * changed.norm(dim=-1)).sqrt().clamp_min(1e-12)
    return 1 - ((kept - changed).norm(dim=-1) / size).mean().item()


@contextmanager
def _exchanged(block: nn.Module, other: nn.Module, name: str) -> Iterator[None]:
    """The block with one module of another within the context."""
    path, _, last = name.rpartition(".")
    parent = block.get_submodule(path)
    own = getattr(parent, last)
    setattr(parent, last, other.get_submodule(name))
    try:
        yield
    finally:
        setattr(parent, last, own)
