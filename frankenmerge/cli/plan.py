"""`plan`: from alignments to recipes."""

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from rich.console import Console

from frankenmerge.cli.console import (
    device_option,
    download_option,
    dtype_option,
    json_option,
    out,
    output_option,
    print_json,
    print_remarks,
    progress,
    table,
)
from frankenmerge.cli.measuring import (
    SAMPLED,
    gain_option,
    measured_on,
    measuring_option,
    separator_option,
)
from frankenmerge.cli.tables import print_damping, print_seams
from frankenmerge.errors import fail

if TYPE_CHECKING:
    from frankenmerge.planning.plan import Plan
    from frankenmerge.planning.search import Constraints
    from frankenmerge.workflows.planning import Planned


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
            example = "A:0.4-0.6" if parameter.name == "shares" else "A:3-5"
            raise click.BadParameter(f"{value!r}; write {parameter.metavar}, such as {example}")
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
            f"{value!r} is not a number of parameters; write for example 11B or 1.5M"
        )
    return int(float(match[1]) * _UNITS[match[2]])


_OF_DAMAGE = ("use", "avoid", "shares", "differ", "calibrate", "verify", "damp")
"""Options that only plans of the least damage have."""


@click.command()
@click.argument("alignments", nargs=-1, required=True, type=click.Path(path_type=Path))
@output_option("Where to write the best recipe; its evidence is written next to it.")
@click.option(
    "--depth",
    type=click.IntRange(1),
    help="Blocks of the result. [default: 1.5 times the deepest donor's]",
)
@click.option(
    "--parameters",
    callback=_count,
    metavar="N",
    help="Parameter budget instead of --depth, e.g. 11B.",
)
@click.option(
    "--max-seams",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Maximum number of seams.",
)
@click.option(
    "--min-slice",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Minimum number of blocks in a slice.",
)
@click.option(
    "--protect-first",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Keep a donor's first N blocks together at the start of the result.",
)
@click.option(
    "--protect-last",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Keep a donor's last N blocks together at the end of the result.",
)
@click.option(
    "--max-back",
    type=click.IntRange(0),
    help="Maximum number of blocks that a seam may repeat.",
)
@click.option(
    "--use",
    multiple=True,
    metavar="DONOR:BLOCKS",
    callback=_named,
    help="Blocks that must be used, such as A:3 or A:3-5. May be repeated.",
)
@click.option(
    "--avoid",
    multiple=True,
    metavar="DONOR:BLOCKS",
    callback=_named,
    help="Blocks that must not be used. May be repeated.",
)
@click.option(
    "--share",
    "shares",
    multiple=True,
    metavar="DONOR:LOW-HIGH",
    callback=_named,
    help="A donor's share of the blocks, such as A:0.4-0.6. May be repeated.",
)
@click.option(
    "--top",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of recipes to write.",
)
@click.option(
    "--differ",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of blocks in which they must differ.",
)
@click.option(
    "--front",
    is_flag=True,
    help="Also show the least predicted damage of every depth up to --depth.",
)
@click.option(
    "--objective",
    type=click.Choice(["damage", "gain"]),
    default="damage",
    show_default=True,
    help="Least damage at one depth, or the most gain against the best donor.",
)
@click.option(
    "--sweep",
    is_flag=True,
    help="Of one DONOR: run every window of its blocks twice, with several scales, and show which "
    "gain on --on.",
)
@click.option(
    "--scale",
    "scales",
    multiple=True,
    type=click.FloatRange(0, min_open=True),
    help="With --sweep, what the second pass of a window is scaled by. May be repeated. [default: "
    "0.1, 0.5 and 1]",
)
@click.option(
    "--random",
    type=click.IntRange(1),
    metavar="N",
    help="Of DONORS: write N random recipes within --max-seams and --min-slice, as controls.",
)
@gain_option("--on", "With --objective gain or --sweep, measure on this. [default: sampled]")
@click.option(
    "--base",
    metavar="DONOR",
    help="With --objective gain, the model that the donors were fine-tuned from.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="With --objective gain, of sampled tokens and resamples; with --random, of the recipes.",
)
@measuring_option(
    "--calibrate",
    f"Measure 16 splices on this text, or with '{SAMPLED}' on tokens that the donors generate, "
    "and predict by them.",
)
@measuring_option("--verify", "Measure the plans on this, and rank them by the result.")
@measuring_option("--damp", "Scale what repeated blocks write where that loses less on this.")
@separator_option
@device_option
@dtype_option
@download_option
@json_option
def plan(
    alignments: tuple[Path, ...],
    output: Path,
    device: str,
    dtype: str,
    as_json: bool,
    front: bool,
    **options: Any,
) -> None:
    """Choose the splices that ALIGNMENTS predict to do the least damage, and write them as recipes.

    Every donor of the alignments is used. The evidence for every seam is written next to the
    recipe, as NAME.evidence.json.

    With --objective gain, search for recipes that are better than the best donor: stacks,
    exchanges and averages of blocks and their parts, task arithmetic, damped repeats. They are
    compared on half of the tokens and confirmed on the other half, beside the best donor, the
    uniform average and the donors' ensemble; the figures are written as NAME.gain.json. That no
    gain is shown is an answer as any other. Without --depth recipes of every depth are searched.

    With --sweep, give a donor in place of alignments; what was measured is written as
    NAME.sweep.json. A sweep that was interrupted goes on where it was. With --random, give donors.
    """
    if options["random"]:
        from frankenmerge.cli.random_plans import plan_random

        plan_random(alignments, output, options, as_json=as_json)
        return
    if options["sweep"]:
        from frankenmerge.cli.gain import plan_sweep

        plan_sweep(alignments, output, options, device, dtype, as_json=as_json)
        return
    from frankenmerge.artefacts.alignment import load_alignment
    from frankenmerge.workflows.planning import (
        PlanOptions,
        least_damage_by_depth,
        plan_recipes,
        write_plans,
    )

    loaded = [load_alignment(path) for path in alignments]
    constraints = _constraints(options, loaded)
    if options["objective"] == "gain":
        from frankenmerge.cli.gain import plan_gain

        given = [name for name in _OF_DAMAGE if options[name]] + ["front"] * front
        if given:
            found = ", ".join(
                f"--{name.removesuffix('s') if name == 'shares' else name}" for name in given
            )
            expected = "no option of plans of the least damage"
            raise fail("plan --objective gain", expected, found, "leave it out")
        plan_gain(loaded, output, constraints, options, device, dtype, as_json=as_json)
        return
    if options["on"] or options["base"]:
        expected = "--objective gain beside --on and --base"
        raise fail("plan", expected, "--objective damage", "add --objective gain")
    read = partial(measured_on, separator=options["separator"], download=options["download"])
    calibrate = read(options["calibrate"])
    verify = read(options["verify"])
    damp = read(options["damp"])
    placement = None
    if calibrate or verify or damp:
        from frankenmerge.models.loading import Placement

        placement = Placement(dtype, device)
    chosen = PlanOptions(
        constraints,
        top=options["top"],
        differ=options["differ"],
        calibrate=calibrate,
        verify=verify,
        damp=damp,
        placement=placement,
        download=options["download"],
    )
    planned = plan_recipes(loaded, chosen, progress=progress)
    paths = write_plans(planned, output)
    print_remarks(planned.remarks)
    depths = least_damage_by_depth(loaded, constraints, planned.model) if front else []
    if as_json:
        print_json(_as_json(planned, paths, depths))
    else:
        _print(planned, paths, depths, constraints.depth)


