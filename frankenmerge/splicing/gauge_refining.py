"""Refine fitted gauges by descent until the splice predicts what its donors predict.

A rotation fitted by least squares treats every direction of the stream alike; the blocks after the
seam do not. `refined` descends on the rotations themselves, on the Kullback-Leibler divergence from
the mean of the donors' predictions. That needs no text: tokens sampled from the donors suffice.
Every block of a slice gets a rotation of its own, and so do final norm and head: all read and write
the one stream that the slice before has written, so that the result is still a plain checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from frankenmerge.donors.architecture import Architecture
from frankenmerge.models.hooks import block_outputs, forward
from frankenmerge.models.passes import leave
from frankenmerge.models.teaching import divergence, mean_log_probabilities, schedule
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.assemble import assemble, names_as_stored
from frankenmerge.splicing.resolve import Splice
from frankenmerge.splicing.rotation import Rotation, rotate_all

ROWS = 4
"""Rows of tokens to a step."""
RATE, SCALE_RATE, LINEAR_RATE = 0.01, 0.01, 0.003
MOMENTUM = 0.9


class DonorStates(NamedTuple):
    """Tokens, and the donors' states for them."""

    ids: Tensor
    """`[n, s]`"""
    last: Mapping[str, Tensor]
    """By donor, the output of its last block, `[n, s, d]`."""


@torch.no_grad()
def donor_states(models: Mapping[str, PreTrainedModel], ids: Tensor) -> DonorStates:
    """Run donors on the same tokens `[n, s]`."""
    last = {}
    for name, model in models.items():
        with block_outputs(model) as outputs:
            made = []
            for rows in ids.split(4 * ROWS):
                forward(model, input_ids=rows)
                made.append(outputs[-1])
        last[name] = torch.cat(made)
    return DonorStates(ids, last)


class _Descent:
    """The parameters of the descent: for every place a skew matrix and a scale.

    Where maps may be linear, also what is added to the rotations.
    """

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
        """The present rotations in float32, with the graph back to the parameters."""
        part = self.keep @ (self.skew - self.skew.mT) @ self.keep
        eye = torch.eye(len(self.keep))
        matrices = self.start @ torch.linalg.solve(eye + part, eye - part)
        scales = self.scales * self.logs.exp()
        reads = matrices @ (eye + self.free * self.reading)
        writes = scales[:, None, None] * matrices @ (eye + self.free * self.writing)
        return [Rotation(read, 1.0, write) for read, write in zip(reads, writes, strict=True)]

    def step(self, loss: Tensor, share: float) -> None:
        """Descend by `share` of the rates.

        A rotation moves by a skew matrix of spectral norm `RATE` at most: the gradient's polar
        factor, as Jordan et al. (2024, Muon) use it for hidden layers, applied through the Cayley
        map, which keeps the rotation orthogonal. What is added moves by Adam's steps.
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


class _Unrotated(NamedTuple):
    """A splice in memory whose slices are still in their donors' bases."""

    model: PreTrainedModel
    tensors: dict[str, Tensor]
    """By their names in the model."""
    places: dict[tuple[int, int], dict[str, str]]
    """By slice and block in it (as `Fit.at` counts): names in the model by canonical names."""
    architecture: Architecture

    def rotated(self, rotations: Mapping[tuple[int, int], Rotation]) -> dict[str, Tensor]:
        """The tensors of some places, rotated, in the rotations' type."""
        made: dict[str, Tensor] = {}
        for place, rotation in rotations.items():
            names = self.places[place]
            values = {canonical: self.tensors[name] for canonical, name in names.items()}
            result = rotate_all(values, self.architecture, rotation)
            made |= {name: result[canonical] for canonical, name in names.items()}
        return made


def _unrotated(splice: Splice, models: Mapping[str, PreTrainedModel]) -> _Unrotated:
    model = assemble(splice.without_gauges, models)
    tensors = dict(model.state_dict())
    return _Unrotated(model, tensors, _places(splice, model), splice.base.architecture)


