"""Turns of single blocks: a fitted gauge refined by descent until the splice predicts what its donors predict.

A rotation fitted by least squares treats every direction of the stream alike; the blocks behind the
seam do not. `refined` descends on the rotations themselves, on the Kullback-Leibler divergence from the
mean of the donors' predictions. That needs no text: tokens drawn from the donors do. Every block of
a slice gets a rotation of its own, and so do final norm and head: all read and write the one stream
that the slice before has left, so that the result is a plain checkpoint still.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.models.loading import assembled, block_outputs, forward
from frankenmerge.models.streaming import leave
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.rotation import Rotation

ROWS = 4
"""Rows of tokens to a step."""
RATE, SCALE_RATE, LINEAR_RATE = 0.01, 0.01, 0.003
MOMENTUM = 0.9


class Shown(NamedTuple):
    """What the donors made of the same tokens."""

    ids: Tensor
    """`[n, s]`"""
    last: Mapping[str, Tensor]
    """By donor, what its last block left, `[n, s, d]`."""


@torch.no_grad()
def show(models: Mapping[str, PreTrainedModel], ids: Tensor) -> Shown:
    """Run donors on the same tokens `[n, s]`."""
    last = {}
    for name, model in models.items():
        with block_outputs(model) as outputs:
            made = []
            for rows in ids.split(4 * ROWS):
                forward(model, input_ids=rows)
                made.append(outputs[-1])
        last[name] = torch.cat(made)
    return Shown(ids, last)


class _Descent:
    """What descends: for every place a skew matrix and a scale, and where maps may be linear what is added to the rotations."""

    def __init__(self, start: Sequence[Rotation], *, linear: Sequence[bool], centred: bool) -> None:
        self.start = torch.stack([rotation.matrix for rotation in start]).float()
        self.scales = torch.tensor([rotation.scale for rotation in start])
        width = self.start.shape[-1]
        eye = torch.eye(width)
        # Where norms centre, the all-ones direction is to stay where it is.
        self.keep = eye - 1 / width if centred else eye
        self.free = torch.tensor(linear).float()[:, None, None]
        self.skew, self.reading, self.writing = (
            torch.zeros_like(self.start, requires_grad=True) for _ in range(3)
        )
        self.logs = torch.zeros(len(start), requires_grad=True)
        self.momentum = torch.zeros_like(self.start)
        self.adam = torch.optim.Adam(
            [{"params": [self.logs]}, {"params": [self.reading, self.writing]}]
        )

    def rotations(self) -> list[Rotation]:
        """The rotations as they are now, float32, with the graph that leads back to what descends."""
        part = self.keep @ (self.skew - self.skew.mT) @ self.keep
        eye = torch.eye(len(self.keep))
        matrices = self.start @ torch.linalg.solve(eye + part, eye - part)
        scales = self.scales * self.logs.exp()
        reads = matrices @ (eye + self.free * self.reading)
        writes = scales[:, None, None] * matrices @ (eye + self.free * self.writing)
        return [Rotation(read, 1.0, write) for read, write in zip(reads, writes, strict=True)]

    def step(self, loss: Tensor, share: float) -> None:
        """Go down by `share` of the rates.

        A rotation goes by a skew matrix of spectral norm `RATE` at most: the gradient's polar factor,
        as Jordan et al. (2024, Muon) take it for hidden layers, applied through the Cayley map,
        which keeps the rotation orthogonal. What is added goes by Adam's steps.
        """
        self.skew.grad = None
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert self.skew.grad is not None
            self.momentum = MOMENTUM * self.momentum + self.skew.grad
            left, _, right = torch.linalg.svd(self.momentum - self.momentum.mT)
            self.skew -= RATE * share / 2 * (left @ right)
        for group, rate in zip(self.adam.param_groups, (SCALE_RATE, LINEAR_RATE), strict=True):
            group["lr"] = rate * share
        self.adam.step()

    @torch.no_grad()
    def found(self) -> list[Rotation]:
        """The rotations, orthogonal to the last bit of float64, or the pairs of linear maps."""
        part = (self.keep @ (self.skew - self.skew.mT) @ self.keep).double()
        eye = torch.eye(len(self.keep), dtype=torch.float64)
        left, _, right = torch.linalg.svd(
            self.start.double() @ torch.linalg.solve(eye + part, eye - part)
        )
        result = []
        for number, matrix in enumerate(left @ right):
            scale = float(self.scales[number].double() * self.logs[number].double().exp())
            read, write = (
                matrix @ (eye + added[number].double()) for added in (self.reading, self.writing)
            )
            result.append(
                Rotation(read, scale, scale * write)
                if self.free[number]
                else Rotation(matrix, scale)
            )
        return result


@torch.enable_grad()
def refined(
    recipe: Recipe,
    donors: Mapping[str, Checkpoint],
    models: Mapping[str, PreTrainedModel],
    rotations: Mapping[int, Rotation],
    shown: Shown,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[int, tuple[Rotation, ...]]:
    """Descend until the splice predicts what its donors predict in the mean.

    All slices whose gauge asks for it are refined together, for the largest number of steps that
    any asks for; the rates rise over the first tenth and fall to zero by the last.

    Args:
        recipe: spelled out, with a gauge to be refined.
        donors: the donors' headers, by name.
        models: the donors' models, by name, in float32.
        rotations: by slice, the fitted rotations: where the descent begins, and what slices that are not
            refined keep.
        shown: what the donors made of the tokens to descend on.
        seed: draws the rows.
        progress: shows how many steps are made.

    Returns:
        By refined slice, a rotation for each of its blocks, and of the last slice one for final norm
        and head.
    """
    assembly = assembled(recipe, donors, models)
    gauges = {number: part.gauge for number, part in enumerate(recipe.parts) if part.gauge}
    places = [place for place in assembly.places if gauges[place[0]].refine]
    kept = {place: rotations[place[0]] for place in assembly.places if not gauges[place[0]].refine}
    descent = _Descent(
        [rotations[number] for number, _ in places],
        linear=[gauges[number].maps == "linear" for number, _ in places],
        centred=donors[recipe.base].architecture.norm == "layer",
    )
    fixed = assembly.tensors | {
        name: value.float() for name, value in assembly.rotated(kept).items()
    }
    steps = max(gauge.refine or 0 for gauge in gauges.values())
    generator = torch.Generator().manual_seed(seed)
    with progress("refining gauges", steps, "steps") as advance:
        for step in range(steps):
            share = min(1, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2
            rows = torch.randint(len(shown.ids), (ROWS,), generator=generator)
            made = fixed | assembly.rotated(dict(zip(places, descent.rotations(), strict=True)))
            inputs: dict[str, Any] = {"input_ids": shown.ids[rows], "use_cache": False}
            said = functional_call(
                assembly.model, made, (), inputs, tie_weights=False
            ).logits.log_softmax(-1)
            loss = (
                functional.kl_div(
                    said, _mean(models, shown, rows), log_target=True, reduction="none"
                )
                .sum(-1)
                .mean()
            )
            descent.step(loss, share)
            advance(1)
    found = dict(zip(places, descent.found(), strict=True))
    result = {}
    for number in dict.fromkeys(number for number, _ in places):
        ends = [-1] if (number, -1) in found else []
        result[number] = tuple(
            found[number, place] for place in [*range(recipe.parts[number].length), *ends]
        )
    return result


@torch.no_grad()
def _mean(models: Mapping[str, PreTrainedModel], shown: Shown, rows: Tensor) -> Tensor:
    """Log of the mean of the donors' predictions, `[b, s, v]`."""
    said = [
        leave(models[name], shown.ids[rows], last[rows]).log_softmax(-1)
        for name, last in shown.last.items()
    ]
    return torch.logsumexp(torch.stack(said), 0) - math.log(len(said))
