"""Blocks that a recipe moves, in families that are not in the table."""

from collections.abc import Iterator
from typing import Any

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.architecture import Config
from frankenmerge.errors import Fault
from frankenmerge.splicing.result import Donors, is_whole


def moved_faults(recipe: Recipe, donors: Donors, config: Config, place: str) -> Iterator[Fault]:
    """Blocks that would not compute in the result what they compute in their donor.

    Args:
        recipe: spelled out.
        donors: its donors by name.
        config: the result's, complete.
        place: where the recipe is from.
    """
    base = donors[recipe.base]
    if base.architecture.listed or is_whole(recipe, donors):
        return
    if base.written is None:
        expected = "a family that transformers can build without code of the donor"
        remedy = "merge whole models of this family, or install a transformers that has it"
        yield Fault(place, expected, str(base.config["model_type"]), remedy)
        return
    from frankenmerge.splicing.at_home import Moved, home_faults

    numbers = range(max(len(part.sources) for part in recipe.parts))
    runs = []
    for number in numbers:
        chosen = [part.sources[min(number, len(part.sources) - 1)] for part in recipe.parts]
        runs.append(
            [
                Moved(source.model, index)
                for source in chosen
                for index in range(*source.layer_range)
            ]
        )
    used = dict.fromkeys([recipe.base, *(moved.donor for run in runs for moved in run)])
    configs: dict[str, Any] = {name: donors[name].config for name in used}
    yield from home_faults(config, recipe.base, configs, runs, place)
