"""Do plans that gain on sampled tokens gain on text? One pair of donors, and what it is worth.

The plan is made on tokens that the donors generate; no text is read for it. Then every candidate,
the donors, their uniform average and their ensemble are measured on held-out texts. Printed are the
gain of the plan with its interval, the share of the ensemble's gain that it captures, and its
regret: what the best of all candidates on the texts wins beyond it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from splices import excerpts

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.artefacts.alignment import load_alignment
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_schema import Whole
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import read_text
from frankenmerge.evaluation.gains import donor_losses, gain_of, losses_together, mean_loss
from frankenmerge.models.loading import Placement
from frankenmerge.planning.candidates import candidates, uniform_average
from frankenmerge.planning.numbers import Per
from frankenmerge.planning.search import Constraints
from frankenmerge.splicing.resolve import resolve
from frankenmerge.workflows.gaining import GainOptions, domains_on, parts_of, plan_gains
from frankenmerge.workflows.tuning import TuneOptions, tune


@click.command()
@click.option("--donor-a", required=True, help="A donor.")
@click.option("--donor-b", required=True, help="Another donor.")
@click.option("--base", help="What both were fine-tuned from.")
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A held-out text; may be repeated.",
)
@click.option("--characters", type=int, help="Number of characters of each text. [default: all]")
@click.option(
    "--tune",
    "tuned",
    multiple=True,
    type=click.Choice(["setting", "block", "map"]),
    help="Tune the uniform average, too, with a number for each of these; may be repeated.",
)
@click.option("--dtype", default="float32", show_default=True, help="To compute in.")
@click.option(
    "--alignment",
    type=click.Path(path_type=Path),
    help="The donors' alignment, where `align` has written it.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    donor_a: str,
    donor_b: str,
    base: str | None,
    texts: tuple[Path, ...],
    characters: int | None,
    tuned: tuple[Per, ...],
    dtype: str,
    alignment: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Measure a plan that gains, and all that it has to be compared with."""
    names = [donor_a, donor_b]
    donors = {name: open_checkpoint(name) for name in [*names, *([base] if base else [])]}
    aligned = (
        load_alignment(alignment)
        if alignment
        else align(*(analyze(donors[name]) for name in names))
    )
    placement = Placement(dtype)
    constraints = Constraints(max(donor.blocks for donor in donors.values()) * 3 // 2)
    options = GainOptions(
        "sampled", constraints, any_depth=True, base=base, top=3, seed=seed, placement=placement
    )
    plans = plan_gains([aligned], options, opened=donors)

    bench = Bench((), donors, placement=placement)
    domains = domains_on(excerpts(map(read_text, texts), 0, characters), bench, names, seed)
    models = {name: bench.load(name).model for name in names}
    alone, ensemble = donor_losses(models, domains)
    listed = candidates([aligned], parts_of(donors, base), constraints, any_depth=True)
    chosen, average = plans.plans[0].candidate.recipe, uniform_average(names)
    tunings = _tunings(donors, names, base, seed, tuned)
    recipes = [*(each.recipe for each in listed), chosen, average, *tunings.values()]
    splices = [resolve(recipe, donors) for recipe in recipes]
    sums = {
        recipe.key: each
        for recipe, each in zip(
            recipes, losses_together(splices, bench.assemble, domains).sums, strict=True
        )
    }
    plain = recipes[: len(listed) + 2]
    best = min(plain, key=lambda recipe: mean_loss(sums[recipe.key]))
    found, ceiling = (gain_of(each, alone, seed=seed) for each in (sums[chosen.key], ensemble))
    mean = sums[average.key]
    result: dict[str, Any] = {
        "pair": [Path(name).name for name in names],
        "plan": str(chosen),
        "kind": plans.plans[0].candidate.kind,
        "confirmed": plans.confirmed,
        "sampled": plans.plans[0].gain.nats,
        "donors": {Path(name).name: mean_loss(each) for name, each in alone.items()},
        "gain": found.nats,
        "interval": found.interval,
        "average": gain_of(mean, alone, seed=seed)[:2],
        "over_average": gain_of(sums[chosen.key], {"average": mean}, seed=seed)[:2],
        "ensemble": ceiling[:2],
        "captured": found.nats / ceiling.nats,
        "regret": mean_loss(sums[chosen.key]) - mean_loss(sums[best.key]),
        "best": str(best),
        "candidates": plans.count,
        "passes": plans.passes,
        "tuned": {
            name: gain_of(sums[recipe.key], {"average": mean}, seed=seed)[:2]
            for name, recipe in tunings.items()
        },
    }
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print(result)


def _tunings(
    donors: Mapping[str, Checkpoint],
    names: Sequence[str],
    base: str | None,
    seed: int,
    tuned: Sequence[Per],
) -> dict[str, Recipe]:
    """The uniform average tuned, and task arithmetic that begins there if there is a base."""
    starts = {"average": uniform_average(names)}
    if base:
        models = [Whole(model=name, parameters={"weight": 0.5}) for name in names]
        starts["task arithmetic"] = Recipe(
            merge_method="task_arithmetic", models=models, base_model=base
        )
    return {
        f"{name} per {per}": tune(
            start, TuneOptions("sampled", per, seed=seed), opened=donors
        ).recipe
        for name, start in starts.items()
        for per in tuned
    }


def _print(result: dict[str, Any]) -> None:
    table = Table("", "nats/token", "95 % in", title=" and ".join(result["pair"]))

    def row(name: str, gain: float, interval: Sequence[float]) -> None:
        low, high = interval
        table.add_row(name, f"{gain:+.4f}", f"{low:+.4f} to {high:+.4f}")

    row(
        f"gain of the plan, {result['plan']} ({result['kind']})", result["gain"], result["interval"]
    )
    row("gain of the uniform average", *result["average"])
    row("gain of the ensemble", *result["ensemble"])
    row("the plan over the average", *result["over_average"])
    for name, (gain, interval) in result["tuned"].items():
        row(f"{name}, tuned, over the average", gain, interval)
    console = Console()
    console.print(table)
    console.print(
        f"On sampled tokens {result['sampled']:+.4f}, confirmed: {result['confirmed']}. Captured "
        f"{result['captured']:.0%} of the ensemble's gain; regret {result['regret']:.4f} against "
        f"{result['best']}; {result['candidates']} candidates, {result['passes']} passes."
    )


if __name__ == "__main__":
    main()
