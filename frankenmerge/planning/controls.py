"""Recipes that people write without scores: the baselines for a plan."""

from collections.abc import Mapping

import numpy as np

from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of

GOLIATH_SLICE = 1 / 5
"""Goliath-120b has runs of 16 of its donors' 80 blocks."""


def naive_interleave(donors: Mapping[str, int], depth: int) -> Recipe:
    """Change the donor at every block, with each block from its relative depth in the result."""
    names = list(donors)
    blocks = []
    for position in range(depth):
        name = names[position % len(names)]
        blocks.append(Block(name, position * donors[name] // depth))
    return recipe_of(blocks)


def goliath(donors: Mapping[str, int], depth: int) -> Recipe:
    """Goliath's pattern scaled to `depth`: overlapping runs of alternating donors, evenly spaced.

    `donors` maps names to numbers of blocks; the runs' lengths differ by at most one and sum to
    `depth`.
    """
    names = list(donors)
    runs = max(
        2,
        round(depth / max(2, max(donors.values()) * GOLIATH_SLICE)),
        -(-depth // min(donors.values())),
    )
    edges = [round(depth * run / runs) for run in range(runs + 1)]
    blocks = []
    for run in range(runs):
        name, taken = names[run % len(names)], edges[run + 1] - edges[run]
        start = round((donors[name] - taken) * run / (runs - 1))
        blocks += [Block(name, start + index) for index in range(taken)]
    return recipe_of(blocks)


def solar(donors: Mapping[str, int], depth: int) -> Recipe:
    """SOLAR's depth up-scaling (arXiv:2312.15166).

    The first donor without its last blocks, then the second without its first ones. `donors` maps
    one or two names to numbers of blocks.
    """
    first, last = (list(donors) * 2)[:2]
    taken = (depth + 1) // 2
    start = donors[last] - (depth - taken)
    return recipe_of(
        [
            *(Block(first, index) for index in range(taken)),
            *(Block(last, index) for index in range(start, donors[last])),
        ]
    )


def uniform_repetition(donors: Mapping[str, int], depth: int) -> Recipe:
    """Only the first donor, with its blocks repeated or left out evenly."""
    name = next(iter(donors))
    return recipe_of([Block(name, position * donors[name] // depth) for position in range(depth)])


def random_recipe(
    donors: Mapping[str, int], depth: int, seed: int, *, max_seams: int = 4, min_slice: int = 2
) -> Recipe:
    """Sample a recipe under a planner's usual constraints.

    It begins with a donor's first block and ends with a donor's last one, and no donor of several
    follows itself. `donors` maps names to numbers of blocks.

    Raises:
        ValueError: if there is no recipe of `depth` blocks.
    """
    generator = np.random.default_rng(seed)
    names = list(donors)
    if not 2 * min_slice <= depth <= (max_seams + 1) // 2 * sum(sorted(donors.values())[-2:]):
        raise ValueError(f"no recipe of {depth} blocks exists for {dict(donors)}")
    while True:
        count = int(generator.integers(1, max_seams + 1)) + 1
        lengths = (
            generator.multinomial(depth - min_slice * count, np.full(count, 1 / count)) + min_slice
            if depth >= min_slice * count
            else []
        )
        order = [int(generator.integers(len(names)))]
        while len(order) < count:
            order.append(
                (order[-1] + int(generator.integers(1, len(names)))) % len(names)
                if len(names) > 1
                else 0
            )
        sizes = [donors[names[donor]] for donor in order]
        if len(lengths) == 0 or any(
            length > size for length, size in zip(lengths, sizes, strict=True)
        ):
            continue
        starts = [
            int(generator.integers(0, size - length + 1))
            for length, size in zip(lengths, sizes, strict=True)
        ]
        starts[0], starts[-1] = 0, sizes[-1] - int(lengths[-1])
        slices = zip(order, starts, lengths, strict=True)
        return recipe_of(
            [
                Block(names[donor], start + index)
                for donor, start, length in slices
                for index in range(int(length))
            ]
        )
