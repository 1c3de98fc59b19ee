"""`--dry-run`: what a command would take, without loading weights."""

from typing import TYPE_CHECKING, Any

import click

from frankenmerge.cli.console import out, print_json, size, table

if TYPE_CHECKING:
    from frankenmerge.donors.costs import Cost
    from frankenmerge.models.rates import Rate

dry_run_option = click.option(
    "--dry-run",
    is_flag=True,
    help="Report the planned time and memory, from configs and headers alone, and do nothing else. "
    "The time is an estimate by one product of matrices, which is measured on the device.",
)


def print_cost(command: str, cost: "Cost", *, dtype: str, device: str, as_json: bool) -> None:
    """Measure the device, and print what a command would take."""
    from frankenmerge.models.rates import measured_rate

    rate = measured_rate(*cost.product, dtype=dtype, device=device)
    if as_json:
        print_json(cost_as_json(command, cost, rate))
        return
    made = table(f"Planned: {command}", "", "")
    for name, count in cost.counts.items():
        made.add_row(name, f"{count:,}")
    made.add_row("operations", f"{cost.operations:.3g}")
    made.add_row("time to compute", duration(cost.operations / rate.operations))
    made.add_row("read from disk", size(cost.read))
    for name, count in cost.memory.items():
        made.add_row(f"memory: {name}", size(count))
    made.add_row("memory", size(cost.total))
    console = out()
    console.print(made)
    console.print(f"Estimated by {rate}; about 0.3 GB of memory for libraries come on top.")
    for note in cost.notes:
        console.print(f"Note: {note}.", markup=False)


def cost_as_json(command: str, cost: "Cost", rate: "Rate") -> dict[str, Any]:
    """A plan as JSON."""
    return {
        "dry_run": True,
        "command": command,
        "counts": dict(cost.counts),
        "operations": cost.operations,
        "seconds": cost.operations / rate.operations,
        "rate": rate._asdict(),
        "read": cost.read,
        "memory": dict(cost.memory) | {"total": cost.total},
        "notes": list(cost.notes),
    }


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, with two digits."""
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * length or unit == "h":
            return f"{seconds / length:.2g} {unit}"
    raise AssertionError
