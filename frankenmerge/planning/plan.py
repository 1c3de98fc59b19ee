"""From alignments to plans: the recipes predicted to do the least damage, each with the evidence for every seam."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.evidence import NeuronRecord, PlanRecord, SeamBlockRecord, SeamRecord
from frankenmerge.artefacts.recipe import Block, Recipe, Seam, recipe_of
from frankenmerge.errors import Fault, fail, raise_all
from frankenmerge.planning.gauges import Pair, judged, with_gauges
from frankenmerge.planning.prediction import Model, States, default_model, features, seam_damage
from frankenmerge.planning.search import Constraints, Path, cheapest_by_depth, cheapest_paths
from frankenmerge.planning.states import states_of

SHOWN = 5
"""How many agreeing and disagreeing neurons the evidence names."""
POOL = 256
"""Recipes of the least summed seam costs that are judged as a whole."""
DIVERSE = 20_000
"""Recipes that are looked through for such as differ."""


@dataclass(frozen=True)
class SeamEvidence:
    """Why a seam costs what it costs."""

    seam: Seam
    cost: float
    """Nats per token that a recipe with this seam alone is predicted to lose."""
    skipped: int
    """Blocks jumped over; negative when blocks are gone through again."""
    scores: dict[str, float]
    nulls: dict[str, dict[str, float]]
    """Per score, what it would be under each null."""
    agree: list[dict[str, Any]]
    """The neurons with the highest score: neuron, its scores, each donor's best tokens, and those
    that both have.

    A search that left a neuron out gives it no score.
    """
    disagree: list[dict[str, Any]]
    gauged: bool = False
    """Whether the recipe brings the two donors into one basis."""

    @property
    def by_chance(self) -> bool:
        """Whether the donors' tokens agree here at most twice as often as those of unrelated neurons."""
        return self.scores["jaccard"] <= 2 * self.nulls["jaccard"]["permuted_neurons"]

    def record(self) -> SeamRecord:
        """The evidence as the plan's file holds it."""
        after, before = (
            SeamBlockRecord(model=block.model, block=block.index) for block in self.seam
        )
        return SeamRecord(
            after=after,
            before=before,
            cost=self.cost,
            skipped_blocks=self.skipped,
            by_chance=self.by_chance,
            gauged=self.gauged,
            scores=self.scores,
            nulls=self.nulls,
            agree=[NeuronRecord.model_validate(neuron) for neuron in self.agree],
            disagree=[NeuronRecord.model_validate(neuron) for neuron in self.disagree],
        )

    def as_json(self) -> dict[str, Any]:
        """The evidence as JSON; block numbers are 0-based, as in the recipe."""
        return self.record().as_json()


class Plan(NamedTuple):
    """A recipe and what is predicted of it."""

    recipe: Recipe
    predicted_damage: float
    """Nats per token above the donors' own loss, each donor's by its share of the blocks."""
    interval: tuple[float, float]
    """Where nine of ten measured damages are expected around it."""
    seams: list[SeamEvidence]
    basis: str = "scores"
    """What the prediction rests on: `scores`, or `drawn` where the splice was run on tokens that
    the donors drew.
    """
    measured: float | None = None
    """Damage measured on a text, where the plan was verified on one."""

    def record(self, key: str | None = None) -> PlanRecord:
        """The plan as its file holds it; `key` identifies the recipe with its donors."""
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


class _Task(NamedTuple):
    """What plans are made of."""

    names: list[str]
    lengths: list[int]
    directed: dict[tuple[int, int], Alignment]
    """By (donor left, donor entered)."""
    states: States
    costs: dict[tuple[int, int], np.ndarray]
    model: Model
    gauged: frozenset[Pair]
    """Pairs of donors that share no basis, but a gauge."""


