"""How many splices per second are measured together, compared with one model run for each.

The splices are all single-seam splices of two donors.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import click
from splices import excerpts, single_seams

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import read_text
from frankenmerge.splicing.resolve import resolve


@click.command()
@click.option("--donor-a", required=True, help="The donor of the first slice.")
@click.option("--donor-b", required=True, help="The donor of the second slice.")
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A text; may be repeated.",
)
@click.option(
    "--characters",
    default=2_500,
    show_default=True,
    help="Number of characters to use of each text.",
)
@click.option(
    "--context",
    type=click.IntRange(2),
    help="Tokens in a window. [default: the longest that both donors support]",
)
@click.option(
    "--rounds", default=3, show_default=True, help="How often each way is timed; the best counts."
)
def main(
    donor_a: str,
    donor_b: str,
    texts: tuple[Path, ...],
    characters: int,
    context: int | None,
    rounds: int,
) -> None:
    """Print splices per second of CPU time for both ways, and the ratio of their times."""
    donors = {name: open_checkpoint(name) for name in dict.fromkeys((donor_a, donor_b))}
    bench = Bench(excerpts(map(read_text, texts), 0, characters), donors, context=context)
    blocks = donors[donor_a].blocks, donors[donor_b].blocks
    recipes = list(single_seams(donor_a, donor_b, blocks).values())
    splices = [resolve(recipe, donors) for recipe in recipes]
    ways = {
        "together": lambda: bench.splices(splices),
        "alone": lambda: [bench.splice(str(splice.recipe), splice) for splice in splices],
    }
    for name in donors:
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
