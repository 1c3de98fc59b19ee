"""`plan`: from alignments to recipes."""

import re
from pathlib import Path
from typing import NamedTuple

import click

from frankenmerge.cli.console import (
    device_option,
    dtype_option,
    json_option,
    out,
    output_option,
    print_json,
    table,
)
from frankenmerge.errors import fail
from frankenmerge.workflows.measuring import HANDFUL, SAMPLED, Bench, calibrated, damped, verified


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


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _count(_context, _parameter, value: str | None) -> int | None:
    """Read a number of parameters as people write it: `11B`, `1.5M`, `300000`."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", value.strip().upper())
    if not match:
        raise click.BadParameter(
            f"{value!r} is no number of parameters; write for example 11B or 1.5M"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def _texts(_context, _parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if SAMPLED in values and len(values) > 1:
        raise click.BadParameter(
            f"{SAMPLED!r} stands alone: either tokens that the donors draw, or texts"
        )
    return values


def _measuring(option: str, what: str):
    return click.option(
        option, multiple=True, metavar=f"TEXT|{SAMPLED}", callback=_texts, help=what
    )


@click.command()
@click.argument("alignments", nargs=-1, required=True, type=click.Path(path_type=Path))
@output_option("Where the best recipe goes; its evidence goes beside it.")
@click.option(
    "--depth",
    type=click.IntRange(1),
    help="Blocks of the result. [default: half as many again as the deepest donor has]",
)
@click.option(
    "--parameters",
    callback=_count,
    metavar="N",
    help="In the place of a depth: as many blocks as N parameters hold, as 11B.",
)
@click.option(
    "--max-seams", type=click.IntRange(1), default=4, show_default=True, help="Most seams."
)
@click.option(
    "--min-slice",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Fewest blocks of a slice.",
)
@click.option(
    "--protect-first",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Blocks at a donor's beginning that only begin.",
)
@click.option(
    "--protect-last",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Blocks at a donor's end that only end.",
)
@click.option(
    "--max-back",
    type=click.IntRange(0),
    help="Most blocks that are gone through again at one seam.",
)
@click.option(
    "--use",
    multiple=True,
    metavar="DONOR:BLOCKS",
    callback=_named,
    help="Blocks that must be used, as A:3 or A:3-5; may be repeated.",
)
@click.option(
    "--avoid",
    multiple=True,
    metavar="DONOR:BLOCKS",
    callback=_named,
    help="Blocks that must not be used; may be repeated.",
)
@click.option(
    "--share",
    "shares",
    multiple=True,
    metavar="DONOR:LOW-HIGH",
    callback=_named,
    help="A donor's part of the blocks, as A:0.4-0.6; may be repeated.",
)
@click.option(
    "--top", type=click.IntRange(1), default=1, show_default=True, help="How many recipes to write."
)
@click.option(
    "--differ",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="In how many blocks they must differ.",
)
@click.option(
    "--front",
    "whole_front",
    is_flag=True,
    help="Show the least damage of every depth up to --depth as well.",
)
@_measuring(
    "--calibrate",
    f"Measure {HANDFUL} splices on this text to predict by; '{SAMPLED}': on tokens that the donors draw.",
)
@_measuring("--verify", "Measure the plans on this, and rank them by that.")
@_measuring(
    "--damp",
    "Scale down what repeated blocks write, where that loses less on this, and rank the plans by it.",
)
@device_option
@dtype_option
@json_option
def plan(
    alignments: tuple[Path, ...],
    output: Path,
    depth: int | None,
    parameters: int | None,
    max_seams: int,
    min_slice: int,
    protect_first: int,
    protect_last: int,
    max_back: int | None,
    use: list[_Named],
    avoid: list[_Named],
    shares: list[_Named],
    top: int,
    differ: int,
    whole_front: bool,
    calibrate: tuple[str, ...],
    verify: tuple[str, ...],
    damp: tuple[str, ...],
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Choose the splices that ALIGNMENTS predict to do the least damage, and write them as recipes.

    Every donor of the alignments is used. The evidence for every seam is written beside the recipe,
    as NAME.evidence.json.
    """
    from frankenmerge.artefacts.alignment import load_alignment
    from frankenmerge.planning.plan import front
    from frankenmerge.planning.plan import plan as planned
    from frankenmerge.planning.prediction import default_model
    from frankenmerge.planning.search import Constraints

    loaded = [load_alignment(path) for path in alignments]
    donors = list(dict.fromkeys(name for alignment in loaded for name in alignment.donors))
    deepest = max(blocks for alignment in loaded for blocks in alignment.blocks)
    if depth and parameters:
        raise fail("plan", "either --depth or --parameters", "both", "leave one out")
    constraints = Constraints(
        depth or (_depth_within(parameters, donors) if parameters else deepest * 3 // 2),
        max_seams,
        min_slice,
        protect_first,
        protect_last,
        max_back,
        _blocks(use, donors),
        _blocks(avoid, donors),
        {_donor(share.donor, donors): (share.low, share.high) for share in shares},
    )
    placed = {"device": device, "dtype": dtype}
    model = calibrated(loaded, Bench(donors, calibrate, placed)) if calibrate else default_model()
    plans = planned(loaded, constraints, top=top, differ=differ, model=model)
    if verify:
        plans = verified(plans, Bench(donors, verify, placed), model)
    tried = None
    if damp:
        plans, tried = damped(plans, loaded, Bench(donors, damp, placed), model)
    paths = write_plans(plans, output, constraints, model)
    depths = front(loaded, constraints, model=model) if whole_front else []
    if as_json:
        told = (
            {
                "front": [
                    {
                        "depth": len(entry.recipe.blocks),
                        "predicted_damage": entry.predicted_damage,
                        "summary": str(entry.recipe),
                    }
                    for entry in depths
                ]
            }
            if depths
            else {}
        )
        told |= {} if tried is None else {"damping": tried._asdict()}
        print_json(
            _plans_as_json(plans, constraints, model)
            | {"written": [str(path) for path in paths]}
            | told
        )
        return
    console = out()
    for title, entries, names in (
        (
            "The least damage of every depth",
            depths,
            [str(len(entry.recipe.blocks)) for entry in depths],
        ),
        (f"Plans of {constraints.depth} blocks", plans, [path.name for path in paths]),
    ):
        if not entries:
            continue
        made = table(
            title,
            "recipe",
            "seams",
            "damage",
            "9 of 10 in",
            *(["measured"] if entries[0].measured is not None else []),
            "depth" if entries is depths else "file",
        )
        for name, entry in zip(names, entries, strict=True):
            low, high = entry.interval
            measured = [] if entry.measured is None else [f"{entry.measured:.3f}"]
            made.add_row(
                str(entry.recipe),
                str(len(entry.seams)),
                f"{entry.predicted_damage:z.3f}",
                f"{low:z.2f} to {high:z.2f}",
                *measured,
                name,
            )
        console.print(made)
    print_seams(console, plans[0].seams)
    if tried is not None:
        print_damping(console, tried)
    console.print(
        "Damage is predicted in nats per token above the donors' own loss, each donor's by its share of the blocks."
    )


def _donor(name: str, donors: list[str]) -> str:
    """The donor's name in the alignments: as it stands there, or the last part of that."""
    found = [donor for donor in donors if name in (donor, Path(donor).name)]
    if len(found) != 1:
        raise fail(
            "plan",
            f"a donor of the alignments: {', '.join(donors)}",
            name,
            "name it as it stands there",
        )
    return found[0]


def _blocks(named: list[_Named], donors: list[str]) -> frozenset[tuple[str, int]]:
    return frozenset(
        (_donor(entry.donor, donors), block)
        for entry in named
        for block in range(int(entry.low), int(entry.high) + 1)
    )


def _depth_within(parameters: int, donors: list[str]) -> int:
    """The most blocks that a budget holds besides embedding, final norm and head."""
    from frankenmerge.artefacts.recipe import open_donor
    from frankenmerge.splicing.compatibility import depth_within

    return depth_within(parameters, [open_donor(name) for name in donors])


def write_plans(plans, output: Path, constraints, model) -> list[Path]:
    """Write the best recipe to `output`, the others to NAME.2.yaml and on, the evidence of all to NAME.evidence.json."""
    import json

    from frankenmerge.storage.atomic import write_file

    paths = [
        output,
        *(
            output.with_name(f"{output.stem}.{rank}{output.suffix}")
            for rank in range(2, len(plans) + 1)
        ),
    ]
    for path, entry in zip(paths, plans, strict=True):
        write_file(path, entry.recipe.dump().encode())
    told = (
        json.dumps(_plans_as_json(plans, constraints, model), indent=1, ensure_ascii=False) + "\n"
    )
    write_file(output.with_suffix(".evidence.json"), told.encode())
    return paths


def _plans_as_json(plans, constraints, model) -> dict:
    return {
        "plans": [entry.as_json() for entry in plans],
        "constraints": constraints.as_json(),
        "model": model.as_json(),
    }


def print_damping(console, tried) -> None:
    """Show what damping the best plan's repeated blocks gained."""
    ways = ", ".join(f"{name} {value:z.3f}" for name, value in tried.damage.items())
    console.print(
        f"Writes of repeated blocks scaled, nats per token lost: {ways}. Kept: {tried.kept or 'none'}."
    )


def print_seams(console, seams) -> None:
    """Show every seam in a line: what it joins, what it would cost alone, and how far the donors' tokens agree there."""
    for number, seam in enumerate(seams, 1):
        after, before = (f"{Path(block.model).name} block {block.index}" for block in seam.seam)
        kind = (
            f"{seam.skipped} skipped"
            if seam.skipped > 0
            else f"{-seam.skipped} again"
            if seam.skipped
            else "same depth"
        )
        agree, chance = seam.scores["jaccard"], seam.nulls["jaccard"]["permuted_neurons"]
        told = f"alone {seam.cost:.3f}; tokens agree {agree:.3f}, by chance {chance:.3f}"
        console.print(f"Seam {number}: {after} -> {before} ({kind}): {told}", markup=False)
        if seam.gauged:
            console.print(
                "  As they are no better than chance, but rotated into one basis: the recipe has a gauge here."
            )
        elif seam.by_chance:
            console.print(
                "  [bold red]No better than chance:[/] these donors share no basis here; expect noise behind this seam.",
                markup=True,
            )