def plan(
    alignments: list[Alignment],
    constraints: Constraints,
    *,
    top: int = 1,
    differ: int = 0,
    model: Model | None = None,
) -> list[Plan]:
    """Return the `top` recipes that use every donor of the alignments and are predicted to do the least damage, the best first.

    Seams lead from one donor to another wherever an alignment of the two is given, either way;
    within one donor where its alignment with itself is given. The exact search finds the `POOL`
    recipes of the least summed costs of seams; those are ranked by the damage that is predicted of
    each as a whole.

    Args:
        alignments: of pairs of donors, each pair once.
        constraints: what every recipe keeps to.
        top: how many to return.
        differ: in how many blocks each must differ from all that are better.
        model: what predicts; the default that comes with the package.

    Raises:
        FrankenmergeError: when the alignments contradict each other, or no recipe keeps to the
            constraints.
    """
    task = _task(alignments, model or default_model())
    numbered = _numbered(constraints, task)
    paths = cheapest_paths(
        task.lengths, task.costs, numbered, most=DIVERSE if differ else max(POOL, top)
    )
    chosen = list(islice(_different(paths, differ), top) if differ else paths)
    if not chosen:
        kept = ", ".join(
            f"{key.replace('_', '-')} {value}" for key, value in constraints.as_json().items()
        )
        blocks = ", ".join(
            f"{name} ({count} blocks)" for name, count in zip(task.names, task.lengths, strict=True)
        )
        remedy = "ask for another depth, more seams, shorter slices or fewer protected blocks"
        raise fail(
            "plan",
            f"a recipe of all donors that keeps to {kept}",
            f"none can be made of {blocks}",
            remedy,
        )
    return _plans(chosen, task, top)


def front(
    alignments: list[Alignment], constraints: Constraints, *, model: Model | None = None
) -> list[Plan]:
    """Return, for every depth up to the one asked for, the plan of the least summed seam costs: depth against damage."""
    task = _task(alignments, model or default_model())
    found = cheapest_by_depth(task.lengths, task.costs, _numbered(constraints, task))
    return sorted(
        _plans(list(found.values()), task, len(found)), key=lambda entry: len(entry.recipe.blocks)
    )


def spread_splices(
    alignments: list[Alignment], count: int, *, model: Model | None = None
) -> list[Recipe]:
    """Return `count` splices of one seam, from the least to the most damage predicted: what to measure to calibrate a model by."""
    task = _task(alignments, model or default_model())
    found = sorted(
        (float(cost[i, j]), pair, i, j)
        for pair, cost in task.costs.items()
        for i, j in np.ndindex(cost.shape)
        if i and j < cost.shape[1] - 1 and (pair[0] != pair[1] or i != j)
    )
    recipes = []
    for place in np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int):
        _, (left, entered), i, j = found[place]
        after = [Block(task.names[entered], index) for index in range(j, task.lengths[entered])]
        recipes.append(recipe_of([Block(task.names[left], index) for index in range(i)] + after))
    return recipes


def _task(alignments: list[Alignment], model: Model) -> _Task:
    donors = _donors(alignments)
    alignments, gauged = judged(alignments)
    names = list(donors)
    directed = {
        (names.index(a), names.index(b)): alignment
        for (a, b), alignment in between(alignments).items()
    }
    states = states_of(alignments)
    costs = {(a, b): seam_damage(model, states, names[a], names[b]) for a, b in directed}
    return _Task(names, list(donors.values()), directed, states, costs, model, gauged)


def between(alignments: Sequence[Alignment]) -> dict[tuple[str, str], Alignment]:
    """Alignments by (donor left, donor entered). Raises FrankenmergeError where a pair is given twice."""
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


def _numbered(constraints: Constraints, task: _Task) -> Constraints:
    """The constraints with donors as the search numbers them."""
    named = {
        *(donor for donor, _ in constraints.required | constraints.avoided),
        *constraints.shares,
    }
    raise_all(
        Fault(
            "plan",
            f"a donor of the alignments: {', '.join(task.names)}",
            name,
            "name it as `align` did",
        )
        for name in sorted(named - set(task.names))
    )
    number = {name: index for index, name in enumerate(task.names)}
    blocks = [(number[donor], block) for donor, block in constraints.required | constraints.avoided]
    raise_all(
        Fault(
            "plan",
            f"a block of {task.names[donor]}: 0 to {task.lengths[donor] - 1}",
            str(block),
            "correct the block",
        )
        for donor, block in blocks
        if not 0 <= block < task.lengths[donor]
    )
    return replace(
        constraints,
        required=frozenset((number[donor], block) for donor, block in constraints.required),
        avoided=frozenset((number[donor], block) for donor, block in constraints.avoided),
        shares={number[donor]: share for donor, share in constraints.shares.items()},
    )