def _constraints(options: dict[str, Any], alignments: list) -> "Constraints":
    from frankenmerge.planning.search import Constraints
    from frankenmerge.workflows.planning import depth_for

    donors = list(dict.fromkeys(name for alignment in alignments for name in alignment.donors))
    deepest = max(blocks for alignment in alignments for blocks in alignment.blocks)
    depth, parameters = options["depth"], options["parameters"]
    if depth and parameters:
        raise fail("plan", "either --depth or --parameters", "both", "leave one out")
    if parameters:
        depth = depth_for(parameters, alignments, download=options["download"])
    return Constraints(
        depth=depth or deepest * 3 // 2,
        max_seams=options["max_seams"],
        min_slice=options["min_slice"],
        protect_first=options["protect_first"],
        protect_last=options["protect_last"],
        max_back=options["max_back"],
        required=_blocks(options["use"], donors),
        avoided=_blocks(options["avoid"], donors),
        shares={
            _donor(share.donor, donors): (share.low, share.high) for share in options["shares"]
        },
    )


def _donor(name: str, donors: list[str]) -> str:
    """The donor's name in the alignments: the same, or the one whose last part it is."""
    found = [donor for donor in donors if name in (donor, Path(donor).name)]
    if len(found) != 1:
        expected, remedy = f"a donor of the alignments: {', '.join(donors)}", "use its full name"
        raise fail("plan", expected, name, remedy)
    return found[0]


def _blocks(named: list[_Named], donors: list[str]) -> frozenset[tuple[str, int]]:
    return frozenset(
        (_donor(entry.donor, donors), block)
        for entry in named
        for block in range(int(entry.low), int(entry.high) + 1)
    )


def _as_json(planned: "Planned", paths: list[Path], depths: "list[Plan]") -> dict[str, Any]:
    found = planned.evidence.as_json() | {"written": [str(path) for path in paths]}
    if depths:
        found["front"] = [
            {
                "depth": len(entry.recipe.blocks),
                "predicted_damage": entry.predicted_damage,
                "summary": str(entry.recipe),
            }
            for entry in depths
        ]
    if planned.damped is not None:
        found["damping"] = planned.damped._asdict()
    return found


def _print(planned: "Planned", paths: list[Path], depths: "list[Plan]", depth: int) -> None:
    console = out()
    if depths:
        names = [str(len(entry.recipe.blocks)) for entry in depths]
        _print_plans(console, "Least damage of every depth", depths, "depth", names)
    names = [path.name for path in paths]
    _print_plans(console, f"Plans of {depth} blocks", planned.plans, "file", names)
    print_seams(console, planned.plans[0].seams)
    if planned.damped is not None:
        print_damping(console, planned.damped)
    console.print(
        "Damage is in nats per token above the donors' own loss, each by its share of the blocks."
    )


def _print_plans(
    console: Console, title: str, plans: "list[Plan]", column: str, names: list[str]
) -> None:
    measured = ["measured"] if plans[0].measured is not None else []
    made = table(title, "recipe", "seams", "damage", "90 % in", *measured, column)
    for name, entry in zip(names, plans, strict=True):
        low, high = entry.interval
        made.add_row(
            str(entry.recipe),
            str(len(entry.seams)),
            f"{entry.predicted_damage:z.3f}",
            f"{low:z.2f} to {high:z.2f}",
            *([] if entry.measured is None else [f"{entry.measured:.3f}"]),
            name,
        )
    console.print(made)
