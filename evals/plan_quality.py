"""Compare the planner's choice with exhaustive search, random recipes, rules and evolution.

Plans are made without any text: `ours` from the donors' states on tokens that they generated;
`ours_drawn` is the best of sixteen such plans by their damage on those tokens, and `ours_damped`
the best of them with their repeated blocks damped, if that does less damage on them. Searches that
measure on text (`verified`, `evolution`) measure sixteen recipes each, on the part of the texts
that follows the part on which all are compared.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from splices import Bank, atlas_option, cache_option, dtype_option, excerpts, single_seams

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.atlas import load_atlas
from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation.documents import read_text
from frankenmerge.models.sampling import states_on_sampled
from frankenmerge.planning.controls import (
    goliath,
    naive_interleave,
    random_recipe,
    solar,
    uniform_repetition,
)
from frankenmerge.planning.damping import damped, dampings
from frankenmerge.planning.plan import plan
from frankenmerge.planning.search import Constraints

EVALUATIONS = 16


@click.command()
@click.option("--donor-a", required=True, help="A donor.")
@click.option("--donor-b", required=True, help="Another donor.")
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A held-out text; may be repeated.",
)
@click.option(
    "--depth", required=True, type=click.IntRange(2), help="Number of blocks of the recipes."
)
@click.option(
    "--characters",
    default=20_000,
    show_default=True,
    help="Number of characters to use of each text; verification uses the next ones, as many.",
)
@click.option(
    "--context",
    type=click.IntRange(2),
    help="Tokens in a window. [default: the longest that both donors support]",
)
@click.option("--random", default=200, show_default=True, help="Number of random recipes.")
@click.option(
    "--regret/--no-regret",
    default=True,
    show_default=True,
    help="Whether every single-seam recipe is measured, too.",
)
@atlas_option
@dtype_option
@cache_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    donor_a: str,
    donor_b: str,
    texts: tuple[Path, ...],
    depth: int,
    characters: int,
    context: int | None,
    random: int,
    regret: bool,
    files: tuple[Path, Path] | None,
    dtype: str,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Measure the plan of a depth and everything it has to beat, in nats per token."""
    names = [donor_a, donor_b]
    read = [read_text(text) for text in texts]
    judge = Bank(excerpts(read, 0, characters), names, cache, context=context, dtype=dtype)
    trial = Bank(excerpts(read, characters, characters), names, cache, context=context, dtype=dtype)
    atlases = (
        [load_atlas(file) for file in files]
        if files
        else [analyze(judge.checkpoints[name]) for name in names]
    )
    alignment = align(*atlases, states=states_on_sampled(judge.models))
    result = _result(judge, trial, alignment, depth, random)
    if regret:
        ours, on_sampled = _regret(judge, names, alignment)
        result |= {"regret": ours, "regret_drawn": on_sampled}
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print(result, depth)


def _result(
    judge: Bank, trial: Bank, alignment: Alignment, depth: int, random: int
) -> dict[str, Any]:
    """All figures but regret: on `judge`; searches that need a text measure on `trial`."""
    names = list(judge.names)
    donors = {name: judge.checkpoints[name].blocks for name in names}
    plans = [entry.recipe for entry in plan([alignment], Constraints(depth), top=EVALUATIONS)]
    best_on_sampled = _best_on_sampled(judge, plans)
    stream = judge.checkpoints[names[0]].architecture.stream
    writes = stream.writes if stream else ()
    ways = [way.recipe for entry in plans for way in dampings(entry, [alignment], writes)]
    best_damped = _best_on_sampled(judge, [*plans, *ways])
    verified = plans[int(np.argmin(trial.losses(plans)))]
    rules = {
        "naive interleave": naive_interleave(donors, depth),
        "Goliath's pattern": goliath(donors, depth),
        "SOLAR's": solar(donors, depth),
        "uniform repetition": uniform_repetition(donors, depth),
        "evolution": _evolved(donors, depth, trial),
    }
    randoms = np.array(judge.losses([random_recipe(donors, depth, seed) for seed in range(random)]))
    ours, on_sampled, best, *others = judge.losses(
        [plans[0], best_on_sampled, verified, *rules.values()]
    )
    return {
        "rank_among_random": int((randoms < ours).sum()) + 1,
        "random": {
            "count": random,
            "best": randoms.min(),
            "median": float(np.median(randoms)),
            "worst": randoms.max(),
        },
        "rules": dict(zip(rules, others, strict=True)),
        "rules_damped": {
            name: _nats(judge, _damped(recipe, writes)) for name, recipe in rules.items()
        },
        "ours": ours,
        "ours_drawn": _ranked(on_sampled, randoms),
        "ours_damped": _ranked(_nats(judge, best_damped), randoms),
        "verified": _ranked(best, randoms),
        "recipes": {
            "ours": str(plans[0]),
            "ours_drawn": str(best_on_sampled),
            "ours_damped": best_damped.dump(),
            "verified": str(verified),
            **{name: str(recipe) for name, recipe in rules.items()},
        },
        "donors": {name: judge.donor(name) for name in names},
    }


