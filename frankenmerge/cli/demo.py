"""`demo`: the whole pipeline on the donors in the package."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from frankenmerge.cli.console import json_option, out, print_json, progress, table
from frankenmerge.cli.demo_evaluation import evaluate, held_out_json, print_measured
from frankenmerge.cli.gain import print_gains
from frankenmerge.cli.measuring import SAMPLED
from frankenmerge.cli.tables import print_damping
from frankenmerge.errors import fail

if TYPE_CHECKING:
    from frankenmerge.artefacts.alignment import Alignment
    from frankenmerge.artefacts.gain import GainFile
    from frankenmerge.artefacts.recipe import Recipe
    from frankenmerge.donors.checkpoint import Checkpoint
    from frankenmerge.planning.plan import Plan
    from frankenmerge.splicing.resolve import Splice
    from frankenmerge.workflows.gaining import Gains

DEPTH = 12
"""Of the stack."""
_MARK = ".frankenmerge-demo"
_DATA = Path(__file__).parent.parent / "demo"


@click.command()
@click.option(
    "--out",
    "output",
    type=click.Path(path_type=Path),
    default="demo-run",
    show_default=True,
    help="Folder for all results.",
)
@json_option
def demo(output: Path, as_json: bool) -> None:
    """Inspect, analyze, align, plan, merge, evaluate and report on the two demo donors.

    The stack of 12 blocks is what a plan of the least damage gives; the recipe that is merged is
    the one that was found to be better than both donors.

    `code` and `prose` were fine-tuned from one small model, one on source code, one on
    documentation. The folder of an earlier demo is replaced; any other folder is left alone.
    """
    started = time.perf_counter()
    _make_room(output)
    console = out()
    if as_json:
        console.quiet = True
    donors = _donors(output)
    _inspect(console, list(donors.values()))
    alignment = _align(console, donors, output)
    stack = _stack(console, alignment, donors, output)
    gains, found = _gain(console, alignment, donors, output)
    splice, equal = _merge(console, gains.plans[0].candidate.recipe, donors, output)
    console.rule("6. On held-out text")
    measured = evaluate(splice, stack, alignment, donors, output)
    _report(output)
    seconds = time.perf_counter() - started
    print_measured(console, measured)
    console.print(f"\nAll results are in {output}; the checkpoint is in {output / 'merged'}.")
    console.print(f"Open {output / 'report.html'} to look at them ({seconds:.0f} s in all).")
    console.print("Next: `frankenmerge inspect YOUR-DONOR-A YOUR-DONOR-B`")
    if as_json:
        from frankenmerge.splicing.resolve import resolve

        models = [
            {"name": result.name, "role": result.role, **result.total.as_json()}
            for result in measured.results
        ]
        print_json(
            {
                "output": str(output),
                "plan": stack.record(resolve(stack.recipe, donors).key).as_json(),
                "gain": found.as_json() | {"held_out": held_out_json(measured.held_out)},
                "logits_equal": equal,
                "models": models,
                "random_bits_per_byte": measured.randoms,
                "seconds": seconds,
            }
        )


def _make_room(output: Path) -> None:
    occupied = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if occupied and not (output / _MARK).exists():
        expected, remedy = "a new folder, or an earlier demo's", "choose another folder with --out"
        raise fail(str(output), expected, "something else", remedy)
    if (output / _MARK).exists():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / _MARK).touch()


def _donors(output: Path) -> "dict[str, Checkpoint]":
    """The donors, by names relative to where the command runs."""
    from frankenmerge.donors.checkpoint import open_checkpoint

    for name in ("code", "prose"):
        shutil.copytree(_DATA / "donors" / name, output / "donors" / name)
    paths = [str(output / "donors" / name) for name in ("code", "prose")]
    return {path: open_checkpoint(path) for path in paths}


def _inspect(console: Console, donors: "list[Checkpoint]") -> None:
    from frankenmerge.splicing.compatibility import compatibility

    console.rule("1. Can they be spliced?")
    code = donors[0]
    console.print(
        f"Two donors of {code.blocks} blocks and {code.parameters / 1e6:.1f} million parameters, "
        "fine-tuned from one model: 'code' on Python source, 'prose' on its documentation."
    )
    reasons = compatibility(donors).reasons
    same = "They have the same shape: one model can hold blocks of both.\n"
    console.print("\n".join(reasons) or same)


def _align(console: Console, donors: "dict[str, Checkpoint]", output: Path) -> "Alignment":
    from frankenmerge.analysis.align import align
    from frankenmerge.analysis.analyze import analyze, work
    from frankenmerge.artefacts.alignment import save_alignment
    from frankenmerge.artefacts.atlas import save_atlas
    from frankenmerge.reporting.figures import plot_alignment

    atlases = []
    for donor in donors.values():
        with progress(f"analyzing {donor.path.name}", work(donor), "inputs") as advance:
            atlases.append(analyze(donor, advance=advance))
        save_atlas(atlases[-1], output / f"{donor.path.name}.atlas.safetensors")
    console.rule("2. Does the same neuron mean the same in both?")
    alignment = align(*atlases)
    save_alignment(alignment, output / "code-prose.alignment.safetensors")
    score = alignment.scores["jaccard"]
    columns = map(str, range(len(score.matrix)))
    made = table("Overlap of each neuron's top-activating tokens", "after blocks", *columns)
    made.add_row("code and prose", *(f"{value:.2f}" for value in score.matrix.diagonal()))
    chance = score.nulls["permuted_neurons"].diagonal()
    made.add_row("by chance", *(f"{value:.2f}" for value in chance))
    console.print(made)
    plot_alignment(alignment, output / "alignment.svg")
    console.print(f"All pairs of blocks: {output / 'alignment.svg'}\n", markup=False)
    return alignment


def _stack(
    console: Console, alignment: "Alignment", donors: "dict[str, Checkpoint]", output: Path
) -> "Plan":
    """The stack of the least predicted damage."""
    from frankenmerge.planning.search import Constraints
    from frankenmerge.workflows.planning import PlanOptions, plan_recipes, write_plans

    blocks = " + ".join(str(donor.blocks) for donor in donors.values())
    console.rule(f"3. What stacking costs: {DEPTH} blocks out of {blocks}")
    options = PlanOptions(Constraints(DEPTH), top=3, damp=SAMPLED)
    planned = plan_recipes([alignment], options, opened=donors, progress=progress)
    write_plans(planned, output / "stack.yaml")
    best = planned.plans[0]
    low, high = best.interval
    console.print(f"{best.recipe}", markup=False)
    console.print(
        "The best of three, measured on tokens that the donors generated: no text is needed. "
        f"Predicted damage {best.predicted_damage:z.2f} nats per token "
        f"(90 % interval {low:z.2f} to {high:z.2f})."
    )
    if planned.damped:
        print_damping(console, planned.damped)
    evidence = output / "stack.evidence.json"
    console.print(f"All scores at the seams, and their neurons: {evidence}\n", markup=False)
    return best


def _gain(
    console: Console, alignment: "Alignment", donors: "dict[str, Checkpoint]", output: Path
) -> "tuple[Gains, GainFile]":
    """Search for a recipe of the donors' depth that is better than either."""
    from frankenmerge.planning.search import Constraints
    from frankenmerge.workflows.gaining import GainOptions, plan_gains, write_gains

    deepest = max(donor.blocks for donor in donors.values())
    console.rule(f"4. What can be won with {deepest} blocks")
    options = GainOptions(SAMPLED, Constraints(deepest))
    gains = plan_gains([alignment], options, opened=donors, progress=progress)
    found, paths = write_gains(gains, options, output / "recipe.yaml")
    console.print(
        f"{found.candidates} recipes: averages, exchanges and stacks of blocks and of their parts, "
        "compared on tokens that the donors generated."
    )
    print_gains(console, found, [path.name for path in paths])
    console.print()
    return gains, found


