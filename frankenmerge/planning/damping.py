"""Damping: the outputs of repeated blocks are scaled down, as authors of deep merges do by hand."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_schema import Slice, Source
from frankenmerge.planning.plan import by_direction


class Damping(NamedTuple):
    """One way to damp a recipe."""

    name: str
    """`1/n` and `1/sqrt(n)`, the same for all `n` passes of a block; `norms`, for all but the first
    pass.
    """
    recipe: Recipe


def dampings(
    recipe: Recipe, alignments: Sequence[Alignment], writes: Sequence[str]
) -> list[Damping]:
    """Return the recipe damped in three ways; an empty list if no block is repeated.

    `norms` scales a block's output by the ratio of norms at the seam before its slice: the norm of
    the stream there over that in the block's own donor, so that the relative size of the output
    stays the same.

    Args:
        recipe: a recipe of plain slices.
        alignments: of its donors, for their measured norms.
        writes: the maps by which a block writes to the residual stream, as parts of tensor names:
            `self_attn.o_proj`, `mlp.down_proj`.
    """
    passes = Counter(block.index for block in recipe.blocks)
    if max(passes.values()) == 1:
        return []
    ratios = list(_ratios(recipe, alignments))
    again, seen = [], set()
    for block in recipe.blocks:
        again.append(block.index in seen)
        seen.add(block.index)
    factors = {
        "1/n": [1 / passes[block.index] for block in recipe.blocks],
        "1/sqrt(n)": [passes[block.index] ** -0.5 for block in recipe.blocks],
        "norms": [
            ratio if repeated else 1.0 for ratio, repeated in zip(ratios, again, strict=True)
        ],
    }
    return [Damping(name, damped(recipe, values, writes)) for name, values in factors.items()]


def damped(recipe: Recipe, factors: Sequence[float], writes: Sequence[str]) -> Recipe:
    """Scale the output of every block by its factor.

    Each slice of the result has blocks of one factor, written as mergekit's parameter `scale`.
    """
    runs: list[tuple[str, int, int, float]] = []
    for block, factor in zip(recipe.blocks, (round(factor, 4) for factor in factors), strict=True):
        if (
            runs
            and runs[-1][0] == block.model
            and runs[-1][2] == block.index
            and runs[-1][3] == factor
        ):
            runs[-1] = (*runs[-1][:2], block.index + 1, factor)
        else:
            runs.append((block.model, block.index, block.index + 1, factor))
    slices = []
    for model, start, stop, factor in runs:
        scale = [*({"filter": name, "value": factor} for name in writes), {"value": 1.0}]
        source = Source(
            model=model,
            layer_range=[start, stop],
            parameters=None if factor == 1 else {"scale": scale},
        )
        slices.append(Slice(sources=[source]))
    return recipe.model_copy(update={"slices": slices})


def _ratios(recipe: Recipe, alignments: Sequence[Alignment]) -> Iterator[float]:
    """For every block, the ratio of norms at the seam before its slice; 1 in the first slice."""
    directed: Mapping[tuple[str, str], Alignment] = by_direction(alignments)
    seams, ratio = {(seam.after, seam.before) for seam in recipe.seams}, 1.0
    for number, block in enumerate(recipe.blocks):
        before = recipe.blocks[number - 1]
        if number and (before, block) in seams:
            table = directed[before.model, block.model].scores["norm_ratio"].matrix
            ratio = float(table[before.index + 1, block.index])
        yield ratio
