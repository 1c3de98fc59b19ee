"""Candidates for a gain: recipes of every kind that a pair of donors, or one donor, allows.

Alignments propose: blocks are averaged or exchanged only where the donors' features agree better
than by chance, and stacks are those of the least predicted damage. What a candidate gains is
measured by whoever asks for them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from math import comb
from typing import Any, NamedTuple

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.artefacts.recipe_schema import Slice, Source, Whole
from frankenmerge.errors import FrankenmergeError
from frankenmerge.planning.damping import damped, dampings
from frankenmerge.planning.gauges import ABOVE
from frankenmerge.planning.plan import plan
from frankenmerge.planning.search import Constraints

WEIGHTS = (0.25, 0.5, 0.75)
"""Of the second donor in an average of two."""
SCALES = (0.4, 0.6, 0.8, 1.0)
"""Weights of every task vector in task arithmetic and its kin."""
DENSITIES = (0.2, 0.5)
EIGHTHS, QUARTERS = 8, 4
"""Places, evenly spaced over the depth, where donors change; of recipes of two changes fewer."""
DEEPER = (9 / 8, 5 / 4, 3 / 2)
"""Depths of stacks, of the deepest donor's, where no depth is asked for."""
STACKS = 2
"""Stacks of every depth."""
REPEATED = (0.1, 0.5, 1.0)
"""Scales of what the repeated blocks of a single donor write to the residual stream."""


class Candidate(NamedTuple):
    """A recipe that may gain."""

    kind: str
    """`average`, `exchange`, `transition`, `modules`, `task arithmetic`, `ties`, `stack`,
    `damped stack`, `repeat`, or `tuned`.
    """
    recipe: Recipe


class Run(NamedTuple):
    """Blocks of the same depth in all donors, averaged with weights."""

    weights: Mapping[str, float]
    """By donor; one alone is copied."""
    start: int
    stop: int


@dataclass(frozen=True)
class Donors:
    """What candidates are made of."""

    blocks: Mapping[str, int]
    """By donor."""
    maps: tuple[str, ...] = ()
    """The matrices of a block, as in names of tensors: `self_attn.q_proj`, `mlp.down_proj`."""
    writes: tuple[str, ...] = ()
    """The maps by which a block writes to the residual stream; none where a norm follows them."""
    base: str | None = None
    """What all donors were fine-tuned from, if that is known."""

    @property
    def modules(self) -> list[str]:
        """The parts of a block, where there are several: `self_attn`, `mlp`."""
        found = list(dict.fromkeys(name.split(".")[0] for name in self.maps))
        return found if len(found) > 1 else []


def candidates(
    alignments: Sequence[Alignment],
    donors: Donors,
    constraints: Constraints,
    *,
    any_depth: bool = False,
) -> list[Candidate]:
    """Everything that is worth measuring; recipes that mean the same are listed once.

    Args:
        alignments: of pairs of donors, or of one donor with itself.
        donors: of the alignments.
        constraints: of stacks. Recipes have their depth.
        any_depth: whether recipes may have other depths: the donors', and some up to that one.
    """
    found: list[Candidate] = []
    deepest, alone = max(donors.blocks.values()), len(donors.blocks) == 1
    if any_depth or constraints.depth == deepest:
        related = [pair for pair in alignments if len(set(pair.donors)) == 2 and _alike(pair)]
        for pair in related:
            found += _of_pair(pair, donors)
        if len(related) == comb(len(donors.blocks), 2) > 1:
            found += _of_all(list(donors.blocks))
        if donors.base and related:
            found += _of_base(list(donors.blocks), donors.base)
    depths = [round(deepest * share) for share in DEEPER] if any_depth else [constraints.depth]
    for depth in dict.fromkeys(depths):
        if not any_depth or deepest < depth <= constraints.depth:
            found += _stacks(alignments, donors, replace(constraints, depth=depth))
    if alone and any_depth:
        ((name, blocks),) = donors.blocks.items()
        found += [
            Candidate("repeat", repeated_window(name, blocks, *each, scale, donors.writes))
            for each in windows(blocks)
            for scale in (REPEATED if donors.writes else (1.0,))
        ]
    return list({candidate.recipe.key: candidate for candidate in found}.values())


def uniform_average(names: Sequence[str]) -> Recipe:
    """The mean of whole donors."""
    return _average(dict.fromkeys(names, round(1 / len(names), 4)))


def blended(runs: Sequence[Run]) -> Recipe:
    """The recipe of runs that are averaged, or copied where a single donor gives them."""
    if all(len(run.weights) == 1 for run in runs):
        return recipe_of(
            [
                Block(name, index)
                for run in runs
                for name in run.weights
                for index in range(run.start, run.stop)
            ]
        )
    slices = [
        Slice(
            sources=[
                Source(
                    model=name,
                    layer_range=[run.start, run.stop],
                    parameters={"weight": weight},
                )
                for name, weight in run.weights.items()
            ]
        )
        for run in runs
    ]
    return Recipe(merge_method="linear", slices=slices)


def repeated_window(
    name: str, blocks: int, start: int, stop: int, scale: float, writes: Sequence[str]
) -> Recipe:
    """A donor whose blocks `[start, stop)` run twice: `[0, stop)`, then `[start, blocks)`.

    Args:
        name: of the donor.
        blocks: its number of blocks.
        start: first block of the window.
        stop: end of the window.
        scale: of what the second pass writes to the residual stream.
        writes: the maps that it writes by, as parts of tensor names.
    """
    indices = [*range(stop), *range(start, blocks)]
    recipe = recipe_of([Block(name, index) for index in indices])
    if scale == 1:
        return recipe
    again = range(stop, 2 * stop - start)
    return damped(recipe, [scale if at in again else 1.0 for at in range(len(indices))], writes)


