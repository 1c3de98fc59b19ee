"""Whether donors can be spliced; of families that are not in the table, after a trial."""

from itertools import combinations

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import spliced_config
from frankenmerge.donors.views import seen_as
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.compatibility import Compatibility, compatibility
from frankenmerge.splicing.moved_blocks import settled
from frankenmerge.splicing.result import blocks_with_configs


def compared(donors: list[Checkpoint]) -> Compatibility:
    """Compare donors pair by pair: could one model hold blocks of all of them?

    Of families that are not in the table, a deeper model of both donors is tried: the first two
    thirds of the one, then the last two thirds of the other.
    """
    found = compatibility(donors)
    if found.reasons:
        return found
    reasons = [
        f"{first.name} | {other.name}: {line}"
        for first, other in combinations(donors, 2)
        for line in _trial(first, other)
    ]
    return found._replace(reasons=reasons)


def _trial(first: Checkpoint, other: Checkpoint) -> list[str]:
    if first.architecture.listed:
        return []
    lower = range(-(-2 * first.blocks // 3))
    upper = range(other.blocks // 3, other.blocks)
    stack = [Block("A", index) for index in lower] + [Block("B", index) for index in upper]
    recipe, donors = recipe_of(stack), {"A": first, "B": seen_as(other, first)}
    config = spliced_config(first.config, blocks_with_configs(recipe, donors, 0), tied=first.tied)
    try:
        settled(recipe, donors, config, "trial")
    except FrankenmergeError as error:
        return [f"a deeper model of both: {fault.found}" for fault in error.faults]
    return []
