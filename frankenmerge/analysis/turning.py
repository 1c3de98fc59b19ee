"""Turns of one donor's blocks towards another's stream: fitted on states, then refined until the splice says what the donors say.

A turn fitted by least squares treats every direction of the stream alike; the blocks behind the seam do not. `refine` descends
on the turns themselves, on the Kullback-Leibler divergence from the mean of the donors' predictions. That needs no text: tokens
drawn from the donors do. Each block may have a turn of its own, and so may the head; where all are equal it is one gauge.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from frankenmerge.architectures import family
from frankenmerge.gauge import Turn, procrustes
from frankenmerge.models import backbone, block_outputs, blocks_of

NEAR = 2
"""How many blocks apart two donors' states still count as a pair for a fit over several blocks."""
ROWS = 4
MOMENTUM = 0.9
SCALE_RATE = 0.01


class Shown(NamedTuple):
    """What both donors made of the same tokens."""

    ids: Tensor
    """`[n, s]`"""
    states: tuple[list[Tensor], list[Tensor]]
    """A's and B's residual stream before the first block and behind every block, `[n, s, d]` each."""
    said: Tensor
    """Log of the mean of their predictions, `[n, s, v]`."""


class Turns(NamedTuple):
    """A turn for every block of B and for its head, for splices with A at any seam."""

    matrices: Tensor
    """`[l+1, d, d]` float32, orthogonal."""
    factors: Tensor
    """`[l+1]`: what the seam's own scale is multiplied by."""


@torch.no_grad()
def show(a: PreTrainedModel, b: PreTrainedModel, ids: Tensor) -> Shown:
    """Run both donors on the same tokens `[n, s]`."""
    states, predictions = [], []
    for model in (a, b):
        with block_outputs(model) as outputs:
            predictions.append(model(input_ids=ids).logits.float().log_softmax(-1))
            states.append(list(outputs))
    return Shown(ids, (states[0], states[1]), torch.logaddexp(*predictions) - torch.tensor(2.0).log())


def flat(states: Tensor) -> Tensor:
    """`[n, s, d]` as `[n * s, d]`."""
    return states.flatten(0, -2)


def unit(states: Tensor) -> Tensor:
    """States of mean square 1, `[n * s, d]`: blocks weigh the same in a fit over several."""
    return flat(states / states.square().mean().sqrt())


def fit_over_blocks(shown: Shown, *, centred: bool = False) -> Turns:
    """For every block of B a Procrustes turn on its input and A's states at about the same depth."""
    a, b = shown.states
    matrices = []
    for block, states in enumerate(b):
        near = [other for depth, other in enumerate(a) if depth and abs(depth - block) <= NEAR]
        turn = procrustes(unit(states).repeat(len(near), 1), torch.cat([unit(other) for other in near]), centred=centred)
        matrices.append(turn.matrix.float())
    return Turns(torch.stack(matrices), torch.ones(len(b)))


def seam_scale(matrix: Tensor, shown: Shown, i: int, j: int) -> float:
    """The scale that, with the turn `matrix`, brings B's states before block `j` closest to A's behind `i` blocks."""
    a, b = (flat(states[depth]).double() for states, depth in zip(shown.states, (i, j), strict=True))
    return float(((b @ matrix.double()) * a).sum() / b.square().sum())


def at_seam(turns: Turns, shown: Shown, i: int, j: int) -> list[Turn]:
    """The turns of a splice: one for every block of B from `j` on and one for its head, orthogonal to the last bit of float64."""
    scale = seam_scale(turns.matrices[j], shown, i, j)
    exact = [left @ right for left, _, right in (torch.linalg.svd(matrix.double()) for matrix in turns.matrices[j:])]
    return [Turn(matrix, scale * float(factor)) for matrix, factor in zip(exact, turns.factors[j:], strict=True)]


