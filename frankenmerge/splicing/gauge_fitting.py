"""The rotations that a recipe's gauges ask for: donors run block by block on the same tokens, their states brought together."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import quantity
from frankenmerge.errors import fail
from frankenmerge.models.loading import load_model, load_tokenizer
from frankenmerge.models.sampling import drawn
from frankenmerge.models.streaming import Passage, each_block, stream_model, streamable
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.gauge_refining import refined, show
from frankenmerge.splicing.rotation import Rotation, procrustes, residual

LENGTH = 64
LEAST_ROWS = 64
PER_NEURON = 8
"""Positions to fit on for every neuron: a rotation has half as many angles as it has entries."""
SAMPLED_ROWS, SAMPLED_LENGTH = 256, 128
"""What refined gauges are fitted on: rows drawn from all donors together, and of their text as many
at most.
"""


class Fit(NamedTuple):
    """A fitted rotation, and how well it does."""

    rotation: Rotation
    residual: float
    """Share of the target's squared length that is left over on tokens that the fit has not seen: 1
    minus R^2.
    """
    refined: tuple[Rotation, ...] = ()
    """Where descent followed: a rotation for every block of the slice, and of the last slice one for
    final norm and head.
    """

    def at(self, place: int) -> Rotation:
        """The rotation of the slice's block `place`, of the embedding at 0, of final norm and head at -1."""
        return self.refined[place] if self.refined else self.rotation


def fitted_rotations(
    recipe: Recipe, donors: Mapping[str, Checkpoint], progress: Progress = silent
) -> dict[int, Fit]:
    """Fit the rotation of every slice that has a gauge, by the slice's number, and refine those that ask for it.

    Towards the slice before, its last block's output and the input of the slice's first block are
    fitted; towards the base, both donors' states at the depth where the slice begins. A slice
    behind a rotated one is rotated as that one is, too. Refined gauges are fitted and refined on
    tokens drawn from the slices' donors, and on those of their texts.

    Args:
        recipe: spelled out.
        donors: by name; those of a recipe to be refined are loaded whole, in float32.
        progress: shows how far fits and descent are.

    Raises:
        FrankenmergeError: for a text that is too short, for states that are not finite, and for
            weights that are no model's.
    """
    if not any(part.gauge and part.gauge.refine for part in recipe.parts):
        return plain_fits(recipe, donors, progress=progress)
    models = {name: load_model(donors[name]).requires_grad_(False) for name in recipe.tensor_donors}
    speakers = {part.sources[0].model: models[part.sources[0].model] for part in recipe.parts}
    ids = tokens_to_refine_on(recipe, donors, speakers)
    fits = plain_fits(recipe, donors, ids, progress=progress)
    shown = show(speakers, ids)
    found = refined(
        recipe,
        donors,
        models,
        {number: fit.rotation for number, fit in fits.items()},
        shown,
        progress=progress,
    )
    return {number: fit._replace(refined=found.get(number, ())) for number, fit in fits.items()}


def plain_fits(
    recipe: Recipe,
    donors: Mapping[str, Checkpoint],
    shown: Tensor | None = None,
    *,
    progress: Progress = silent,
) -> dict[int, Fit]:
    """The fits without descent; those that descent is to follow are made on the tokens `shown`, `[n, s]`."""
    fits: dict[int, Fit] = {}
    gauges = {number: part.gauge for number, part in enumerate(recipe.parts) if part.gauge}
    with progress("fitting gauges", len(gauges), "gauges") as advance:
        for number, gauge in gauges.items():
            source = recipe.parts[number].sources[0]
            depth = source.layer_range[0]
            if gauge.to == "base":
                name, reached = recipe.base, min(depth, donors[recipe.base].blocks)
            else:
                before = recipe.parts[number - 1].sources[0]
                name, reached = before.model, before.layer_range[1]
            ids = (
                shown
                if shown is not None and gauge.refine
                else _tokens(gauge.fit, donors[source.model])
            )
            fit = fit_rotation(
                states_at(donors[source.model], ids, depth),
                states_at(donors[name], ids, reached),
                donors[source.model],
            )
            if gauge.to == "previous" and (other := fits.get(number - 1)):
                fit = fit._replace(
                    rotation=Rotation(
                        fit.rotation.matrix @ other.rotation.matrix,
                        fit.rotation.scale * other.rotation.scale,
                    )
                )
            fits[number] = fit
            advance(1)
    return fits


