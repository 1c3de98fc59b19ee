"""How often is a gain claimed where there is none? Donors with themselves, on many splits of text.

Every window of a donor's blocks runs twice, undamped, on held-out text. The text's units are split
into halves at random, many times: the best windows by one half are confirmed on the other half, as
`plan` does. The windows are measured as they are, and recentred: every window's difference from its
donor is shifted to a mean of exactly 0 over the whole text, so that a claim is wrong whatever the
donor is like.
"""

import json
from pathlib import Path

import click
import numpy as np

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import read_text
from frankenmerge.evaluation.domains import Domain
from frankenmerge.evaluation.gains import (
    Sums,
    donor_losses,
    gain_of,
    losses_in_turn,
    mean_loss,
)
from frankenmerge.planning.candidates import repeated_window, windows
from frankenmerge.splicing.resolve import resolve
from frankenmerge.workflows.gaining import FINALISTS, SIGNIFICANCE, domains_on


@click.command()
@click.option("--donor", "donors", required=True, multiple=True, help="A donor; may be repeated.")
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A held-out text; may be repeated.",
)
@click.option("--splits", default=20, show_default=True, help="Splits of the text, per donor.")
def main(donors: tuple[str, ...], texts: tuple[Path, ...], splits: int) -> None:
    """Count the claims of every donor, and print them as one JSON object."""
    result = {}
    for name in donors:
        bench = Bench((), {name: open_checkpoint(name)})
        domains = domains_on([read_text(text) for text in texts], bench, [name], 0)
        donor, found = _measured(bench, name, domains)
        result[Path(name).name] = {
            "splits": splits,
            "windows": len(found),
            "best_gain": mean_loss(donor) - min(map(mean_loss, found)),
            "claims": _claims(donor, found, splits),
            "claims_recentred": _claims(donor, [_recentred(each, donor) for each in found], splits),
        }
        click.echo(json.dumps({Path(name).name: result[Path(name).name]}), err=True)
    click.echo(json.dumps(result))


def _measured(bench: Bench, name: str, domains: list[Domain]) -> tuple[Sums, list[Sums]]:
    """The donor's sums, and those of its windows."""
    donor = donor_losses({name: bench.load(name).model}, domains)[0][name]
    blocks = bench.checkpoints[name].blocks
    recipes = [repeated_window(name, blocks, *each, 1.0, ()) for each in windows(blocks)]
    splices = [resolve(recipe, bench.checkpoints) for recipe in recipes]
    return donor, [each.sums for each in losses_in_turn(splices, bench.assemble, domains)]


def _recentred(window: Sums, donor: Sums) -> Sums:
    """The window's sums, shifted so that it has the donor's mean loss."""
    excess = mean_loss(window) - mean_loss(donor)
    return {
        name: np.stack([each[0] - excess * each[1], each[1], each[2]])
        for name, each in window.items()
    }


def _claims(donor: Sums, found: list[Sums], splits: int) -> int:
    """In how many splits the window that is best by one half is confirmed on the other."""
    claims = 0
    for seed in range(splits):
        generator = np.random.default_rng(seed)
        halves = {
            name: np.array_split(generator.permutation(each.shape[1]), 2)
            for name, each in donor.items()
        }

        def half(sums: Sums, number: int, halves: dict = halves) -> Sums:
            return {name: each[:, halves[name][number]] for name, each in sums.items()}

        best = min(found, key=lambda each: mean_loss(half(each, 0)))
        gain = gain_of(
            half(best, 1),
            {"donor": half(donor, 1)},
            seed=seed,
            coverage=1 - SIGNIFICANCE / FINALISTS,
        )
        claims += gain.interval[0] > 0
    return claims


if __name__ == "__main__":
    main()
