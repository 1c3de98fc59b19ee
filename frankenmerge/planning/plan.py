"""From alignments to plans: the recipes with the least predicted damage, and their evidence."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.evidence import PlanRecord
from frankenmerge.artefacts.recipe import Block, Recipe, Seam, recipe_of
from frankenmerge.errors import Fault, fail, raise_all
from frankenmerge.planning.gauges import Pair, rotated_where_needed, with_gauges
from frankenmerge.planning.prediction import (
    DamageModel,
    States,
    default_model,
    features,
    seam_damage,
)
from frankenmerge.planning.seams import SeamEvidence, seam_evidence
from frankenmerge.planning.search import Constraints, Route, cheapest_by_depth, cheapest_routes
from frankenmerge.planning.states import states_of

POOL = 256
"""Number of recipes with the smallest sums of seam costs whose total damage is predicted."""
DIVERSE_POOL = 20_000
"""Number of recipes that are searched for different ones."""


class Plan(NamedTuple):
    """A recipe and its predicted damage."""

    recipe: Recipe
    predicted_damage: float
    """Nats per token above the donors' own losses, weighted by their shares of the blocks."""
    interval: tuple[float, float]
    """90 % interval of the measured damage."""
    seams: list[SeamEvidence]
    basis: str = "scores"
    """The basis of the prediction: `scores`, or `drawn` if the splice was run on tokens that the
    donors generated.
    """
    measured: float | None = None
    """Damage measured on a text, if the plan was verified on one."""

    def record(self, key: str | None = None) -> PlanRecord:
        """The plan as in its file; `key` identifies the recipe with its donors."""
        return PlanRecord.of(
            recipe=self.recipe.model_dump(exclude_none=True),
            summary=str(self.recipe),
            key=key,
            depth=len(self.recipe.blocks),
            predicted_damage=self.predicted_damage,
            interval=self.interval,
            basis=self.basis,
            measured_damage=self.measured,
            seams=[seam.record() for seam in self.seams],
        )

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON."""
        return self.record().as_json()


class _PlanInputs(NamedTuple):
    """What plans are computed from."""

    names: list[str]
    lengths: list[int]
    directed: dict[tuple[int, int], Alignment]
    """By (donor left, donor entered)."""
    states: States
    costs: dict[tuple[int, int], np.ndarray]
    model: DamageModel
    gauged: frozenset[Pair]
    """Pairs of donors that have no common basis, but a rotation into one."""


def plan(
    alignments: list[Alignment],
    constraints: Constraints,
    *,
    top: int = 1,
    differ: int = 0,
    model: DamageModel | None = None,
) -> list[Plan]:
    """Return the recipes of all donors with the least predicted damage, the best first.

    A seam can lead from one donor to another, in either direction, if there is an alignment of the
    two, and within one donor if there is an alignment of the donor with itself. The exact search
    finds the `POOL` recipes with the smallest sums of seam costs; those are ranked by the predicted
    damage of each whole recipe.

    Args:
        alignments: of pairs of donors, each pair once.
        constraints: what every recipe must satisfy.
        top: how many to return.
        differ: in how many blocks each must differ from all better ones.
        model: predicts the damage; by default the one in the package.

    Raises:
        FrankenmergeError: if the alignments contradict each other, or if no recipe satisfies the
            constraints.
    """
    inputs = _inputs(alignments, model or default_model())
    numbered = _numbered(constraints, inputs)
    routes = cheapest_routes(
        inputs.lengths, inputs.costs, numbered, most=DIVERSE_POOL if differ else max(POOL, top)
    )
    chosen = list(islice(_different(routes, differ), top) if differ else routes)
    if not chosen:
        required = ", ".join(
            f"{key.replace('_', '-')} {value}" for key, value in constraints.as_json().items()
        )
        blocks = ", ".join(
            f"{name} ({count} blocks)"
            for name, count in zip(inputs.names, inputs.lengths, strict=True)
        )
        remedy = "ask for another depth, more seams, shorter slices or fewer protected blocks"
        raise fail(
            "plan",
            f"a recipe of all donors that satisfies {required}",
            f"none from {blocks}",
            remedy,
        )
    return _plans(chosen, inputs, top)


def front(
    alignments: list[Alignment], constraints: Constraints, *, model: DamageModel | None = None
) -> list[Plan]:
    """Return for every depth up to that of `constraints` the plan with the least sum of seam costs.

    Depths without a plan are omitted.
    """
    inputs = _inputs(alignments, model or default_model())
    routes = cheapest_by_depth(inputs.lengths, inputs.costs, _numbered(constraints, inputs))
    return sorted(
        _plans(list(routes.values()), inputs, len(routes)),
        key=lambda entry: len(entry.recipe.blocks),
    )


def spread_splices(
    alignments: list[Alignment], count: int, *, model: DamageModel | None = None
) -> list[Recipe]:
    """Return `count` splices of one seam, from the least to the most predicted damage.

    Their measured damage calibrates a model.
    """
    inputs = _inputs(alignments, model or default_model())
    splices = sorted(
        (float(cost[i, j]), pair, i, j)
        for pair, cost in inputs.costs.items()
        for i, j in np.ndindex(cost.shape)
        if i and j < cost.shape[1] - 1 and (pair[0] != pair[1] or i != j)
    )
    recipes = []
    for place in np.linspace(0, len(splices) - 1, min(count, len(splices))).round().astype(int):
        _, (left, entered), i, j = splices[place]
        after = [Block(inputs.names[entered], index) for index in range(j, inputs.lengths[entered])]
        recipes.append(recipe_of([Block(inputs.names[left], index) for index in range(i)] + after))
    return recipes


def _inputs(alignments: list[Alignment], model: DamageModel) -> _PlanInputs:
    donors = _donors(alignments)
    alignments, gauged = rotated_where_needed(alignments)
    names = list(donors)
    directed = {
        (names.index(a), names.index(b)): alignment
        for (a, b), alignment in by_direction(alignments).items()
    }
    states = states_of(alignments)
    costs = {(a, b): seam_damage(model, states, names[a], names[b]) for a, b in directed}
    return _PlanInputs(names, list(donors.values()), directed, states, costs, model, gauged)


def by_direction(alignments: Sequence[Alignment]) -> dict[tuple[str, str], Alignment]:
    """Alignments by (donor left, donor entered). Raises FrankenmergeError for a repeated pair."""
    directed = {}
    for alignment in alignments:
        a, b = alignment.donors
        if (a, b) in directed:
            raise fail(
                " | ".join(alignment.donors),
                "one alignment of a pair",
                "several",
                "give each pair once",
            )
        directed[a, b] = alignment
        directed.setdefault((b, a), alignment.transposed)
    return directed


def _numbered(constraints: Constraints, inputs: _PlanInputs) -> Constraints:
    """The constraints with numbers in place of the donors' names."""
    named = {
        *(donor for donor, _ in constraints.required | constraints.avoided),
        *constraints.shares,
    }
    raise_all(
        Fault(
            "plan",
            f"a donor of the alignments: {', '.join(inputs.names)}",
            name,
            "use the name in the alignment",
        )
        for name in sorted(named - set(inputs.names))
    )
    number = {name: index for index, name in enumerate(inputs.names)}
    blocks = [(number[donor], block) for donor, block in constraints.required | constraints.avoided]
    raise_all(
        Fault(
            "plan",
            f"a block of {inputs.names[donor]}: 0 to {inputs.lengths[donor] - 1}",
            str(block),
            "correct the block",
        )
        for donor, block in blocks
        if not 0 <= block < inputs.lengths[donor]
    )
    return replace(
        constraints,
        required=frozenset((number[donor], block) for donor, block in constraints.required),
        avoided=frozenset((number[donor], block) for donor, block in constraints.avoided),
        shares={number[donor]: share for donor, share in constraints.shares.items()},
    )