def fit_rotation(source: Tensor, target: Tensor, donor: Checkpoint) -> Fit:
    """Fit on all positions of both `[n, d]`, and tell what the fit of the first three quarters leaves over on the last."""
    centred, seen = donor.architecture.norm == "layer", 3 * len(source) // 4
    trial = procrustes(source[:seen], target[:seen], centred=centred)
    return Fit(
        procrustes(source, target, centred=centred), residual(trial, source[seen:], target[seen:])
    )


def states_at(donor: Checkpoint, ids: Tensor, depth: int) -> Tensor:
    """The residual stream behind the donor's first `depth` blocks, `[n, d]`, in float32.

    The first position of every row is left out: what a trained model puts there is no token's own.
    Raises FrankenmergeError for states that are not finite.
    """
    run = stream_model(donor) if streamable(donor) else load_model(donor)
    passage = Passage(run, ids)
    outputs = [states for _, states in passage.entering()]
    if depth:
        for index, block in each_block(run):
            outputs = [states for _, states in passage.through(index, block)]
            if index == depth:
                break
    made = torch.cat(outputs)[:, 1:].flatten(0, 1).float()
    if not made.isfinite().all():
        where = (
            f"{donor.name}, behind its first {depth} blocks"
            if depth
            else f"{donor.name}, its embedding"
        )
        raise fail(
            where,
            "finite states, to fit a gauge on",
            "NaN or Inf",
            "repair or replace the donor, or do without the gauge",
        )
    return made


def tokens_to_refine_on(
    recipe: Recipe, donors: Mapping[str, Checkpoint], models: Mapping[str, PreTrainedModel]
) -> Tensor:
    """Rows of tokens `[n, s]`: drawn from every donor behind the token that begins a text, and those of the refined gauges' texts."""
    length = min(
        [
            SAMPLED_LENGTH,
            *(quantity(donors[name].config, "positions") or SAMPLED_LENGTH for name in models),
        ]
    )
    tokenizer = load_tokenizer(donors[next(iter(models))])
    start: Any = next(
        (token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None),
        0,
    )
    each = math.ceil(SAMPLED_ROWS / len(models))
    rows = [drawn(model, each, length, start, seed) for seed, model in enumerate(models.values())]
    for text in dict.fromkeys(
        part.gauge.fit
        for part in recipe.parts
        if part.gauge and part.gauge.refine and part.gauge.fit != "probes"
    ):
        ids = _text_tokens(text, donors[next(iter(models))], length)[: SAMPLED_ROWS * (length - 1)]
        cut = ids[: len(ids) // (length - 1) * (length - 1)].view(-1, length - 1)
        rows.append(torch.cat([torch.full((len(cut), 1), start), cut], 1))
    return torch.cat(rows)


def _tokens(fit: str, donor: Checkpoint) -> Tensor:
    """Rows of tokens `[n, s]`, enough for a donor's width: uniformly random ones, or a text's."""
    width, vocabulary, positions = (
        quantity(donor.config, name) or 0 for name in ("width", "vocabulary", "positions")
    )
    length = min(LENGTH, positions or LENGTH)
    rows = max(LEAST_ROWS, math.ceil(PER_NEURON * width / length))
    if fit == "probes":
        return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    ids = _text_tokens(fit, donor, length)[: rows * length]
    return ids[: len(ids) // length * length].view(-1, length)


def _text_tokens(text: str, donor: Checkpoint, length: int) -> Tensor:
    """A text's tokens; there are enough for a donor's width, and for two rows of `length`."""
    ids = load_tokenizer(donor)(
        Path(text).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False
    )["input_ids"]
    least = 2 * max(quantity(donor.config, "width") or 0, length)
    if len(ids) < least:
        raise fail(
            text,
            f"a text of {least:,} tokens at least",
            f"{len(ids):,}",
            "give a longer text, or fit: probes",
        )
    return torch.tensor(ids)
