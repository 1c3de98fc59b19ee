"""From alignments to plans: the cheapest recipes, each with the evidence for every seam."""

from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from frankenmerge.alignment import Alignment
from frankenmerge.errors import fail
from frankenmerge.planning.objectives import Objective, seam_costs
from frankenmerge.planning.search import Constraints, Path, cheapest_paths
from frankenmerge.recipe import Block, Recipe, Seam, recipe_of

SHOWN = 5
"""How many agreeing and disagreeing neurons the evidence names."""


@dataclass(frozen=True)
class SeamEvidence:
    """Why a seam costs what it costs."""

    seam: Seam
    cost: float
    skipped: int
    """Blocks jumped over; negative when blocks are gone through again."""
    scores: dict[str, float]
    nulls: dict[str, dict[str, float]]
    """Per score, what it would be under each null."""
    agree: list[dict[str, Any]]
    """The neurons with the highest score: neuron, its scores, each donor's best tokens, and those that both have.

    A search that left a neuron out gives it no score."""
    disagree: list[dict[str, Any]]

    @property
    def by_chance(self) -> bool:
        """Whether the donors' tokens agree here at most twice as often as those of unrelated neurons."""
        return self.scores["jaccard"] <= 2 * self.nulls["jaccard"]["permuted_neurons"]

    def as_json(self) -> dict[str, Any]:
        """The evidence as JSON; block numbers are 0-based, as in the recipe."""
        return {
            "after": {"model": self.seam.after.model, "block": self.seam.after.index},
            "before": {"model": self.seam.before.model, "block": self.seam.before.index},
            "cost": self.cost,
            "skipped_blocks": self.skipped,
            "by_chance": self.by_chance,
            "scores": self.scores,
            "nulls": self.nulls,
            "agree": self.agree,
            "disagree": self.disagree,
        }


class Plan(NamedTuple):
    """A recipe and what is predicted of it."""

    recipe: Recipe
    predicted_damage: float
    """Sum of the seams' costs: 0 for an unspliced donor; it ranks plans and is not in nats."""
    seams: list[SeamEvidence]

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {
            "recipe": self.recipe.model_dump(exclude_none=True),
            "summary": str(self.recipe),
            "depth": len(self.recipe.blocks),
            "predicted_damage": self.predicted_damage,
            "seams": [seam.as_json() for seam in self.seams],
        }


def plan(alignments: list[Alignment], constraints: Constraints, *, top: int = 1, objective: Objective = Objective()) -> list[Plan]:
    """Return the `top` cheapest recipes that use every donor of the alignments, the cheapest first.

    Seams lead from one donor to another wherever an alignment of the two is given, either way; within one donor where
    its alignment with itself is given.

    Raises:
        FrankenmergeError: when the alignments contradict each other, or no recipe keeps to the constraints.
    """
    donors = _donors(alignments)
    names = list(donors)
    directed = {}
    for alignment in alignments:
        a, b = (names.index(name) for name in alignment.donors)
        if (a, b) in directed:
            raise fail(" | ".join(alignment.donors), "one alignment of a pair", "several", "give each pair once")
        directed[a, b] = alignment
        directed.setdefault((b, a), alignment.transposed)
    costs = {pair: seam_costs(alignment, objective) for pair, alignment in directed.items()}
    paths = list(islice(cheapest_paths(list(donors.values()), costs, constraints), top))
    if not paths:
        kept = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in vars(constraints).items())
        blocks = ", ".join(f"{name} ({count} blocks)" for name, count in donors.items())
        remedy = "ask for another depth, more seams, shorter slices or fewer protected blocks"
        raise fail("plan", f"a recipe of all donors that keeps to {kept}", f"none can be made of {blocks}", remedy)
    return [_plan_of(path, names, directed, costs) for path in paths]


def _donors(alignments: list[Alignment]) -> dict[str, int]:
    """Blocks of every donor by name, in order of appearance."""
    donors: dict[str, int] = {}
    fingerprints: dict[str, str] = {}
    for alignment in alignments:
        for name, fingerprint, blocks in zip(alignment.donors, alignment.fingerprints, alignment.blocks, strict=True):
            if fingerprints.setdefault(name, fingerprint) != fingerprint:
                raise fail(name, "the same donor in every alignment", "two different checkpoints of this name", "align the donors again")
            donors[name] = blocks
    return donors


def _plan_of(path: Path, names: list[str], directed: dict, costs: dict) -> Plan:
    recipe = recipe_of([Block(names[piece.donor], index) for piece in path.pieces for index in range(piece.start, piece.stop)])
    seams = []
    for left, entered in zip(path.pieces, path.pieces[1:], strict=False):
        pair = left.donor, entered.donor
        seam = Seam(Block(names[left.donor], left.stop - 1), Block(names[entered.donor], entered.start))
        seams.append(_evidence(seam, directed[pair], left.stop, entered.start, float(costs[pair][left.stop, entered.start])))
    return Plan(recipe, path.cost, seams)


def _evidence(seam: Seam, alignment: Alignment, left: int, entered: int, cost: float) -> SeamEvidence:
    scores = {name: round(float(score.matrix[left, entered]), 4) for name, score in alignment.scores.items()}
    nulls = {
        name: {null: round(float(matrix[left, entered]), 4) for null, matrix in score.nulls.items()}
        for name, score in alignment.scores.items()
    }
    detail = {name: score.detail[left, entered].astype(np.float32) for name, score in alignment.scores.items()}
    # Many neurons tie on the tokens; among those the correlation tells which agree most.
    ranked = np.lexsort((detail["correlation"], detail["jaccard"]))

    def told(neuron: int) -> dict[str, Any]:
        a, b = (table[block, neuron].tolist() for table, block in zip(alignment.tokens, (left, entered), strict=True))
        texts = {"tokens": [a[:4], b[:4]], "shared": [[token for token in a if token in b]]}
        named = {key: [[alignment.vocabulary[token] for token in part] for part in parts] for key, parts in texts.items()}
        values = {name: round(float(values[neuron]), 4) for name, values in detail.items() if not np.isnan(values[neuron])}
        return {"neuron": int(neuron), "scores": values, "tokens": named["tokens"], "shared": named["shared"][0]}

    agree, disagree = [told(n) for n in ranked[::-1][:SHOWN]], [told(n) for n in ranked[:SHOWN]]
    return SeamEvidence(seam, cost, entered - left, scores, nulls, agree, disagree)
