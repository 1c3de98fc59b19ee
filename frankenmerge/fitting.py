"""The turns that a recipe's gauges ask for: donors run block by block on the same tokens, their states brought together."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from frankenmerge.architectures import quantity
from frankenmerge.blockwise import Passage, each_block, stream_model
from frankenmerge.checkpoint import Checkpoint
from frankenmerge.errors import fail
from frankenmerge.gauge import Turn, procrustes, residual
from frankenmerge.models import load_tokenizer
from frankenmerge.recipe import Recipe

LENGTH = 64
LEAST_ROWS = 64
PER_NEURON = 8
"""Positions to fit on for every neuron: a rotation has half as many angles as it has entries."""


class Fit(NamedTuple):
    """A fitted turn, and how well it does."""

    turn: Turn
    residual: float
    """Share of the target's squared length that is left over on tokens that the fit has not seen: 1 minus R^2."""


def fitted_turns(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> dict[int, Fit]:
    """Fit the turn of every slice that has a gauge, by the slice's number.

    Towards the slice before, its last block's output and the input of the slice's first block are fitted; towards the base,
    both donors' states at the depth where the slice begins. A slice behind a turned one is turned as that one is, too.

    Raises:
        FrankenmergeError: for a text that is too short, for states that are not finite, and for weights that are no model's.
    """
    fits: dict[int, Fit] = {}
    for number, part in enumerate(recipe.parts):
        if part.gauge is None:
            continue
        source = part.sources[0]
        depth = source.layer_range[0]
        if part.gauge.to == "base":
            name, reached = recipe.base, min(depth, donors[recipe.base].blocks)
        else:
            before = recipe.parts[number - 1].sources[0]
            name, reached = before.model, before.layer_range[1]
        ids = _tokens(part.gauge.fit, donors[source.model])
        fit = fit_turn(states_at(donors[source.model], ids, depth), states_at(donors[name], ids, reached), donors[source.model])
        if part.gauge.to == "previous" and (other := fits.get(number - 1)):
            fit = fit._replace(turn=Turn(fit.turn.matrix @ other.turn.matrix, fit.turn.scale * other.turn.scale))
        fits[number] = fit
    return fits


def fit_turn(source: Tensor, target: Tensor, donor: Checkpoint) -> Fit:
    """Fit on all positions of both `[n, d]`, and tell what the fit of the first three quarters leaves over on the last."""
    centred, seen = donor.architecture.norm == "layer", 3 * len(source) // 4
    trial = procrustes(source[:seen], target[:seen], centred=centred)
    return Fit(procrustes(source, target, centred=centred), residual(trial, source[seen:], target[seen:]))


def states_at(donor: Checkpoint, ids: Tensor, depth: int) -> Tensor:
    """The residual stream behind the donor's first `depth` blocks, `[n, d]`, in float32.

    The first position of every row is left out: what a trained model puts there is no token's own. Raises FrankenmergeError for
    states that are not finite.
    """
    streamed = stream_model(donor)
    passage = Passage(streamed, ids)
    outputs = [states for _, states in passage.entering()]
    if depth:
        for index, block in each_block(streamed):
            outputs = [states for _, states in passage.through(index, block)]
            if index == depth:
                break
    made = torch.cat(outputs)[:, 1:].flatten(0, 1).float()
    if not made.isfinite().all():
        where = f"{donor.name}, behind its first {depth} blocks" if depth else f"{donor.name}, its embedding"
        raise fail(where, "finite states, to fit a gauge on", "NaN or Inf", "repair or replace the donor, or do without the gauge")
    return made


def _tokens(fit: str, donor: Checkpoint) -> Tensor:
    """Rows of tokens `[n, s]`, enough for a donor's width: uniformly random ones, or a text's."""
    width, vocabulary, positions = (quantity(donor.config, name) or 0 for name in ("width", "vocabulary", "positions"))
    length = min(LENGTH, positions or LENGTH)
    rows = max(LEAST_ROWS, math.ceil(PER_NEURON * width / length))
    if fit == "probes":
        return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    ids = load_tokenizer(donor)(Path(fit).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2 * max(width, length):
        raise fail(fit, f"a text of {2 * max(width, length):,} tokens at least", f"{len(ids):,}", "give a longer text, or fit: probes")
    ids = torch.tensor(ids[: rows * length])
    return ids[: len(ids) // length * length].view(-1, length)