def _print(result: dict[str, Any], depth: int) -> None:
    rank, count = result["rank_among_random"], result["random"]["count"]
    title = f"{depth} blocks: rank {rank} among {count} random recipes"
    if "regret" in result:
        title += f"; single-seam regret {result['regret']:.1%}"
    table = Table(title=title)
    for column in ("recipe", "nats/token"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    rows = {
        "plan": result["ours"],
        "plan, best on sampled tokens": result["ours_drawn"]["nats"],
        "the same, damped": result["ours_damped"]["nats"],
        "plan, best on text": result["verified"]["nats"],
        "best random": result["random"]["best"],
        "median random": result["random"]["median"],
    } | result["rules"]
    for name, value in sorted(rows.items(), key=lambda item: item[1]):
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


def _damped(recipe: Recipe, writes: Sequence[str]) -> Recipe:
    """Every block damped by how often it is repeated."""
    passes = Counter(block.index for block in recipe.blocks)
    return damped(recipe, [1 / passes[block.index] for block in recipe.blocks], writes)


def _nats(bank: Bank, recipe: Recipe) -> float:
    return bank.bench.splice(str(recipe), bank.splice(recipe)).total.nats_per_token


def _ranked(nats: float, randoms: np.ndarray) -> dict[str, float | int]:
    return {"nats": nats, "rank_among_random": int((randoms < nats).sum()) + 1}


def _best_on_sampled(bank: Bank, recipes: list[Recipe]) -> Recipe:
    return recipes[int(np.argmin(bank.damage_on_sampled(recipes)))]


def _regret(bank: Bank, names: list[str], alignment: Alignment) -> tuple[float, float]:
    """The single-seam choice's loss above the best of its depth, over the spread of that depth.

    The mean over depths with a choice, of the plan that is predicted to be the best, and of the
    best on sampled tokens.
    """
    blocks, regrets = alignment.blocks, []
    both = {(names[0], names[1]): blocks, (names[1], names[0]): blocks[::-1]}
    whole = [
        (i, j, sizes, recipe)
        for (a, b), sizes in both.items()
        for (i, j), recipe in single_seams(a, b, sizes).items()
    ]
    # What the planner's own constraints allow: two blocks on either side, no seam at a donor's end.
    inner = [
        recipe
        for i, j, sizes, recipe in whole
        if 2 <= i < sizes[0] and 1 <= j <= sizes[1] - 2 and recipe.seams
    ]
    for depth in sorted({len(recipe.blocks) for recipe in inner}):
        losses = np.array(bank.losses([recipe for recipe in inner if len(recipe.blocks) == depth]))
        try:
            plans = [
                entry.recipe
                for entry in plan([alignment], Constraints(depth, max_seams=1), top=EVALUATIONS)
            ]
        except FrankenmergeError:
            continue
        if np.ptp(losses) > 0:
            chosen = np.array(bank.losses([plans[0], _best_on_sampled(bank, plans)]))
            regrets.append((chosen - losses.min()) / np.ptp(losses))
    ours, on_sampled = np.mean(regrets, axis=0).tolist()
    return ours, on_sampled


def _evolved(donors: dict[str, int], depth: int, bank: Bank) -> Recipe:
    """The best of a (4 + 1) evolution of `EVALUATIONS` recipes in all.

    A mutation moves a seam of one of the best four by a block or two.
    """
    generator = np.random.default_rng(0)
    known = {
        str(recipe): recipe
        for recipe in (random_recipe(donors, depth, 1_000 + seed) for seed in range(4))
    }
    while len(known) < EVALUATIONS:
        parents = sorted(known.values(), key=lambda recipe: bank.losses([recipe])[0])[:4]
        child = _moved(parents[int(generator.integers(len(parents)))], donors, generator)
        known[str(child)] = child
    return min(known.values(), key=lambda recipe: bank.losses([recipe])[0])


def _moved(recipe: Recipe, donors: dict[str, int], generator: np.random.Generator) -> Recipe:
    """Take one or two blocks from one side of a seam and add as many to the other, if possible."""
    ranges = [[part.sources[0].model, *part.sources[0].layer_range] for part in recipe.parts]
    for _ in range(100):
        seam, step = int(generator.integers(len(ranges) - 1)), int(generator.choice([-2, -1, 1, 2]))
        moved = [list(part) for part in ranges]
        moved[seam][2] += step
        moved[seam + 1][1] += step
        if all(0 <= start < stop <= donors[name] for name, start, stop in moved):
            return recipe_of(
                [Block(name, index) for name, start, stop in moved for index in range(start, stop)]
            )
    return recipe


if __name__ == "__main__":
    main()
