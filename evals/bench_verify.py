"""How many splices a second are measured together, against one model run for each: all single-seam splices of two donors."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import click
from splices import excerpts, single_seams

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.compare import Bench, read_text


@click.command()
@click.option("--donor-a", required=True)
@click.option("--donor-b", required=True)
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="May be repeated.",
)
@click.option(
    "--characters", default=2_500, show_default=True, help="Of each text, how much is used."
)
@click.option(
    "--context",
    type=click.IntRange(2),
    help="Tokens in a window. [default: what both donors were made for]",
)
@click.option("--rounds", default=3, show_default=True)
def main(
    donor_a: str,
    donor_b: str,
    texts: tuple[Path, ...],
    characters: int,
    context: int | None,
    rounds: int,
) -> None:
    """Print seconds of CPU time for both ways, and their ratio, the best of the rounds each."""
    names = list(dict.fromkeys((donor_a, donor_b)))
    bench = Bench(excerpts(map(read_text, texts), 0, characters), names, context=context)
    blocks = [open_checkpoint(name).blocks for name in (donor_a, donor_b)]
    recipes = list(single_seams(donor_a, donor_b, (blocks[0], blocks[1])).values())
    ways = {
        "together": lambda: bench.recipes(recipes),
        "alone": lambda: [bench.recipe(str(recipe), recipe) for recipe in recipes],
    }
    for name in names:
        bench.load(name)
    seconds = {name: min(_timed(way) for _ in range(rounds)) for name, way in ways.items()}
    rates = {name: len(recipes) / value for name, value in seconds.items()}
    click.echo(
        json.dumps(
            {
                "splices": len(recipes),
                "splices_per_second": rates,
                "ratio": seconds["alone"] / seconds["together"],
            }
        )
    )


def _timed(way: Callable[[], object]) -> float:
    started = time.process_time()
    way()
    return time.process_time() - started


if __name__ == "__main__":
    main()