def _merge(
    console: Console, recipe: "Recipe", donors: "dict[str, Checkpoint]", output: Path
) -> "tuple[Splice, bool]":
    """Write and load the checkpoint; whether its logits equal those of the splice in memory."""
    import torch

    from frankenmerge.donors.checkpoint import open_checkpoint
    from frankenmerge.evaluation.bench import Bench
    from frankenmerge.merging.writer import merge
    from frankenmerge.models.loading import load_model
    from frankenmerge.splicing.resolve import resolve

    console.rule("5. The checkpoint")
    splice = resolve(recipe, donors)
    merged = merge(splice, output / "merged", progress=progress)
    # Loading refuses missing and unexpected tensors.
    written = load_model(open_checkpoint(str(merged.output)))
    in_memory = Bench((), donors).assemble(splice)
    ids = torch.arange(64)[None]
    with torch.no_grad():
        equal = torch.equal(written(input_ids=ids).logits, in_memory(input_ids=ids).logits)
    size = f"{merged.tensors} tensors, {merged.bytes / 1e6:.1f} MB"
    console.print(f"{size} in {merged.output}.", markup=False)
    console.print(
        "transformers loads it with no missing or unexpected key; "
        f"its logits {'equal' if equal else 'DIFFER from'} those of the splice in memory.\n"
    )
    return splice, equal


def _report(output: Path) -> None:
    from frankenmerge.reporting.page import page
    from frankenmerge.reporting.run import read_run
    from frankenmerge.storage.atomic import write_file

    write_file(output / "report.html", page(read_run(output)).encode())