def _different(routes: Iterator[Route], differ: int) -> Iterator[Route]:
    """Routes that differ from all earlier ones in at least `differ` blocks."""
    kept: list[Counter] = []
    for route in routes:
        blocks = Counter(
            (run.donor, block) for run in route.runs for block in range(run.start, run.stop)
        )
        if all((blocks - other).total() >= differ for other in kept):
            kept.append(blocks)
            yield route


def _plans(routes: list[Route], inputs: _PlanInputs, top: int) -> list[Plan]:
    """Predict the damage of whole recipes, and return the `top` of them, the best first."""
    recipes = [
        recipe_of(
            [
                Block(inputs.names[run.donor], index)
                for run in route.runs
                for index in range(run.start, run.stop)
            ]
        )
        for route in routes
    ]
    damage = inputs.model.damage(features([recipe.blocks for recipe in recipes], inputs.states))
    damage[[not recipe.seams for recipe in recipes]] = 0.0
    return [
        _plan_of(recipes[index], routes[index], float(damage[index]), inputs)
        for index in np.argsort(damage, kind="stable")[:top]
    ]


def _donors(alignments: list[Alignment]) -> dict[str, int]:
    """Blocks of every donor by name, in order of appearance."""
    donors: dict[str, int] = {}
    fingerprints: dict[str, str] = {}
    for alignment in alignments:
        for name, fingerprint, blocks in zip(
            alignment.donors, alignment.fingerprints, alignment.blocks, strict=True
        ):
            if fingerprints.setdefault(name, fingerprint) != fingerprint:
                raise fail(
                    name,
                    "the same donor in every alignment",
                    "two different checkpoints of this name",
                    "align the donors again",
                )
            donors[name] = blocks
    return donors


def _plan_of(recipe: Recipe, route: Route, damage: float, inputs: _PlanInputs) -> Plan:
    seams = []
    for left, entered in zip(route.runs, route.runs[1:], strict=False):
        pair = left.donor, entered.donor
        seam = Seam(
            Block(inputs.names[left.donor], left.stop - 1),
            Block(inputs.names[entered.donor], entered.start),
        )
        cost = float(inputs.costs[pair][left.stop, entered.start])
        gauged = frozenset(inputs.names[donor] for donor in pair) in inputs.gauged
        seams.append(
            seam_evidence(
                seam, inputs.directed[pair], left.stop, entered.start, cost, gauged=gauged
            )
        )
    return Plan(
        with_gauges(recipe, inputs.gauged),
        damage,
        inputs.model.interval(damage) if seams else (0.0, 0.0),
        seams,
    )