def _different(paths: Iterator[Path], differ: int) -> Iterator[Path]:
    """Paths that differ from every earlier one in `differ` blocks or more."""
    kept: list[Counter] = []
    for path in paths:
        blocks = Counter(
            (piece.donor, block)
            for piece in path.pieces
            for block in range(piece.start, piece.stop)
        )
        if all((blocks - other).total() >= differ for other in kept):
            kept.append(blocks)
            yield path


def _plans(paths: list[Path], task: _Task, top: int) -> list[Plan]:
    """Judge whole recipes, and give the `top` of them in the order of what is predicted."""
    recipes = [
        recipe_of(
            [
                Block(task.names[piece.donor], index)
                for piece in path.pieces
                for index in range(piece.start, piece.stop)
            ]
        )
        for path in paths
    ]
    damage = task.model.damage(features([recipe.blocks for recipe in recipes], task.states))
    damage[[not recipe.seams for recipe in recipes]] = 0.0
    return [
        _plan_of(recipes[index], paths[index], float(damage[index]), task)
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


def _plan_of(recipe: Recipe, path: Path, damage: float, task: _Task) -> Plan:
    seams = []
    for left, entered in zip(path.pieces, path.pieces[1:], strict=False):
        pair = left.donor, entered.donor
        seam = Seam(
            Block(task.names[left.donor], left.stop - 1),
            Block(task.names[entered.donor], entered.start),
        )
        cost = float(task.costs[pair][left.stop, entered.start])
        evidence = _evidence(seam, task.directed[pair], left.stop, entered.start, cost)
        seams.append(
            replace(evidence, gauged=frozenset(task.names[donor] for donor in pair) in task.gauged)
        )
    return Plan(
        with_gauges(recipe, task.gauged),
        damage,
        task.model.interval(damage) if seams else (0.0, 0.0),
        seams,
    )


def _evidence(
    seam: Seam, alignment: Alignment, left: int, entered: int, cost: float
) -> SeamEvidence:
    scores = {
        name: round(float(score.matrix[left, entered]), 4)
        for name, score in alignment.scores.items()
    }
    nulls = {
        name: {null: round(float(matrix[left, entered]), 4) for null, matrix in score.nulls.items()}
        for name, score in alignment.scores.items()
    }
    detail = {
        name: score.detail[left, entered].astype(np.float32)
        for name, score in alignment.scores.items()
        if score.detail.shape[2]
    }
    # Many neurons tie on the tokens; among those the correlation tells which agree most.
    ranked = np.lexsort((detail["correlation"], detail["jaccard"]))

    def told(neuron: int) -> dict[str, Any]:
        a, b = (
            table[block, neuron].tolist()
            for table, block in zip(alignment.tokens, (left, entered), strict=True)
        )
        texts = {"tokens": [a[:4], b[:4]], "shared": [[token for token in a if token in b]]}
        named = {
            key: [[alignment.vocabulary[token] for token in part] for part in parts]
            for key, parts in texts.items()
        }
        values = {
            name: round(float(values[neuron]), 4)
            for name, values in detail.items()
            if not np.isnan(values[neuron])
        }
        return {
            "neuron": int(neuron),
            "scores": values,
            "tokens": named["tokens"],
            "shared": named["shared"][0],
        }

    agree, disagree = [told(n) for n in ranked[::-1][:SHOWN]], [told(n) for n in ranked[:SHOWN]]
    return SeamEvidence(seam, cost, entered - left, scores, nulls, agree, disagree)
