"""Fit the rotations that gauges ask for, on the donors' states for the same tokens."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import quantity
from frankenmerge.errors import fail
from frankenmerge.models.loading import load_model, load_tokenizer
from frankenmerge.models.passes import Passage
from frankenmerge.models.sampling import sample_tokens
from frankenmerge.models.streaming import each_block, stream_model, streamable
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.gauge_refining import donor_states, refined
from frankenmerge.splicing.resolve import Splice
from frankenmerge.splicing.rotation import Fit, Rotation, procrustes, residual

LENGTH = 64
LEAST_ROWS = 64
PER_NEURON = 8
"""Positions to fit on for every neuron: a rotation has half as many angles as it has entries."""
SAMPLED_ROWS, SAMPLED_LENGTH = 256, 128
"""Rows sampled from all donors together to refine gauges on, and at most as many of their text."""


def fitted_rotations(splice: Splice, progress: Progress = silent) -> dict[int, Fit]:
    """Fit the rotation of every slice that has a gauge, and refine those that ask for it.

    Towards the slice before, its last block's output and the input of the slice's first block are
    fitted; towards the base, both donors' states at the depth where the slice begins. A slice after
    a rotated one is rotated as that one is, too. Refined gauges are fitted and refined on tokens
    sampled from the slices' donors, and on those of their texts. Donors of a recipe to be refined
    are loaded whole, in float32.

    Args:
        splice: of a recipe with gauges.
        progress: of fits and descent.

    Returns:
        Fits by the number of their slice.

    Raises:
        FrankenmergeError: for a text that is too short, and for states that are not finite.
    """
    if not any(part.gauge and part.gauge.refine for part in splice.slices):
        return plain_fits(splice, progress=progress)
    donors = splice.donors
    models = {
        name: load_model(donors[name]).requires_grad_(False) for name in splice.recipe.tensor_donors
    }
    samplers = {part.sources[0].model: models[part.sources[0].model] for part in splice.slices}
    ids = tokens_to_refine_on(splice, samplers)
    fits = plain_fits(splice, ids, progress=progress)
    rotations = {number: fit.rotation for number, fit in fits.items()}
    found = refined(splice, models, rotations, donor_states(samplers, ids), progress=progress)
    return {number: fit._replace(refined=found.get(number, ())) for number, fit in fits.items()}


def plain_fits(
    splice: Splice, sampled: Tensor | None = None, *, progress: Progress = silent
) -> dict[int, Fit]:
    """The fits without descent; those to be refined use the tokens `sampled`, `[n, s]`."""
    fits: dict[int, Fit] = {}
    gauges = {number: part.gauge for number, part in enumerate(splice.slices) if part.gauge}
    with progress("fitting gauges", len(gauges), "gauges") as advance:
        for number, gauge in gauges.items():
            source = splice.slices[number].sources[0]
            donor, depth = splice.donors[source.model], source.layer_range[0]
            if gauge.to == "base":
                other, reached = splice.base, min(depth, splice.base.blocks)
            else:
                before = splice.slices[number - 1].sources[0]
                other, reached = splice.donors[before.model], before.layer_range[1]
            refines = sampled is not None and gauge.refine
            ids = sampled if refines and sampled is not None else _tokens(gauge.fit, donor)
            states = states_at(donor, ids, depth), states_at(other, ids, reached)
            fit = fit_rotation(*states, donor)
            if gauge.to == "previous" and (earlier := fits.get(number - 1)):
                matrix = fit.rotation.matrix @ earlier.rotation.matrix
                scale = fit.rotation.scale * earlier.rotation.scale
                fit = fit._replace(rotation=Rotation(matrix, scale))
            fits[number] = fit
            advance(1)
    return fits


def fit_rotation(source: Tensor, target: Tensor, donor: Checkpoint) -> Fit:
    """Fit on all positions `[n, d]`; the residual is that of a fit to the first three quarters."""
    centred, seen = donor.architecture.norm == "layer", 3 * len(source) // 4
    trial = procrustes(source[:seen], target[:seen], centred=centred)
    return Fit(
        procrustes(source, target, centred=centred), residual(trial, source[seen:], target[seen:])
    )


def states_at(donor: Checkpoint, ids: Tensor, depth: int) -> Tensor:
    """The residual stream after the donor's first `depth` blocks, `[n, d]`, in float32.

    The first position of every row is left out: trained models use it as an attention sink.
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
            f"{donor.name}, after its first {depth} blocks"
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


def tokens_to_refine_on(splice: Splice, models: Mapping[str, PreTrainedModel]) -> Tensor:
    """Rows of tokens `[n, s]`: sampled from every donor, and those of the refined gauges' texts."""
    length = min(
        [
            SAMPLED_LENGTH,
            *(
                quantity(splice.donors[name].config, "positions") or SAMPLED_LENGTH
                for name in models
            ),
        ]
    )
    tokenizer = load_tokenizer(splice.donors[next(iter(models))])
    start: Any = next(
        (token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None),
        0,
    )
    each = math.ceil(SAMPLED_ROWS / len(models))
    rows = [
        sample_tokens(model, each, length, start, seed)
        for seed, model in enumerate(models.values())
    ]
    for text in dict.fromkeys(
        part.gauge.fit
        for part in splice.slices
        if part.gauge and part.gauge.refine and part.gauge.fit != "probes"
    ):
        ids = _text_tokens(text, splice.donors[next(iter(models))], length)[
            : SAMPLED_ROWS * (length - 1)
        ]
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
            f"a text of at least {least:,} tokens",
            f"{len(ids):,}",
            "give a longer text, or fit: probes",
        )
    return torch.tensor(ids)