def _places(splice: Splice, model: PreTrainedModel) -> dict[tuple[int, int], dict[str, str]]:
    architecture, last = splice.base.architecture, len(splice.slices) - 1
    at = [
        (number, offset)
        for number, part in enumerate(splice.slices)
        for offset in range(part.length)
    ]
    # The head absorbs the final norm's gain: they are rotated together.
    ends = {"embedding": (0, 0), "final": (last, -1), "head": (last, -1)}
    places: dict[tuple[int, int], dict[str, str]] = {}
    for name, stored in names_as_stored(model, architecture).items():
        role, position, canonical = architecture.role(stored)
        place = at[position] if position is not None else ends[role]
        if splice.slices[place[0]].gauge:
            places.setdefault(place, {})[canonical] = name
    return places


@torch.enable_grad()
def refined(
    splice: Splice,
    models: Mapping[str, PreTrainedModel],
    rotations: Mapping[int, Rotation],
    states: DonorStates,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[int, tuple[Rotation, ...]]:
    """Descend until the splice predicts what its donors predict on average.

    All slices whose gauge asks for it are refined together, for the largest number of steps that
    any asks for; the rates rise over the first tenth and fall to zero by the last.

    Args:
        splice: of a recipe with a gauge to be refined.
        models: the donors' models, by name, in float32.
        rotations: the fitted rotation of each slice: where the descent begins, and what slices that
            are not refined keep.
        states: the donors' states on the tokens to descend on.
        seed: of the choice of rows.
        progress: of the steps.

    Returns:
        By refined slice, a rotation for each of its blocks, and of the last slice one for final
        norm and head.
    """
    plain = _unrotated(splice, models)
    gauges = {number: part.gauge for number, part in enumerate(splice.slices) if part.gauge}
    places = [place for place in plain.places if gauges[place[0]].refine]
    kept = {place: rotations[place[0]] for place in plain.places if not gauges[place[0]].refine}
    descent = _Descent(
        [rotations[number] for number, _ in places],
        linear=[gauges[number].maps == "linear" for number, _ in places],
        centred=splice.base.architecture.norm == "layer",
    )
    fixed = plain.tensors | {name: value.float() for name, value in plain.rotated(kept).items()}
    steps = max(gauge.refine or 0 for gauge in gauges.values())
    generator = torch.Generator().manual_seed(seed)
    with progress("refining gauges", steps, "steps") as advance:
        for step in range(steps):
            rows = torch.randint(len(states.ids), (ROWS,), generator=generator)
            made = fixed | plain.rotated(dict(zip(places, descent.rotations(), strict=True)))
            loss = _divergence(plain.model, made, states.ids[rows], _mean(models, states, rows))
            descent.step(loss, schedule(step, steps, steps / 10))
            advance(1)
    found = dict(zip(places, descent.found(), strict=True))
    result = {}
    for number in dict.fromkeys(number for number, _ in places):
        blocks = [*range(splice.slices[number].length), *([-1] if (number, -1) in found else [])]
        result[number] = tuple(found[number, block] for block in blocks)
    return result


def _divergence(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], ids: Tensor, target: Tensor
) -> Tensor:
    """Mean KL divergence of the model with these tensors from log-probabilities `[b, s, v]`."""
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    logits = functional_call(model, dict(tensors), (), inputs, tie_weights=False).logits
    return divergence(target, logits.log_softmax(-1)).mean()


@torch.no_grad()
def _mean(models: Mapping[str, PreTrainedModel], states: DonorStates, rows: Tensor) -> Tensor:
    """Log of the mean of the donors' predictions, `[b, s, v]`."""
    predictions = [
        leave(models[name], states.ids[rows], last[rows]).log_softmax(-1)
        for name, last in states.last.items()
    ]
    return mean_log_probabilities(predictions)
