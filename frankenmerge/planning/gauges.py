"""Plans for donors without a common basis: which pairs need a gauge, and the gauges of a recipe."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_schema import Gauge

Pair = frozenset[str]
ABOVE = 2.0
"""A score above this multiple of its null is more than chance."""


def needs_gauge(alignment: Alignment) -> bool:
    """Whether the donors' tokens agree at chance level, but their states agree once rotated.

    This compares means over states of the same relative depth, from the first block's output on:
    the embeddings of two trainings may have no common rotation even if all later states have one.
    Donors of different widths cannot be rotated.
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
        value, chance = (
            np.mean([matrix[depth] for depth in depths])
            for matrix in (score.matrix, score.nulls[null])
        )
        return bool(value > ABOVE * chance)

    return not above("jaccard", "permuted_neurons") and above("gauge", "permuted_probes")


def rotated_where_needed(
    alignments: Sequence[Alignment],
) -> tuple[list[Alignment], frozenset[Pair]]:
    """The alignments for the prediction of damage, and the pairs of donors that need a gauge.

    An alignment of such a pair has the inner products after rotation.
    """
    chosen = [needs_gauge(alignment) for alignment in alignments]
    rotated = [
        replace(each, gram=each.rotated_gram) if gauge else each
        for each, gauge in zip(alignments, chosen, strict=True)
    ]
    return rotated, frozenset(
        frozenset(each.donors) for each, gauge in zip(alignments, chosen, strict=True) if gauge
    )


def with_gauges(recipe: Recipe, gauged: Iterable[Pair]) -> Recipe:
    """The recipe with a gauge for every slice in a basis other than that of the first donor.

    The rotation is fitted to the stream of the previous slice if that slice is not rotated itself;
    otherwise to the first donor's stream.
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
