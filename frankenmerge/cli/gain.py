"""`plan --objective gain`: search, write, and say what was won against the best donor."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from frankenmerge.cli.console import out, print_json, progress, table
from frankenmerge.cli.measuring import gains_on
from frankenmerge.cli.tables import signed_interval, task_differences_tables
from frankenmerge.errors import fail

if TYPE_CHECKING:
    from rich.console import Console

    from frankenmerge.artefacts.alignment import Alignment
    from frankenmerge.artefacts.gain import GainFile
    from frankenmerge.artefacts.sweep import Sweep
    from frankenmerge.planning.search import Constraints


def plan_gain(
    alignments: "Sequence[Alignment]",
    output: Path,
    constraints: "Constraints",
    options: dict[str, Any],
    device: str,
    dtype: str,
    *,
    as_json: bool,
) -> None:
    """Run the search that the command line asks for."""
    from frankenmerge.models.loading import Placement
    from frankenmerge.workflows.gaining import GainOptions, plan_gains, write_gains

    started = perf_counter()
    chosen = GainOptions(
        gains_on(options["on"], options["separator"], download=options["download"]),
        constraints,
        any_depth=not (options["depth"] or options["parameters"]),
        base=options["base"],
        top=options["top"],
        seed=options["seed"],
        placement=Placement(dtype, device),
        download=options["download"],
    )
    gains = plan_gains(alignments, chosen, progress=progress)
    found, paths = write_gains(gains, chosen, output)
    seconds = perf_counter() - started
    if as_json:
        written = {"written": [str(path) for path in paths], "seconds": seconds}
        print_json(found.as_json() | written)
    else:
        print_gains(out(), found, [path.name for path in paths])
        out().print(
            f"{found.candidates} candidates for {found.passes} passes of a donor, {seconds:.0f} s."
        )
        for reason, count in found.refused.items():
            out().print(f"Not possible with these donors: {count} of {reason}", markup=False)


def plan_sweep(
    donors: Sequence[Path],
    output: Path,
    options: dict[str, Any],
    device: str,
    dtype: str,
    *,
    as_json: bool,
) -> None:
    """Sweep the windows of the one donor that the command line names."""
    from frankenmerge.models.loading import Placement
    from frankenmerge.splicing.opening import open_donor
    from frankenmerge.storage.atomic import write_file
    from frankenmerge.workflows.sweeping import SweepOptions, sweep

    started = perf_counter()
    if len(donors) != 1:
        found, remedy = f"{len(donors)}", "sweep one donor after the other"
        raise fail("plan --sweep", "one donor", found, remedy)
    on = gains_on(options["on"], options["separator"], download=options["download"])
    scales = tuple(dict.fromkeys(options["scales"])) or None
    chosen = SweepOptions(on, options["seed"], Placement(dtype, device), scales)
    donor = open_donor(str(donors[0]), download=options["download"])
    made, recipe = sweep(donor, chosen, output, progress=progress)
    write_file(output, recipe.dump().encode())
    if as_json:
        print_json(made.as_json() | {"seconds": perf_counter() - started})
    else:
        _print_sweep(out(), made)
        out().print(f"Written to {output}", markup=False)


def _print_sweep(console: "Console", made: "Sweep") -> None:
    columns = ("window", "scale", "selected", "confirmed", "95 % in")
    shown = table("Windows run twice: gain over the donor (nats per token)", *columns)
    for each in made.confirmed:
        shown.add_row(
            f"[{each.start}, {each.stop})",
            f"{each.scale:g}",
            f"{each.selected:+.4f}",
            f"{each.gain:+.4f}",
            signed_interval(each.interval),
        )
    console.print(shown)
    console.print(made.verdict)


def print_gains(console: "Console", found: "GainFile", names: Sequence[str]) -> None:
    """Show plans beside the best donor, the uniform average and the donors' ensemble."""
    controls = found.controls
    made = table(
        f"Gain against the best donor (nats per {found.unit})",
        "recipe",
        "kind",
        "gain",
        "95 % in",
        "file",
    )
    for plan, name in zip(found.plans, names, strict=True):
        interval = signed_interval(plan.interval)
        made.add_row(plan.summary, plan.kind, f"{plan.gain:+.4f}", interval, name)
    for name, control in (("uniform average", controls.average), ("ensemble", controls.ensemble)):
        if control:
            interval = signed_interval(control.interval)
            made.add_row(name, "control", f"{control.gain:+.4f}", interval, "")
    made.add_row(Path(controls.best_donor.name).name, "best donor", "0", "", "")
    console.print(made)
    for tested in task_differences_tables(found.tasks):
        console.print(tested)
    console.print(f"Measured on {found.tokens:,} {found.unit}s that nothing was chosen by.")
    console.print(found.verdict, markup=False)
    if expected := found.plans[0].text_interval:
        low, high = expected
        console.print(f"On a text of the donors' kinds expect {low:+.3f} to {high:+.3f} (90 %).")
