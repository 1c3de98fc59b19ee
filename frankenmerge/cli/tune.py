"""`tune`: the numbers of a recipe, chosen by what they gain."""

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from frankenmerge.cli.console import (
    device_option,
    download_option,
    dtype_option,
    json_option,
    out,
    output_option,
    pickle_option,
    print_json,
    progress,
    table,
)
from frankenmerge.cli.measuring import gain_option, gains_on, separator_option
from frankenmerge.cli.tables import signed_interval, task_differences_tables

if TYPE_CHECKING:
    from frankenmerge.workflows.tuning import Tuned


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@output_option("Where to write the recipe with its new numbers.")
@gain_option("--on", "Tune on this. [default: sampled]")
@separator_option
@click.option(
    "--per",
    type=click.Choice(["setting", "block", "map"]),
    default="setting",
    show_default=True,
    help="What gets a number of its own: what the recipe gives one, every block, or every map "
    "(matrix) of every block.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=60,
    show_default=True,
    help="Maximum number of steps of descent, or of generations of CMA-ES.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of sampled tokens, batches, generations and resamples.",
)
@device_option
@dtype_option
@download_option
@pickle_option
@json_option
def tune(
    recipe: Path, output: Path, device: str, dtype: str, as_json: bool, **options: Any
) -> None:
    """Choose the numbers of RECIPE that gain most: weights, t, densities, scales.

    No model is written. Numbers on which the result depends smoothly are moved by gradient, others
    are searched by CMA-ES. Half of the tokens are tuned on, a quarter says when to stop, and what
    was gained is measured on the last quarter.
    """
    from frankenmerge.artefacts.recipe_file import load_recipes
    from frankenmerge.models.loading import Placement
    from frankenmerge.storage.atomic import write_file
    from frankenmerge.workflows.tuning import TuneOptions, one_recipe
    from frankenmerge.workflows.tuning import tune as tuned

    started = perf_counter()
    given = one_recipe(load_recipes(recipe), str(recipe))
    options["on"] = gains_on(options["on"], options.pop("separator"), download=options["download"])
    chosen = TuneOptions(placement=Placement(dtype, device), **options)
    found = tuned(given, chosen, progress=progress)
    write_file(output, found.recipe.dump().encode())
    if as_json:
        print_json(_as_json(found, perf_counter() - started))
    else:
        _print(found, output)


def _as_json(found: "Tuned", seconds: float) -> dict[str, Any]:
    return {
        "recipe": found.recipe.model_dump(exclude_none=True),
        "before": {"nats": found.before},
        "after": {"nats": found.after},
        "gain": found.gain.nats,
        "interval": found.gain.interval,
        "steps": found.steps,
        "numbers": found.numbers,
        "best_donor": {"name": found.best_donor, "nats": found.best_nats},
        "gain_over_best_donor": found.over_donor.nats,
        "interval_over_best_donor": found.over_donor.interval,
        **({"tasks": [each.as_json() for each in found.tasks]} if found.tasks else {}),
        "seconds": seconds,
    }


def _print(found: "Tuned", output: Path) -> None:
    made = table("On tokens that nothing was tuned on", "", "nats/token", "gain", "95 % in")
    made.add_row(Path(found.best_donor).name, f"{found.best_nats:.4f}", "best donor", "")
    made.add_row("recipe as given", f"{found.before:.4f}", "", "")
    interval = signed_interval(found.gain.interval)
    made.add_row("tuned", f"{found.after:.4f}", f"{found.gain.nats:+.4f}", interval)
    interval = signed_interval(found.over_donor.interval)
    made.add_row("against the best donor", "", f"{found.over_donor.nats:+.4f}", interval)
    console = out()
    console.print(made)
    for tested in task_differences_tables(found.tasks):
        console.print(tested)
    shown = found.gain.interval[0] > 0
    verdict = "" if shown else "No gain shown over the recipe as given. "
    console.print(
        f"{verdict}{found.numbers} numbers, {found.steps} steps. Written to {output}", markup=False
    )
