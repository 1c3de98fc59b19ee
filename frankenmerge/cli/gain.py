"""`plan --objective gain`: search, write, and say what was won against the best donor."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from frankenmerge.cli.console import out, print_json, progress, table
from frankenmerge.cli.measuring import SAMPLED, measured_on
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
        measured_on(options["on"]) or SAMPLED,
        constraints,
        any_depth=not (options["depth"] or options["parameters"]),
        base=options["base"],
        top=options["top"],
        seed=options["seed"],
        placement=Placement(dtype, device),
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
    on = measured_on(options["on"]) or SAMPLED
    chosen = SweepOptions(on, options["seed"], Placement(dtype, device))
    made, recipe = sweep(open_donor(str(donors[0])), chosen, output, progress=progress)
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
        low, high = each.interval
        shown.add_row(
            f"[{each.start}, {each.stop})",
            f"{each.scale:g}",
            f"{each.selected:+.4f}",
            f"{each.gain:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
        )
    console.print(shown)
    gaining = any(each.interval[0] > 0 for each in made.confirmed)
    verdict = "A gain is confirmed" if gaining else "No gain shown"
    console.print(
        f"{verdict}: the best of {len(made.windows)} windows and scales, "
        f"on {made.tokens:,} tokens that they were not selected by."
    )


def print_gains(console: "Console", found: "GainFile", names: Sequence[str]) -> None:
    """Show plans beside the best donor, the uniform average and the donors' ensemble."""
    controls = found.controls
    made = table(
        "Gain against the best donor (nats per token)", "recipe", "kind", "gain", "95 % in", "file"
    )
    for plan, name in zip(found.plans, names, strict=True):
        low, high = plan.interval
        made.add_row(
            plan.summary, plan.kind, f"{plan.gain:+.4f}", f"{low:+.4f} to {high:+.4f}", name
        )
    for name, control in (("uniform average", controls.average), ("ensemble", controls.ensemble)):
        if control:
            low, high = control.interval
            made.add_row(name, "control", f"{control.gain:+.4f}", f"{low:+.4f} to {high:+.4f}", "")
    made.add_row(Path(controls.best_donor.name).name, "best donor", "0", "", "")
    console.print(made)
    console.print(f"Measured on {found.tokens:,} tokens that nothing was chosen by.")
    console.print(verdict(found), markup=False)


def verdict(found: "GainFile") -> str:
    """The answer in one sentence."""
    best, donor = found.plans[0], Path(found.controls.best_donor.name).name
    if not found.confirmed:
        return (
            f"No gain shown: the interval of the best candidate, {best.summary}, reaches below 0. "
            f"{donor} alone is the better choice."
        )
    share = best.captured_share
    captured = f", {share:.0%} of what the donors' ensemble wins" if share is not None else ""
    return f"{best.summary} is better than {donor} by {best.gain:.3f} nats per token{captured}."
