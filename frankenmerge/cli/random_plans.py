"""`plan --random`: recipes drawn at random, as controls of a plan."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frankenmerge.cli.console import out, print_json, table
from frankenmerge.errors import fail

ATTEMPTS = 50
"""Draws for each recipe that is asked for: some are drawn twice."""


def plan_random(
    donors: Sequence[Path], output: Path, options: dict[str, Any], *, as_json: bool
) -> None:
    """Draw as many different recipes of the donors as the command line asks for, and write them."""
    from frankenmerge.planning.controls import random_recipe
    from frankenmerge.splicing.opening import open_named
    from frankenmerge.splicing.resolve import resolve
    from frankenmerge.storage.atomic import write_file
    from frankenmerge.workflows.planning import recipe_paths

    count, seed = options["random"], options["seed"]
    opened = open_named([str(donor) for donor in donors], download=options["download"])
    blocks = {name: donor.blocks for name, donor in opened.items()}
    depth = options["depth"] or max(blocks.values()) * 3 // 2
    limits = {name: options[name] for name in ("max_seams", "min_slice")}
    found = {}
    for attempt in range(count * ATTEMPTS):
        try:
            recipe = random_recipe(blocks, depth, seed * count * ATTEMPTS + attempt, **limits)
        except ValueError as error:
            remedy = "ask for another --depth, more --max-seams or a smaller --min-slice"
            expected = "a depth that slices add up to"
            raise fail("plan --random", expected, str(error), remedy) from None
        found.setdefault(recipe.key, recipe)
        if len(found) == count:
            break
    else:
        remedy = "ask for fewer, or for longer or shorter ones"
        raise fail("plan --random", f"{count} different recipes", str(len(found)), remedy)
    recipes = list(found.values())
    resolve(recipes[0], opened)  # donors that cannot be spliced
    paths = recipe_paths(output, count)
    for path, recipe in zip(paths, recipes, strict=True):
        write_file(path, recipe.dump().encode())
    if as_json:
        plans = [
            {"recipe": recipe.model_dump(exclude_none=True), "summary": str(recipe)}
            for recipe in recipes
        ]
        print_json({"plans": plans, "written": [str(path) for path in paths], "seed": seed})
        return
    shown = table(f"Random recipes of {depth} blocks, seed {seed}", "recipe", "seams", "file")
    for path, recipe in zip(paths, recipes, strict=True):
        shown.add_row(str(recipe), str(len(recipe.seams)), path.name)
    out().print(shown)