@contextmanager
def turning(model: PreTrainedModel, matrices: Sequence[Tensor], scales: Sequence[Tensor | float], entering: list[Tensor]) -> Iterator[None]:
    """Let the model's blocks run on a stream in another donor's basis while the context lasts, without touching a weight.

    Args:
        model: the slice, a model of its own.
        matrices: a turn `[d, d]` for every block and one for the head.
        scales: as many.
        entering: its one entry is what enters the first block in the place of the embedding, `[b, s, d]`, in that basis.
    """
    stream: list[Tensor] = []

    def before(number: int, states: Tensor) -> Tensor:
        stream[:] = [entering[0] if number == 0 else stream[0]]
        return stream[0] @ matrices[number].T / scales[number]

    def behind(number: int, given: Tensor, made: Tensor) -> None:
        stream[0] = stream[0] + scales[number] * (made - given) @ matrices[number]

    def pre_hook(number: int):
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (before(number, args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": before(number, kwargs["hidden_states"])}

        return hook

    def hook(number: int):
        def hooked(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            behind(number, args[0] if args else kwargs["hidden_states"], output if isinstance(output, Tensor) else output[0])

        return hooked

    blocks = list(blocks_of(model))
    final = backbone(model).get_submodule(family(model.config.to_dict()).final.removesuffix("."))
    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(pre_hook(number), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(hook(number), with_kwargs=True).remove)
        stack.callback(final.register_forward_pre_hook(pre_hook(len(blocks)), with_kwargs=True).remove)
        yield


def refine(
    turns: Turns, shown: Shown, slices: Mapping[int, PreTrainedModel], seams: Sequence[tuple[int, int]], *, steps: int, rate: float = 0.01,
    seed: int = 0, centred: bool = False,
) -> Turns:  # fmt: skip
    """Descend on the turns until splices at `seams` predict what the donors predict in the mean.

    Each step turns by a skew matrix of spectral norm `rate` at most: the gradient's polar factor, as Jordan et al. (2024, Muon)
    take it for hidden layers, applied through the Cayley map, which keeps the turns orthogonal.

    Args:
        turns: where to start.
        shown: tokens and what the donors made of them.
        slices: by `j`, B's blocks from `j` on as a model of their own.
        seams: `(i, j)`: A's first `i` blocks and B's from `j` on; one is drawn at every step.
        steps: how many; `rate` rises over the first tenth and falls to zero by the last.
        rate: the largest.
        seed: draws seams and rows.
        centred: whether the all-ones direction is to stay where it is, as LayerNorm needs.
    """
    generator = torch.Generator().manual_seed(seed)
    width = turns.matrices.shape[1]
    eye = torch.eye(width)
    keep = eye - 1 / width if centred else eye
    skew = torch.zeros_like(turns.matrices, requires_grad=True)
    logs = turns.factors.log().requires_grad_(True)
    by_scale = torch.optim.Adam([logs])
    momentum = torch.zeros_like(skew)
    scales = {seam: seam_scale(turns.matrices[seam[1]], shown, *seam) for seam in seams}
    for step in range(steps):
        share = min(1, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2
        i, j = seams[int(torch.randint(len(seams), (1,), generator=generator))]
        rows = torch.randint(len(shown.ids), (ROWS,), generator=generator)
        matrices = _turned(turns.matrices, skew, keep)
        with turning(slices[j], matrices[j:].unbind(), (scales[i, j] * logs[j:].exp()).unbind(), [shown.states[0][i][rows]]):
            said = slices[j](input_ids=shown.ids[rows], use_cache=False).logits.log_softmax(-1)
        loss = functional.kl_div(said, shown.said[rows], log_target=True, reduction="none").sum(-1).mean()
        skew.grad = logs.grad = None
        loss.backward()
        with torch.no_grad():
            assert skew.grad is not None
            momentum = MOMENTUM * momentum + skew.grad
            left, _, right = torch.linalg.svd(momentum[j:] - momentum[j:].mT)
            skew[j:] -= rate * share / 2 * (left @ right)
        by_scale.param_groups[0]["lr"] = SCALE_RATE * share
        by_scale.step()
    with torch.no_grad():
        return Turns(_turned(turns.matrices, skew, keep), logs.exp().detach())


def _turned(matrices: Tensor, skew: Tensor, keep: Tensor) -> Tensor:
    """`matrices` behind the rotations `(I + K)^-1 (I - K)` of the skew parts `K`."""
    part = keep @ (skew - skew.mT) @ keep
    eye = torch.eye(len(keep))
    return matrices @ torch.linalg.solve(eye + part, eye - part)
