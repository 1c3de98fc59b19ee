"""`moe`: a mixture of experts from dense donors."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from frankenmerge.cli.console import out, progress, table
from frankenmerge.cli.merge import write_checkpoint, writing_options

if TYPE_CHECKING:
    from frankenmerge.evaluation.routing import Routing
    from frankenmerge.splicing.stages import Stages


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--measure",
    is_flag=True,
    help="First report where held-out prompts of every expert are routed; with --dry-run write "
    "nothing.",
)
@click.option(
    "--seed",
    "--random-seed",
    type=click.IntRange(0),
    help="Random seed of random gates and of noise.",
)
@writing_options
def moe(config: Path, output: Path, measure: bool, seed: int | None, **options: Any) -> None:
    """Write a mixture of experts of dense donors to the new folder OUTPUT.

    CONFIG is mergekit-moe's YAML. Every block gets the MLPs of all experts and a gate between them,
    everything else from the base model; the base runs on the prompts block by block. `merge` writes
    the same, `check` validates CONFIG, and `evaluate CONFIG` measures it in memory.
    """
    from frankenmerge.artefacts.mixture import without_experts
    from frankenmerge.artefacts.recipe_file import load_recipes

    recipes = load_recipes(config)
    if seed is not None:
        recipes = [recipe.model_copy(update={"seed": seed}) for recipe in recipes]

    def before(stages: "Stages") -> dict[str, Any]:
        mixture = stages.result.recipe.mixture
        if mixture is None:
            raise without_experts(str(config))
        also: dict[str, Any] = {"experts": len(mixture.experts)}
        if measure:
            found = _measured(stages, config, options)
            also["routing"] = found.as_json()
            if not options["as_json"]:
                _print_routing(found)
        return also

    write_checkpoint(recipes, str(config), output, before=before, **options)


def _measured(stages: "Stages", config: Path, options: dict[str, Any]) -> "Routing":
    from frankenmerge.workflows.mixing import routing_of

    return routing_of(
        stages,
        device=options["device"],
        download=options["download"],
        allow_pickle=options["allow_pickle"],
        place=str(config),
        progress=progress,
    )


def _print_routing(found: "Routing") -> None:
    """Print where held-out prompts go, with what chance would give."""
    console = out()
    shown = table("Held-out prompts routed to their own expert", "expert", "prompts", "right")
    for name in ("share", "95 % in", "tokens"):
        shown.add_column(name, justify="right", overflow="fold")
    for each in (*found.experts, found.total):
        low, high = each.interval
        shown.add_row(
            Path(each.name).name,
            str(each.prompts),
            str(each.right),
            f"{each.right / each.prompts:.0%}",
            f"{low:.0%}-{high:.0%}",
            f"{each.tokens:.0%}",
        )
    console.print(shown)
    console.print(
        f"Chance: {found.chance:.0%}. Every prompt was routed by gates made without it; tokens: "
        "first choice in all blocks."
    )
    best, worst = (
        choose(range(len(found.blocks)), key=found.blocks.__getitem__) for choose in (max, min)
    )
    console.print(
        f"Tokens by block: {found.blocks[worst]:.0%} in block {worst} to {found.blocks[best]:.0%} "
        f"in block {best}."
    )
