"""Is the planner's choice any good? Against exhaustive search, random recipes, rules of thumb and evolutionary search.

Plans are made without any text: `ours` from the donors' states on tokens that they drew;
`ours_drawn` is the best of sixteen such plans by their damage on those tokens, and `ours_damped`
the best of them with their repeated blocks damped, where that does less damage on them. Where a
search measures on text (`verified`, `evolution`), it does so on the part of the texts behind the
one that all are judged on, sixteen recipes each.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from splices import Bank, excerpts, single_seams

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation.compare import read_text
from frankenmerge.evaluation.sampled_damage import damage_on_sampled
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

EVALUATIONS, RANDOM = 16, 200


@click.command()
@click.option("--donor-a", required=True)
@click.option("--donor-b", required=True)
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A held-out text; may be repeated.",
)
@click.option("--depth", required=True, type=click.IntRange(2), help="Blocks of the recipes.")
@click.option(
    "--characters",
    default=20_000,
    show_default=True,
    help="Of each text, how much is used; verification uses as much more.",
)
@click.option(
    "--context",
    type=click.IntRange(2),
    help="Tokens in a window. [default: what both donors were made for]",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="A file for what was measured, to go on from after an interruption.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    donor_a: str,
    donor_b: str,
    texts: tuple[Path, ...],
    depth: int,
    characters: int,
    context: int | None,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Measure the plan of a depth beside everything it has to beat. Losses are in nats per token."""
    names = [donor_a, donor_b]
    read = [read_text(text) for text in texts]
    judge = Bank(excerpts(read, 0, characters), names, cache, context=context)
    trial = Bank(excerpts(read, characters, characters), names, cache, context=context)
    donors = {name: judge.checkpoints[name].blocks for name in names}
    shown = states_on_sampled({name: judge.bench.load(name)[1] for name in judge.names})
    alignment = align(*(analyze(judge.checkpoints[name]) for name in names), states=shown)
    plans = [entry.recipe for entry in plan([alignment], Constraints(depth), top=EVALUATIONS)]
    drawn = _best_on_drawn(judge, plans)
    stream = judge.checkpoints[donor_a].architecture.stream
    writes = stream.writes if stream else ()
    ours_damped = _best_on_drawn(
        judge,
        [*plans, *(way.recipe for entry in plans for way in dampings(entry, [alignment], writes))],
    )
    verified = plans[int(np.argmin(trial.losses(plans)))]
    rules = {
        "naive interleave": naive_interleave(donors, depth),
        "Goliath's pattern": goliath(donors, depth),
        "SOLAR's": solar(donors, depth),
        "uniform repetition": uniform_repetition(donors, depth),
        "evolution": _evolved(donors, depth, trial),
    }
    randoms = np.array(judge.losses([random_recipe(donors, depth, seed) for seed in range(RANDOM)]))
    ours, on_drawn, best, *others = judge.losses([plans[0], drawn, verified, *rules.values()])
    regret, regret_drawn = _regret(judge, names, alignment)
    result = {
        "regret": regret,
        "regret_drawn": regret_drawn,
        "rank_among_random": int((randoms < ours).sum()) + 1,
        "random": {
            "count": RANDOM,
            "best": randoms.min(),
            "median": float(np.median(randoms)),
            "worst": randoms.max(),
        },
        "rules": dict(zip(rules, others, strict=True)),
        "rules_damped": {
            name: _nats(judge, _damped(recipe, writes)) for name, recipe in rules.items()
        },
        "ours": ours,
        "ours_drawn": _placed(on_drawn, randoms),
        "ours_damped": _placed(_nats(judge, ours_damped), randoms),
        "verified": _placed(best, randoms),
        "recipes": {
            "ours": str(plans[0]),
            "ours_drawn": str(drawn),
            "ours_damped": ours_damped.dump(),
            "verified": str(verified),
            **{name: str(recipe) for name, recipe in rules.items()},
        },
        "donors": {name: judge.donor(name) for name in names},
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    table = Table(
        title=f"{depth} blocks: rank {result['rank_among_random']} among {RANDOM} random; single-seam regret {result['regret']:.1%}"
    )
    for column in ("recipe", "nats/token"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    rows = {
        "ours": ours,
        "ours, by drawn tokens": on_drawn,
        "the same, damped": result["ours_damped"]["nats"],
        "ours, verified": best,
        "best random": randoms.min(),
        "median random": float(np.median(randoms)),
    } | result["rules"]
    for name, value in sorted(rows.items(), key=lambda item: item[1]):
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


def _damped(recipe: Recipe, writes: Sequence[str]) -> Recipe:
    """Every block damped by how often it is gone through."""
    passes = Counter(block.index for block in recipe.blocks)
    return damped(recipe, [1 / passes[block.index] for block in recipe.blocks], writes)


def _nats(bank: Bank, recipe: Recipe) -> float:
    return bank.bench.recipe(str(recipe), recipe).total.nats_per_token


def _placed(nats: float, randoms: np.ndarray) -> dict[str, float | int]:
    return {"nats": nats, "rank_among_random": int((randoms < nats).sum()) + 1}


def _best_on_drawn(bank: Bank, recipes: list[Recipe]) -> Recipe:
    models = {name: bank.bench.load(name)[1] for name in bank.names}
    return recipes[int(np.argmin(damage_on_sampled(recipes, bank.checkpoints, models)))]


def _regret(bank: Bank, names: list[str], alignment) -> tuple[float, float]:
    """The single-seam choice's loss above the best of its depth, over the spread of that depth; mean over depths with a choice.

    Of the plan that is predicted to be the best, and of the best on drawn tokens.
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
            chosen = np.array(bank.losses([plans[0], _best_on_drawn(bank, plans)]))
            regrets.append((chosen - losses.min()) / np.ptp(losses))
    ours, drawn = np.mean(regrets, axis=0).tolist()
    return ours, drawn


def _evolved(donors: dict[str, int], depth: int, bank: Bank) -> Recipe:
    """A (4 + 1) evolution of `EVALUATIONS` recipes in all: a seam of one of the best four is moved by a block or two."""
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
    """Take blocks from one side of a seam and add as many to the other, where there are any."""
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
