"""Plans for donors that share no basis: which pairs need a gauge, what their seams are judged by, and the gauges of a recipe."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_schema import Gauge

Pair = frozenset[str]
ABOVE = 2.0
"""How many times its null a score has to be to count as more than chance."""


def needs_gauge(alignment: Alignment) -> bool:
    """Whether the donors' tokens agree no better than by chance, but their states do once they are rotated.

    Judged by the mean over states of the same relative depth, behind the first block and on:
    embeddings of two trainings may have no rotation in common where all that follows has one. Donors of
    different widths cannot be rotated.
    """
    if (
        alignment.rotated_gram is None
        or "gauge" not in alignment.scores
        or len(set(alignment.widths)) > 1
    ):
        return False
    rows, columns = alignment.blocks
    depths = [(i, round(i * columns / rows)) for i in range(1, rows + 1)]

    def above(name: str, null: str) -> bool:
        score = alignment.scores[name]
        found, chance = (
            np.mean([matrix[depth] for depth in depths])
            for matrix in (score.matrix, score.nulls[null])
        )
        return bool(found > ABOVE * chance)

    return not above("jaccard", "permuted_neurons") and above("gauge", "permuted_probes")


def judged(alignments: Sequence[Alignment]) -> tuple[list[Alignment], frozenset[Pair]]:
    """The alignments with the inner products that seams are to be judged by, and the pairs of donors that need a gauge."""
    chosen = [needs_gauge(alignment) for alignment in alignments]
    given = [
        replace(each, gram=each.rotated_gram) if gauge else each
        for each, gauge in zip(alignments, chosen, strict=True)
    ]
    return given, frozenset(
        frozenset(each.donors) for each, gauge in zip(alignments, chosen, strict=True) if gauge
    )


def with_gauges(recipe: Recipe, gauged: Iterable[Pair]) -> Recipe:
    """The recipe with a gauge for every slice that is in another basis than the first one's donor.

    Where the slice before is in that basis as it is, its stream is what is fitted to; elsewhere it
    is the first donor's.
    """
    pairs, base = set(gauged), recipe.base
    parts, before = [], None
    for part in recipe.parts:
        donor = part.sources[0].model
        if frozenset((base, donor)) in pairs:
            part = part.model_copy(
                update={"gauge": Gauge(to="base" if before is None or before.gauge else "previous")}
            )
        before = part
        parts.append(part)
    return recipe.model_copy(update={"slices": parts})
