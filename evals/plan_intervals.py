"""Do the intervals of plans hold? Damage and gain measured on sampled tokens, and then on text.

For every pair of donors: the sixteen best plans of the donors' depth and of half as many blocks
more, with their damage and gain on tokens that the donors generate, and on held-out text. Printed
are the shares of plans whose figures on the text are within the 90 % intervals, and the share of
the donors' disagreement (`domain_share` of planning/prediction.json) by which the intervals of this
pair would have to be wider to hold for nine plans in ten.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from splices import Bank, excerpts

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.evaluation.documents import read_text
from frankenmerge.evaluation.sampled_damage import cross_losses, disagreement
from frankenmerge.planning.plan import plan
from frankenmerge.planning.prediction import default_model, donor_loss
from frankenmerge.planning.search import Constraints

PLANS, CONTEXT = 16, 128


@click.command()
@click.option(
    "--pair",
    "pairs",
    nargs=2,
    multiple=True,
    required=True,
    help="Two donors; may be repeated.",
)
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A held-out text; may be repeated.",
)
@click.option("--characters", default=6_000, show_default=True, help="Of each text.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    pairs: tuple[tuple[str, str], ...], texts: tuple[Path, ...], characters: int, as_json: bool
) -> None:
    """Measure plans of every pair, and count the intervals that hold."""
    chosen = excerpts([read_text(text) for text in texts], 0, characters)
    rows = [row for pair in pairs for row in _rows(Bank(chosen, pair, context=CONTEXT), pair)]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("pair", "blocks", "plans", "damage held", "gain held", "share needed")
    for row in rows:
        table.add_row(
            " ".join(row["pair"]),
            str(row["depth"]),
            str(row["plans"]),
            f"{row['damage_held']:.0%}",
            f"{row['gain_held']:.0%}",
            f"{row['share_needed']:.3f}",
        )
    Console().print(table)


def _rows(bank: Bank, names: tuple[str, str]) -> list[dict[str, Any]]:
    alignment = align(*(analyze(bank.checkpoints[name]) for name in names))
    cross = cross_losses(bank.models)
    apart, model = disagreement(cross), default_model()
    alone = dict(zip(names, cross.mean(0), strict=True))
    own = {name: bank.donor(name) for name in names}
    deepest = max(bank.checkpoints[name].blocks for name in names)
    rows = []
    for depth in (deepest, deepest * 3 // 2):
        plans = plan([alignment], Constraints(depth), top=PLANS)
        recipes = [each.recipe for each in plans]
        sampled = bank.damage_on_sampled(recipes)
        losses = bank.losses(recipes)
        held: dict[str, list[bool]] = {"damage": [], "gain": []}
        needed = []
        for recipe, drawn, loss in zip(recipes, sampled, losses, strict=True):
            damage = loss - donor_loss(recipe.blocks, own)
            gain = min(own.values()) - loss
            promised = min(alone.values()) - donor_loss(recipe.blocks, alone) - float(drawn)
            for name, predicted, found in (
                ("damage", float(drawn), damage),
                ("gain", -promised, -gain),
            ):
                low, high = model.interval(predicted, sampled=True, disagreement=apart)
                held[name].append(low <= found <= high)
                low, high = model.interval(predicted, sampled=True)
                needed.append(max(0.0, low - found, found - high) / apart if apart else 0.0)
        rows.append(
            {
                "pair": [Path(name).name for name in names],
                "depth": depth,
                "plans": len(plans),
                "disagreement": apart,
                "damage_held": float(np.mean(held["damage"])),
                "gain_held": float(np.mean(held["gain"])),
                "share_needed": float(np.quantile(needed, 0.9)),
            }
        )
    return rows


if __name__ == "__main__":
    main()
