"""`demo`: the whole pipeline on the donors in the package."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
from rich.console import Console

from frankenmerge.cli.console import json_option, out, print_json, progress, table
from frankenmerge.cli.evaluate import print_prediction_check
from frankenmerge.cli.measuring import SAMPLED
from frankenmerge.cli.plan import print_damping, print_seams
from frankenmerge.cli.tables import results_table
from frankenmerge.errors import fail

if TYPE_CHECKING:
    from frankenmerge.artefacts.alignment import Alignment
    from frankenmerge.artefacts.evaluation import PredictionCheck
    from frankenmerge.donors.checkpoint import Checkpoint
    from frankenmerge.evaluation.bench import Result
    from frankenmerge.planning.plan import Plan
    from frankenmerge.splicing.resolve import Splice

DEPTH, RANDOM_RECIPES, CHARACTERS, PROMPTS = 12, 20, 12_000, 4
_MARK = ".frankenmerge-demo"
_DATA = Path(__file__).parent.parent / "demo"


class Measured(NamedTuple):
    """What the demo measured."""

    results: "list[Result]"
    """Donors, the merge, the controls, the median of the random recipes."""
    randoms: list[float]
    """Bits per byte of random recipes."""
    check: "PredictionCheck"
    """Of the plan."""


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
    alignment, plan = _plan(console, donors, output)
    splice, equal = _merge(console, plan, donors, output)
    measured = _evaluate(splice, plan, alignment, donors, output)
    _report(output)
    seconds = time.perf_counter() - started
    _print(console, measured, seconds, output)
    if as_json:
        models = [
            {"name": result.name, "role": result.role, **result.total.as_json()}
            for result in measured.results
        ]
        print_json(
            {
                "output": str(output),
                "plan": plan.record(splice.key).as_json(),
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


def _plan(
    console: Console, donors: "dict[str, Checkpoint]", output: Path
) -> "tuple[Alignment, Plan]":
    from frankenmerge.analysis.align import align
    from frankenmerge.analysis.analyze import analyze, work
    from frankenmerge.artefacts.alignment import save_alignment
    from frankenmerge.artefacts.atlas import save_atlas
    from frankenmerge.planning.search import Constraints
    from frankenmerge.reporting.figures import plot_alignment
    from frankenmerge.workflows.planning import PlanOptions, plan_recipes, write_plans

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
    blocks = " + ".join(str(donor.blocks) for donor in donors.values())
    console.rule(f"3. The plan: {DEPTH} blocks out of {blocks}")
    options = PlanOptions(Constraints(DEPTH), top=3, damp=SAMPLED)
    planned = plan_recipes([alignment], options, opened=donors, progress=progress)
    write_plans(planned, output / "recipe.yaml")
    best = planned.plans[0]
    low, high = best.interval
    console.print(f"{best.recipe}", markup=False)
    console.print(
        "The best of three, measured on tokens that the donors generated: no text is needed."
    )
    console.print(
        f"Predicted damage {best.predicted_damage:z.2f} nats per token "
        f"(90 % interval {low:z.2f} to {high:z.2f}).\n"
    )
    print_seams(console, best.seams)
    if planned.damped:
        print_damping(console, planned.damped)
    evidence = output / "recipe.evidence.json"
    console.print(f"All scores, and their neurons: {evidence}\n", markup=False)
    return alignment, best


def _merge(
    console: Console, plan: "Plan", donors: "dict[str, Checkpoint]", output: Path
) -> "tuple[Splice, bool]":
    """Write and load the checkpoint; whether its logits equal those of the splice in memory."""
    import torch

    from frankenmerge.donors.checkpoint import open_checkpoint
    from frankenmerge.evaluation.bench import Bench
    from frankenmerge.merging.writer import merge
    from frankenmerge.models.loading import load_model
    from frankenmerge.splicing.resolve import resolve

    console.rule("4. The checkpoint")
    splice = resolve(plan.recipe, donors)
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


def _evaluate(
    splice: "Splice",
    plan: "Plan",
    alignment: "Alignment",
    donors: "dict[str, Checkpoint]",
    output: Path,
) -> Measured:
    from frankenmerge.artefacts.evaluation import save
    from frankenmerge.donors.checkpoint import open_checkpoint
    from frankenmerge.evaluation.bench import Bench, Subject, Text
    from frankenmerge.evaluation.checks import Checks, Findings, examine
    from frankenmerge.evaluation.record import evaluation_record
    from frankenmerge.evaluation.samples import sample_prompts, words_of
    from frankenmerge.planning.controls import goliath, naive_interleave, random_recipe
    from frankenmerge.planning.damping import dampings
    from frankenmerge.splicing.resolve import resolve
    from frankenmerge.workflows.predictions import check_prediction

    texts = [
        Text(name, (_DATA / "text" / f"{name}.txt").read_text(encoding="utf-8")[:CHARACTERS])
        for name in ("code", "prose")
    ]
    blocks = {name: donor.blocks for name, donor in donors.items()}
    merged = str(output / "merged")
    bench = Bench(texts, {**donors, merged: open_checkpoint(merged)})
    contents = [text.content for text in texts]
    words = frozenset().union(*map(words_of, contents))
    checks = Checks(sample_prompts(contents, PROMPTS, 0), words, seams=True)
    findings = Findings()

    def visit(subject: Subject) -> None:
        examine(subject, bench, checks, findings)

    pattern = goliath(blocks, DEPTH)
    stream = splice.base.architecture.stream
    assert stream
    ways = {way.name: way.recipe for way in dampings(pattern, [alignment], stream.writes)}
    controls = {
        "naive interleave": naive_interleave(blocks, DEPTH),
        "Goliath's pattern": pattern,
        "the same, damped": ways["1/n"],
    }
    recipes = [random_recipe(blocks, DEPTH, seed) for seed in range(RANDOM_RECIPES)]
    controls |= {f"random {seed}": recipe for seed, recipe in enumerate(recipes)}
    results = []
    with progress("evaluating", len(donors) + 1 + len(controls), "models") as advance:
        for name in (*donors, merged):
            role = "donor" if name in donors else "model"
            results.append(bench.checkpoint(name, role=role, visit=visit))
            advance(1)
        for name, control in controls.items():
            results.append(bench.splice(name, resolve(control, donors)))
            advance(1)
    results, randoms = results[:-RANDOM_RECIPES], results[-RANDOM_RECIPES:]
    own = {result.name: result.total.nats_per_token for result in results[: len(donors)]}
    check = check_prediction(
        results[len(donors)], splice, plan.predicted_damage, plan.interval, own
    )
    record = evaluation_record(results, bench, checks, findings, predictions=[check])
    save(record, output / "evaluation.json")
    randoms.sort(key=lambda result: result.total.bits_per_byte)
    middle = randoms[RANDOM_RECIPES // 2]._replace(name=f"median of {RANDOM_RECIPES} random")
    bits = [result.total.bits_per_byte for result in randoms]
    return Measured([*results, middle], bits, check)


def _report(output: Path) -> None:
    from frankenmerge.reporting.page import page
    from frankenmerge.reporting.run import read_run
    from frankenmerge.storage.atomic import write_file

    write_file(output / "report.html", page(read_run(output)).encode())


def _print(console: Console, measured: Measured, seconds: float, output: Path) -> None:
    console.rule("5. Was the prediction right?")
    title = "On held-out code and prose (bits per byte; lower is better)"
    console.print(results_table(measured.results, title))
    ours = measured.results[2].total.bits_per_byte
    beaten = sum(random > ours for random in measured.randoms)
    print_prediction_check(console, measured.check)
    console.print(
        f"The plan is better than {beaten} of {len(measured.randoms)} random recipes of its depth, "
        f"which are not damped ({seconds:.0f} s in all)."
    )
    console.print(f"\nAll results are in {output}; the checkpoint is in {output / 'merged'}.")
    console.print(f"Open {output / 'report.html'} to look at them.")
    console.print("Next: `frankenmerge inspect YOUR-DONOR-A YOUR-DONOR-B`")
