"""Plans that are calibrated, verified and damped: what joins planning and evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from frankenmerge.artefacts import evidence as artefact
from frankenmerge.artefacts.alignment import Alignment, need_language_alignments
from frankenmerge.artefacts.evidence import Evidence
from frankenmerge.artefacts.recipe import key_of
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.planning.damping import dampings
from frankenmerge.planning.evidence import evidence_of
from frankenmerge.planning.plan import Plan, front, plan, spread_splices
from frankenmerge.planning.prediction import DamageModel, default_model, features, refined
from frankenmerge.planning.search import Constraints
from frankenmerge.planning.states import states_of
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.opening import open_donor
from frankenmerge.splicing.result import depth_within
from frankenmerge.storage.atomic import write_file

if TYPE_CHECKING:
    from frankenmerge.models.loading import Placement
    from frankenmerge.workflows.measuring import Measure, On

SAMPLED = "sampled"
"""Given instead of texts: tokens that the donors generate themselves."""
CALIBRATION_SPLICES = 16
"""Splices measured to calibrate the prediction."""


@dataclass(frozen=True)
class PlanOptions:
    """How plans are made of alignments."""

    constraints: Constraints
    top: int = 1
    """How many plans to return."""
    differ: int = 0
    """In how many blocks each must differ from all that are better."""
    calibrate: "On | None" = None
    """Measure a few splices on this, and predict by them."""
    verify: "On | None" = None
    """Measure the plans on this, and rank them by it."""
    damp: "On | None" = None
    """Scale what repeated blocks write, where that loses less on this, and rank plans by it."""
    placement: "Placement | None" = None
    """In which type models compute, and where; float32 on the CPU by default."""
    download: bool = False
    allow_pickle: bool = False


class Damped(NamedTuple):
    """What damping did to the best plan."""

    kept: str | None
    """The way of damping that lost least; None where the plan as it is loses less."""
    damage: dict[str, float]
    """Nats per token, by way of damping; `none` for the plan as it is."""


class Planned(NamedTuple):
    """Plans, the best first, and what they rest on."""

    plans: list[Plan]
    model: DamageModel
    damped: Damped | None
    evidence: Evidence
    """Plans, constraints and model, as they are written next to the recipe."""
    remarks: tuple[str, ...] = ()
    """Worth knowing about the donors of the plans; only where donors were opened."""


def plan_recipes(
    alignments: Sequence[Alignment],
    options: PlanOptions,
    *,
    opened: Mapping[str, Checkpoint] | None = None,
    progress: Progress = silent,
) -> Planned:
    """Choose the recipes that are predicted, or measured, to do the least damage.

    Args:
        alignments: of pairs of donors, each pair once.
        options: constraints, and what to measure on.
        opened: donors that are open already, by name.
        progress: of everything that is measured.

    Raises:
        FrankenmergeError: when no recipe satisfies the constraints, or donors cannot be opened.
    """
    need_language_alignments(alignments)
    model, measure = default_model(), None
    if any(on is not None for on in (options.calibrate, options.verify, options.damp)):
        measure = _measure(alignments, options, opened, progress)
    if measure and options.calibrate is not None:
        model = calibrated(alignments, measure, options.calibrate)
    plans = plan(
        list(alignments),
        options.constraints,
        top=options.top,
        differ=options.differ,
        model=model,
    )
    if measure and options.verify is not None:
        plans = verified(plans, measure, options.verify, model)
    tried = None
    if measure and options.damp is not None:
        plans, tried = damped(plans, alignments, measure, options.damp, model)
    remarks = measure.remarks([entry.recipe for entry in plans]) if measure else ()
    evidence = _evidence(plans, alignments, options, model)
    return Planned(plans, model, tried, evidence, remarks)


def _measure(
    alignments: Sequence[Alignment],
    options: PlanOptions,
    opened: Mapping[str, Checkpoint] | None,
    progress: Progress,
) -> "Measure":
    """What measures; it imports torch, which plans by scores alone do without."""
    from frankenmerge.models.loading import CPU
    from frankenmerge.workflows.measuring import Measure

    return Measure(
        alignments,
        placement=options.placement or CPU,
        download=options.download,
        allow_pickle=options.allow_pickle,
        opened=opened,
        progress=progress,
    )


def least_damage_by_depth(
    alignments: Sequence[Alignment], constraints: Constraints, model: DamageModel
) -> list[Plan]:
    """The plan with the least predicted damage of every depth up to the one asked for."""
    return front(list(alignments), constraints, model=model)


def depth_for(
    parameters: int,
    alignments: Sequence[Alignment],
    opened: Mapping[str, Checkpoint] | None = None,
    *,
    download: bool = False,
) -> int:
    """The most blocks that a parameter budget allows, besides embedding, final norm and head."""
    known = opened or {}
    names = dict.fromkeys(name for alignment in alignments for name in alignment.donors)
    donors = [known.get(name) or open_donor(name, download=download) for name in names]
    return depth_within(parameters, donors)


def write_plans(planned: Planned, output: Path) -> list[Path]:
    """Write the best recipe to `output`, others to NAME.2.yaml and so on, and the evidence of all.

    The evidence is in NAME.evidence.json. Returns the recipes' paths.
    """
    paths = recipe_paths(output, len(planned.plans))
    for path, entry in zip(paths, planned.plans, strict=True):
        write_file(path, entry.recipe.dump().encode())
    artefact.save(planned.evidence, artefact.evidence_path(output))
    return paths


def recipe_paths(output: Path, count: int) -> list[Path]:
    """Where `count` recipes are written: `output`, NAME.2.yaml and so on."""
    others = (f"{output.stem}.{rank}{output.suffix}" for rank in range(2, count + 1))
    return [output, *(output.with_name(name) for name in others)]


def calibrated(alignments: Sequence[Alignment], measure: "Measure", on: "On") -> DamageModel:
    """The default model, refined by a few measured splices of these donors."""
    recipes = spread_splices(list(alignments), CALIBRATION_SPLICES)
    found = features([recipe.blocks for recipe in recipes], states_of(alignments))
    texts = [SAMPLED] if isinstance(on, str) else [text.name for text in on]
    origin: dict[str, Any] = {
        "refined": default_model().origin,
        "texts": texts,
        "splices": len(recipes),
    }
    return refined(default_model(), found, np.array(measure.damage(recipes, on)), origin)


def verified(plans: list[Plan], measure: "Measure", on: "On", model: DamageModel) -> list[Plan]:
    """The plans with their measured damage, the best first.

    On sampled tokens that is a better prediction, on a text the truth.
    """
    damage = measure.damage([entry.recipe for entry in plans], on)
    ranked = sorted(zip(plans, damage, strict=True), key=lambda pair: pair[1])
    return [_with_damage(entry, value, on, model, measure) for entry, value in ranked]


def _with_damage(
    entry: Plan, damage: float, on: "On", model: DamageModel, measure: "Measure"
) -> Plan:
    if on == SAMPLED:
        interval = model.interval(damage, sampled=True, disagreement=measure.disagreement)
        return entry._replace(predicted_damage=damage, interval=interval, basis="drawn")
    return entry._replace(measured=damage)


def damped(
    plans: list[Plan],
    alignments: Sequence[Alignment],
    measure: "Measure",
    on: "On",
    model: DamageModel,
) -> tuple[list[Plan], Damped]:
    """The plans, repeated blocks damped the way that loses least, if any does; the best first.

    What was tried on the best is returned, too. On a text the prediction, which knows of no
    damping, is changed by what damping gained there.
    """
    ways = []
    for entry in plans:
        stream = measure.donors[entry.recipe.base].architecture.stream
        # A norm after a block's maps undoes what they are scaled by.
        scales = stream is not None and not stream.output_norms
        found = dampings(entry.recipe, list(alignments), stream.writes) if stream and scales else []
        ways.append({"none": entry.recipe, **{way.name: way.recipe for way in found}})
    measured = iter(measure.damage([recipe for each in ways for recipe in each.values()], on))
    ranked = []
    for entry, recipes in zip(plans, ways, strict=True):
        damage = {name: next(measured) for name in recipes}
        best = min(damage, key=damage.__getitem__)
        predicted = max(0.0, entry.predicted_damage + damage[best] - damage["none"])
        changed = entry._replace(
            recipe=recipes[best],
            predicted_damage=predicted,
            interval=model.interval(predicted, sampled=entry.basis == "drawn"),
        )
        made = _with_damage(changed, damage[best], on, model, measure)
        ranked.append((damage[best], made, Damped(None if best == "none" else best, damage)))
    ranked.sort(key=lambda each: each[0])
    return [entry for _, entry, _ in ranked], ranked[0][2]


def _evidence(
    plans: list[Plan],
    alignments: Sequence[Alignment],
    options: PlanOptions,
    model: DamageModel,
) -> Evidence:
    prints = {
        name: fingerprint
        for alignment in alignments
        for name, fingerprint in zip(alignment.donors, alignment.fingerprints, strict=True)
    }
    keys = [key_of(entry.recipe, prints) for entry in plans]
    return evidence_of(plans, options.constraints, model, keys)
