"""`heal`: a short training of what a splice broke."""

from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from frankenmerge.cli.console import (
    device_option,
    download_option,
    json_option,
    out,
    pickle_option,
    print_json,
    progress,
    size,
    table,
)
from frankenmerge.cli.dry_run import dry_run_option, print_cost
from frankenmerge.cli.measuring import measured_on, measuring_option, separator_option
from frankenmerge.cli.merge import size_in_bytes
from frankenmerge.cli.tables import signed_interval
from frankenmerge.distributed import own_rank

if TYPE_CHECKING:
    from frankenmerge.evaluation.documents import Text
    from frankenmerge.healing.memory import Memory
    from frankenmerge.workflows.healing import Healed
    from frankenmerge.workflows.measuring import On
    from frankenmerge.workflows.patients import HealOptions


@click.command()
@click.argument("model", metavar="MODEL|RECIPE")
@click.argument("output", type=click.Path(path_type=Path))
@measuring_option("--on", "Train on this. [default: sampled]")
@click.option(
    "--scope",
    type=click.Choice(["seams", "norms", "lora", "all"]),
    help="What is trained: the blocks on both sides of every seam, all norms, a LoRA on the "
    "matrices of all blocks, or everything. [default: seams; norms where there are none]",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Maximum number of steps. [default: 300; 1000 for fewer blocks than a donor has]",
)
@click.option(
    "--teacher",
    type=click.Choice(["ensemble", "donor", "best-per-domain", "none"]),
    default="ensemble",
    show_default=True,
    help="Whose probabilities are learned: the mean of all donors', the best donor's, on every "
    "text or donor's tokens those of the best donor there, or none: the tokens themselves.",
)
@click.option(
    "--mix",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the tokens' own loss in what is minimised; the rest is the divergence from the "
    "teacher.",
)
@click.option(
    "--donor",
    "donors",
    multiple=True,
    help="A donor of MODEL, where its frankenmerge.json does not name them. May be repeated.",
)
@measuring_option("--text", "Measure before and after on this text, which is not trained on.")
@separator_option
@click.option(
    "--control",
    is_flag=True,
    help="Also heal the best donor with the same steps, tokens and scope, and compare with it.",
)
@click.option(
    "--adapter",
    is_flag=True,
    help="With --scope lora: write the LoRA alone, for its base: MODEL, or the unrepeated donor of "
    "a self-merge.",
)
@click.option(
    "--micro-batch",
    "micro",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Maximum number of rows in one pass; gradients of more are accumulated.",
)
@click.option(
    "--checkpointing",
    is_flag=True,
    help="Compute activations twice instead of keeping them (gradient checkpointing).",
)
@click.option(
    "--offload",
    is_flag=True,
    help="With an accelerator: keep the optimiser, the best weights and activations in the memory "
    "of the CPU.",
)
@click.option(
    "--memory",
    callback=size_in_bytes,
    help="Refuse what needs more than this, such as 20GB. [default: what is free]",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of sampled tokens, batches, the LoRA and resamples.",
)
@dry_run_option
@device_option
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Data type to compute in; what is trained is float32.",
)
@download_option
@pickle_option
@json_option
def heal(
    model: str,
    output: Path,
    dry_run: bool,
    device: str,
    dtype: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Train MODEL or RECIPE for some steps towards its donors, and write it to the folder OUTPUT.

    By default no text is needed: the donors generate the tokens, and the mean of their
    probabilities is what the splice learns. The learning rate is found by a short test, and the
    training stops when it no longer helps on tokens that it does not train on.

    An interrupted run is continued by the same command; until then its state is in OUTPUT.heal.
    Under `accelerate launch` or `torchrun` the processes share the rows of every step; a single
    process with --device auto spreads the models over all GPUs.
    """
    from frankenmerge.models.loading import Placement, devices_of
    from frankenmerge.workflows.healing import heal as healed
    from frankenmerge.workflows.patients import HealOptions

    started = perf_counter()
    rank = own_rank()
    read = partial(measured_on, separator=options.pop("separator"), download=options["download"])
    options["on"] = read(options["on"]) or "sampled"
    options["text"] = _texts(read(options["text"]))
    chosen = HealOptions(placement=Placement(dtype, _device(device)), **options)
    if dry_run:
        _print_cost(model, chosen, as_json=as_json)
        return
    devices = devices_of(chosen.placement.device)

    def planned(memory: "Memory", scope: str) -> None:
        if rank.first and not as_json:
            _print_plan(memory, scope, devices)

    found = healed(model, output, chosen, planned=planned, progress=progress)
    if found is None:
        return
    if as_json:
        print_json(_as_json(found, perf_counter() - started))
    else:
        _print(found, perf_counter() - started)


def _print_cost(model: str, chosen: "HealOptions", *, as_json: bool) -> None:
    """What the command would take."""
    from frankenmerge.workflows.costs import heal_cost
    from frankenmerge.workflows.patients import check_patient, patient_of, scope_of

    patient = patient_of(model, chosen, weights=False)
    scope = scope_of(patient, chosen)
    check_patient(patient, scope, chosen, None)
    placement = chosen.placement
    print_cost(
        f"heal --scope {scope}",
        heal_cost(patient, scope, chosen),
        dtype=placement.dtype,
        device=placement.device,
        as_json=as_json,
    )


def _texts(found: "On | None") -> "list[Text]":
    if isinstance(found, str):
        raise click.BadParameter("name a text; sampled tokens are the default", param_hint="--text")
    return list(found or ())


def _device(device: str) -> str:
    """The device of this process: one accelerator each, or with `auto` all for a single one."""
    import os

    if device == "auto":
        from frankenmerge.models.loading import devices_of, one_device

        if own_rank().count == 1 and devices_of(device) > 1:
            return device
        device = str(one_device(device))
    if device == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def _as_json(found: "Healed", seconds: float) -> dict[str, Any]:
    record = found.record
    return {
        "output": str(found.output),
        "scope": record.scope,
        "steps": record.steps,
        "tokens": record.tokens,
        "before": {"nats": record.before},
        "after": {"nats": record.after},
        "best_donor": record.best_donor.as_json(),
        "control": record.control.as_json() if record.control else None,
        "rate": record.rate,
        "curve": [each.as_json() for each in record.curve],
        "parameters": found.trained,
        "memory": found.memory._asdict() | {"total": found.memory.total},
        "seconds": seconds,
    }


def _print_plan(memory: "Memory", scope: str, devices: int) -> None:
    place = "one process" if devices == 1 else f"each of {devices} devices"
    made = table(f"Memory of {place}, --scope {scope}", "", "")
    for name, count in memory._asdict().items():
        made.add_row(name, size(count))
    made.add_row("total", size(memory.total))
    out().print(made)


def _print(found: "Healed", seconds: float) -> None:
    record = found.record
    kind = "tokens of the donors" if record.sampled else "tokens"
    made = table("On tokens that were not trained on", "", "nats/token", "healed minus it", "95 %")
    compared = [(Path(record.best_donor.name).name, "best donor", record.best_donor)]
    if record.control:
        compared.append((Path(record.control.name).name, "healed alike", record.control))
    made.add_row("before", f"{record.before:.4f}", f"{record.after - record.before:+.4f}", "")
    made.add_row("healed", f"{record.after:.4f}", "", "")
    for name, what, each in compared:
        made.add_row(
            f"{name} ({what})",
            f"{each.nats:.4f}",
            f"{each.difference:+.4f}",
            signed_interval(each.interval),
        )
    console = out()
    console.print(made)
    control = record.control
    verdict = (
        "No control was run: --control heals the best donor alike."
        if control is None
        else "Better than the best donor healed alike."
        if control.interval[1] < 0
        else "Not shown to be better than the best donor healed alike."
    )
    console.print(verdict)
    console.print(
        f"{found.trained:,} parameters, {record.steps} steps, {record.tokens:,} {kind}, rate "
        f"{record.rate:g}, {seconds:.0f} s. Written to {found.output}",
        markup=False,
    )
