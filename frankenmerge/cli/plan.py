"""`plan`: from alignments to recipes."""

import re
from pathlib import Path
from typing import NamedTuple

import click

from frankenmerge.cli.console import device_option, dtype_option, json_option, out, print_json, progress, table
from frankenmerge.errors import fail

HANDFUL = 16
"""Splices measured to calibrate the prediction."""


class _Named(NamedTuple):
    """What an option says of a donor."""

    donor: str
    low: float
    high: float


def _named(_context, parameter, values: tuple[str, ...]) -> list[_Named]:
    """Read `DONOR:3`, `DONOR:3-5` or `DONOR:0.4-0.6`."""
    found = []
    for value in values:
        match = re.fullmatch(r"(.+):(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?", value)
        if not match:
            raise click.BadParameter(
                f"{value!r}; write {parameter.metavar}, for example {'A:0.4-0.6' if parameter.name == 'shares' else 'A:3-5'}"
            )
        found.append(_Named(match[1], float(match[2]), float(match[3] or match[2])))
    return found


@click.command()
@click.argument("alignments", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Where the best recipe goes; its evidence goes beside it."
)
@click.option("--depth", type=click.IntRange(1), help="Blocks of the result. [default: half as many again as the deepest donor has]")
@click.option("--max-seams", type=click.IntRange(1), default=4, show_default=True, help="Most seams.")
@click.option("--min-slice", type=click.IntRange(1), default=2, show_default=True, help="Fewest blocks of a slice.")
@click.option(
    "--protect-first", type=click.IntRange(0), default=1, show_default=True, help="Blocks at a donor's beginning that only begin."
)
@click.option("--protect-last", type=click.IntRange(0), default=1, show_default=True, help="Blocks at a donor's end that only end.")
@click.option("--max-back", type=click.IntRange(0), help="Most blocks that are gone through again at one seam.")
@click.option(
    "--use", multiple=True, metavar="DONOR:BLOCKS", callback=_named, help="Blocks that must be used, as A:3 or A:3-5; may be repeated."
)
@click.option("--avoid", multiple=True, metavar="DONOR:BLOCKS", callback=_named, help="Blocks that must not be used; may be repeated.")
@click.option(
    "--share",
    "shares",
    multiple=True,
    metavar="DONOR:LOW-HIGH",
    callback=_named,
    help="A donor's part of the blocks, as A:0.4-0.6; may be repeated.",
)
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="How many recipes to write.")
@click.option("--differ", type=click.IntRange(0), default=0, show_default=True, help="In how many blocks they must differ.")
@click.option("--front", "whole_front", is_flag=True, help="Show the least damage of every depth up to --depth as well.")
@click.option("--calibrate", multiple=True, type=click.Path(path_type=Path), help=f"Measure {HANDFUL} splices on this text to predict by.")
@click.option("--verify", multiple=True, type=click.Path(path_type=Path), help="Measure the plans on this text, and rank them by that.")
@device_option
@dtype_option
@json_option
def plan(
    alignments: tuple[Path, ...], output: Path, depth: int | None, max_seams: int, min_slice: int, protect_first: int, protect_last: int,
    max_back: int | None, use: list[_Named], avoid: list[_Named], shares: list[_Named], top: int, differ: int, whole_front: bool,
    calibrate: tuple[Path, ...], verify: tuple[Path, ...], device: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Choose the splices that ALIGNMENTS predict to do the least damage, and write them as recipes.

    Every donor of the alignments is used. The evidence for every seam is written beside the recipe, as NAME.evidence.json.
    """
    from frankenmerge.alignment import load_alignment
    from frankenmerge.planning.plan import front
    from frankenmerge.planning.plan import plan as planned
    from frankenmerge.planning.prediction import default_model
    from frankenmerge.planning.search import Constraints

    loaded = [load_alignment(path) for path in alignments]
    donors = list(dict.fromkeys(name for alignment in loaded for name in alignment.donors))
    deepest = max(blocks for alignment in loaded for blocks in alignment.blocks)
    constraints = Constraints(
        depth or deepest * 3 // 2, max_seams, min_slice, protect_first, protect_last, max_back,
        _blocks(use, donors), _blocks(avoid, donors), {_donor(share.donor, donors): (share.low, share.high) for share in shares},
    )  # fmt: skip
    bench = {"device": device, "dtype": dtype}
    model = _calibrated(loaded, calibrate, donors, bench) if calibrate else default_model()
    plans = planned(loaded, constraints, top=top, differ=differ, model=model)
    if verify:
        plans = _verified(plans, verify, donors, bench)
    paths = write_plans(plans, output, constraints, model)
    depths = front(loaded, constraints, model=model) if whole_front else []
    if as_json:
        told = {"front": [{"depth": len(entry.recipe.blocks), "predicted_damage": entry.predicted_damage, "summary": str(entry.recipe)}
                          for entry in depths]} if depths else {}  # fmt: skip
        print_json(_plans_as_json(plans, constraints, model) | {"written": [str(path) for path in paths]} | told)
        return
    console = out()
    for title, entries, names in (
        ("The least damage of every depth", depths, [str(len(entry.recipe.blocks)) for entry in depths]),
        (f"Plans of {constraints.depth} blocks", plans, [path.name for path in paths]),
    ):
        if not entries:
            continue
        made = table(title, "recipe", "seams", "damage", "9 of 10 in", *(["measured"] if entries[0].measured is not None else []),
                     "depth" if entries is depths else "file")  # fmt: skip
        for name, entry in zip(names, entries, strict=True):
            low, high = entry.interval
            measured = [] if entry.measured is None else [f"{entry.measured:.3f}"]
            made.add_row(
                str(entry.recipe), str(len(entry.seams)), f"{entry.predicted_damage:.3f}", f"{low:.2f}-{high:.2f}", *measured, name
            )
        console.print(made)
    for number, seam in enumerate(plans[0].seams, 1):
        print_seam(console, number, seam)
    console.print("Damage is predicted in nats per token above the donors' own loss, each donor's by its share of the blocks.")


def _donor(name: str, donors: list[str]) -> str:
    """The donor's name in the alignments: as it stands there, or the last part of that."""
    found = [donor for donor in donors if name in (donor, Path(donor).name)]
    if len(found) != 1:
        raise fail("plan", f"a donor of the alignments: {', '.join(donors)}", name, "name it as it stands there")
    return found[0]


def _blocks(named: list[_Named], donors: list[str]) -> frozenset[tuple[str, int]]:
    return frozenset((_donor(entry.donor, donors), block) for entry in named for block in range(int(entry.low), int(entry.high) + 1))


def _measured(recipes: list, texts: tuple[Path, ...], donors: list[str], bench_options: dict) -> list[float]:
    """Damage of recipes, what they begin with alike run once."""
    from frankenmerge.evaluation.compare import Bench, read_text
    from frankenmerge.planning.prediction import donor_loss

    bench = Bench([read_text(text) for text in texts], donors, **bench_options)
    with progress("splicing", len(recipes) * len(texts), "recipes") as advance:
        results = bench.recipes(recipes, progress=advance)
    own = {name: bench.checkpoint(name).total.nats_per_token for name in donors}
    return [result.total.nats_per_token - donor_loss(recipe.blocks, own) for result, recipe in zip(results, recipes, strict=True)]


def _calibrated(alignments: list, texts: tuple[Path, ...], donors: list[str], bench_options: dict):
    import numpy as np

    from frankenmerge.planning.plan import spread_splices
    from frankenmerge.planning.prediction import default_model, features, refined
    from frankenmerge.planning.states import states_of

    recipes = spread_splices(alignments, HANDFUL)
    damage = _measured(recipes, texts, donors, bench_options)
    found = features([recipe.blocks for recipe in recipes], states_of(alignments))
    origin = {"refined": default_model().origin, "texts": [str(text) for text in texts], "splices": len(recipes)}
    return refined(default_model(), found, np.array(damage), origin)


def _verified(plans: list, texts: tuple[Path, ...], donors: list[str], bench_options: dict) -> list:
    damage = _measured([entry.recipe for entry in plans], texts, donors, bench_options)
    return sorted((entry._replace(measured=value) for entry, value in zip(plans, damage, strict=True)), key=lambda entry: entry.measured)


def write_plans(plans, output: Path, constraints, model) -> list[Path]:
    """Write the best recipe to `output`, the others to NAME.2.yaml and on, the evidence of all to NAME.evidence.json."""
    import json

    from frankenmerge.files import write_file

    paths = [output, *(output.with_name(f"{output.stem}.{rank}{output.suffix}") for rank in range(2, len(plans) + 1))]
    for path, entry in zip(paths, plans, strict=True):
        write_file(path, entry.recipe.dump().encode())
    told = json.dumps(_plans_as_json(plans, constraints, model), indent=1, ensure_ascii=False) + "\n"
    write_file(output.with_suffix(".evidence.json"), told.encode())
    return paths


def _plans_as_json(plans, constraints, model) -> dict:
    return {"plans": [entry.as_json() for entry in plans], "constraints": constraints.as_json(), "model": model.as_json()}


def print_seam(console, number: int, seam) -> None:
    """Show one seam's evidence: scores beside their nulls, and the neurons that agree and disagree most."""
    after, before = (f"{Path(block.model).name} block {block.index}" for block in seam.seam)
    kind = f"{seam.skipped} skipped" if seam.skipped > 0 else f"{-seam.skipped} gone through again" if seam.skipped else "same depth"
    nulls = list(dict.fromkeys(null for entry in seam.nulls.values() for null in entry))
    made = table(f"Seam {number}: {after} -> {before} ({kind})", "score", "here", *nulls)
    for name, value in seam.scores.items():
        made.add_row(name, f"{value:.3f}", *(f"{seam.nulls[name][null]:.3f}" if null in seam.nulls[name] else "" for null in nulls))
    console.print(made)
    agree = "; ".join(f"{entry['neuron']}: {' '.join(map(repr, entry['shared'][:3])) or 'nothing'}" for entry in seam.agree[:3])
    console.print(f"  Neurons that agree most, with the tokens they share: {agree}", markup=False)
    disagree = "; ".join(
        f"{entry['neuron']}: {' '.join(map(repr, entry['tokens'][0][:2]))} | {' '.join(map(repr, entry['tokens'][1][:2]))}"
        for entry in seam.disagree[:2]
    )
    console.print(f"  Neurons that agree least, with each donor's tokens: {disagree}", markup=False)
    if seam.gauged:
        console.print("  As they are no better than chance, but turned into one basis: the recipe has a gauge here.")
    elif seam.by_chance:
        console.print("  [bold red]No better than chance:[/] these donors share no basis here; expect noise behind this seam.")