def windows(blocks: int) -> list[tuple[int, int]]:
    """All half-open windows of blocks."""
    return list(combinations(range(blocks + 1), 2))


def _alike(alignment: Alignment, depth: int | None = None) -> bool:
    """Whether blocks of one depth may be exchanged: features agree better than by chance.

    Those of the embeddings count too: donors that agree there have one basis, whatever became of
    their blocks. Others count after `depth` blocks of both, or on average.
    """
    if alignment.blocks[0] != alignment.blocks[1]:
        return False
    score = alignment.scores["jaccard"]
    values, chances = score.matrix.diagonal(), score.nulls["permuted_neurons"].diagonal()
    compared = slice(1, None) if depth is None else slice(depth, depth + 1)
    return any(values[at].mean() > ABOVE * chances[at].mean() for at in (slice(0, 1), compared))


def _of_pair(alignment: Alignment, donors: Donors) -> Iterator[Candidate]:
    """Candidates of the donors' own depth: averages, exchanges, transitions, parts of blocks."""
    first, second = alignment.donors
    depth = alignment.blocks[0]
    for weight in WEIGHTS:
        weights = {first: 1 - weight, second: weight}
        yield Candidate("average", _average(weights))
        for module in donors.modules:
            yield from (
                Candidate("modules", _average(weights, module, rest)) for rest in (first, second)
            )

    def places(count: int) -> list[int]:
        even = dict.fromkeys(round(depth * place / count) for place in range(1, count))
        return [place for place in even if 0 < place < depth and _alike(alignment, place)]

    for left, right in permutations((first, second)):
        for place in places(EIGHTHS):
            runs = [Run({left: 1.0}, 0, place), Run({right: 1.0}, place, depth)]
            yield Candidate("exchange", blended(runs))
        for start, stop in combinations(places(QUARTERS), 2):
            runs = [
                Run({left: 1.0}, 0, start),
                Run({right: 1.0}, start, stop),
                Run({left: 1.0}, stop, depth),
            ]
            yield Candidate("exchange", blended(runs))
    both = {first: 0.5, second: 0.5}
    for start, stop in combinations([0, *places(QUARTERS), depth], 2):
        for left, right in ((a, b) for a in (first, second) for b in (first, second)):
            runs = [Run({left: 1.0}, 0, start), Run(both, start, stop)]
            runs = [*runs, Run({right: 1.0}, stop, depth)]
            if (start, stop) != (0, depth):
                made = blended([run for run in runs if run.start < run.stop])
                yield Candidate("transition", made)


def _of_all(names: Sequence[str]) -> Iterator[Candidate]:
    """Averages of three donors or more: of all alike, and with twice the weight of each one."""
    yield Candidate("average", uniform_average(names))
    for heavy in names:
        weights = {name: (1 + (name == heavy)) / (len(names) + 1) for name in names}
        rounded = {name: round(weight, 4) for name, weight in weights.items()}
        yield Candidate("average", _average(rounded))


def _average(weights: Mapping[str, float], module: str = "", rest: str = "") -> Recipe:
    """The average of whole donors; or of one part of every block, all else one donor's."""

    def parameters(name: str, weight: float) -> dict[str, Any]:
        if not module:
            return {"weight": weight}
        other = {"value": float(name == rest)}
        return {"weight": [{"filter": module, "value": weight}, other]}

    models = [
        Whole(model=name, parameters=parameters(name, weight)) for name, weight in weights.items()
    ]
    return Recipe(merge_method="linear", models=models)


def _of_base(names: Sequence[str], base: str) -> Iterator[Candidate]:
    """Task arithmetic and TIES: what fine-tuning changed, added to the base."""

    def models(weight: float, **more: float) -> list[Whole]:
        return [Whole(model=name, parameters={"weight": weight} | more) for name in names]

    for scale in SCALES:
        recipe = Recipe(merge_method="task_arithmetic", models=models(scale), base_model=base)
        yield Candidate("task arithmetic", recipe)
        for density in DENSITIES:
            listed = models(scale, density=density)
            yield Candidate("ties", Recipe(merge_method="ties", models=listed, base_model=base))


def _stacks(
    alignments: Sequence[Alignment], donors: Donors, constraints: Constraints
) -> Iterator[Candidate]:
    """The stacks of the least predicted damage, as they are and damped."""
    try:
        plans = plan(list(alignments), constraints, top=STACKS)
    except FrankenmergeError:
        return  # no stack of this depth satisfies the constraints
    for each in plans:
        yield Candidate("stack", each.recipe)
        if donors.writes and not each.recipe.has_gauges:
            ways = dampings(each.recipe, list(alignments), donors.writes)
            yield from (Candidate("damped stack", way.recipe) for way in ways)


def with_weight(recipe: Recipe, weight: float) -> Recipe:
    """A two-donor average with another weight of its second donor."""
    assert recipe.models and len(recipe.models) == 2
    pairs = zip(recipe.models, (round(1 - weight, 3), round(weight, 3)), strict=True)
    models = [whole.model_copy(update={"parameters": {"weight": each}}) for whole, each in pairs]
    return recipe.model_copy(update={"models": models})
