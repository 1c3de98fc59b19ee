"""`demo`: all of it, on the donors in the package."""

import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import click

from frankenmerge.cli.console import json_option, out, print_json, progress, table
from frankenmerge.errors import fail

DEPTH, RANDOM_RECIPES, CHARACTERS, PROMPTS = 12, 20, 12_000, 4


class DemoResult(NamedTuple):
    """What the demo measured, for its last table and for JSON."""

    plan: Any
    logits_equal: bool
    results: list
    randoms: list[float]
    promise: Any
    """What the plan predicted, held against what was measured."""
    seconds: float


@click.command()
@click.option(
    "--out",
    "output",
    type=click.Path(path_type=Path),
    default="demo-run",
    show_default=True,
    help="Where everything made goes.",
)
@json_option
def demo(output: Path, as_json: bool) -> None:
    """Inspect, analyze, align, plan, merge, evaluate and report on the two demo donors.

    `code` and `prose` were fine-tuned from one small model, one on source code, one on
    documentation. An earlier demo's folder is replaced; any other folder is left alone.
    """
    started = time.perf_counter()
    _make_room(output)
    console = out()
    if as_json:
        console.quiet = True
    donors = _donors(output)
    _inspect(console, donors)
    alignment, plan = _plan(console, donors, output)
    equal = _merge(console, plan.recipe, output)
    results, randoms, promise = _evaluate(plan, alignment, donors, output)
    _report(output)
    found = DemoResult(plan, equal, results, randoms, promise, time.perf_counter() - started)
    _tell(console, found, output)
    if as_json:
        print_json(_as_json(found, output))


_MARK = ".frankenmerge-demo"


def _make_room(output: Path) -> None:
    if (
        output.exists()
        and not (output / _MARK).exists()
        and (not output.is_dir() or any(output.iterdir()))
    ):
        raise fail(
            str(output),
            "a new folder, or an earlier demo's",
            "something else",
            "choose another folder with --out",
        )
    if (output / _MARK).exists():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / _MARK).touch()


def _donors(output: Path) -> list:
    """Open the donors through short relative names that stay valid from where the command was run."""
    from frankenmerge.donors.checkpoint import open_checkpoint

    source = Path(__file__).parent.parent / "demo" / "donors"
    for name in ("code", "prose"):
        shutil.copytree(source / name, output / "donors" / name)
    return [open_checkpoint(str(output / "donors" / name)) for name in ("code", "prose")]


def _inspect(console, donors: list) -> None:
    from frankenmerge.splicing.compatibility import compatibility

    console.rule("1. Can they be spliced?")
    code = donors[0]
    console.print(
        f"Two donors of {code.blocks} blocks and {code.parameters / 1e6:.1f} million parameters, fine-tuned from one model: "
        "'code' on Python source, 'prose' on its documentation."
    )
    reasons = compatibility(donors).reasons
    console.print(
        "Their shapes agree: blocks of both fit into one model.\n"
        if not reasons
        else "\n".join(reasons)
    )


def _plan(console, donors: list, output: Path):
    from frankenmerge.analysis.align import align
    from frankenmerge.analysis.analyze import analyze, work
    from frankenmerge.artefacts.alignment import save_alignment
    from frankenmerge.artefacts.atlas import save_atlas
    from frankenmerge.cli.plan import print_damping, print_seams, write_plans
    from frankenmerge.planning.plan import plan
    from frankenmerge.planning.prediction import default_model
    from frankenmerge.planning.search import Constraints
    from frankenmerge.workflows.measuring import SAMPLED, Bench, damped

    atlases = []
    for donor in donors:
        with progress(f"analyzing {donor.path.name}", work(donor), "inputs") as advance:
            atlases.append(analyze(donor, advance=advance))
        save_atlas(atlases[-1], output / f"{donor.path.name}.atlas.safetensors")
    console.rule("2. Do they mean the same by the same neuron?")
    alignment = align(*atlases)
    save_alignment(alignment, output / "code-prose.alignment.safetensors")
    score = alignment.scores["jaccard"]
    made = table(
        "Overlap of the tokens that excite each neuron most",
        "after blocks",
        *map(str, range(len(score.matrix))),
    )
    made.add_row("code and prose", *(f"{value:.2f}" for value in score.matrix.diagonal()))
    made.add_row(
        "by chance", *(f"{value:.2f}" for value in score.nulls["permuted_neurons"].diagonal())
    )
    console.print(made)
    try:
        from frankenmerge.reporting.figures import plot_alignment

        plot_alignment(alignment, output / "alignment.png")
        console.print(f"The whole matrix is drawn in {output / 'alignment.png'}.\n", markup=False)
    except ImportError:
        console.print("Install matplotlib to have the whole matrix drawn.\n")
    console.rule(f"3. The plan: {DEPTH} blocks out of {donors[0].blocks} + {donors[1].blocks}")
    model = default_model()
    plans = plan([alignment], Constraints(DEPTH), top=3)
    plans, tried = damped(
        plans, [alignment], Bench([donor.name for donor in donors], (SAMPLED,), {}), model
    )
    write_plans(plans, output / "recipe.yaml", Constraints(DEPTH), model)
    low, high = plans[0].interval
    console.print(f"{plans[0].recipe}", markup=False)
    console.print(
        "The best of three, run on tokens that the donors drew themselves: no text was needed."
    )
    console.print(
        f"Predicted damage {plans[0].predicted_damage:z.2f} nats per token, nine times of ten from {low:z.2f} to {high:z.2f}.\n"
    )
    print_seams(console, plans[0].seams)
    print_damping(console, tried)
    console.print(
        f"All scores, and the neurons that agree and disagree most: {output / 'recipe.evidence.json'}\n",
        markup=False,
    )
    return alignment, plans[0]


def _merge(console, recipe, output: Path) -> bool:
    """Write and load the checkpoint; returns whether its logits equal the virtual splice's."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from frankenmerge.merging.writer import merge
    from frankenmerge.models.loading import load_model, virtual_splice
    from frankenmerge.splicing.opening import open_donors

    console.rule("4. The checkpoint")
    logging.disable_progress_bar()
    donors = open_donors(recipe)
    with progress("merging", None, "bytes") as advance:
        merged = merge(recipe, donors, output / "merged", advance=advance)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        merged.output, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    virtual = virtual_splice(
        recipe, donors, {name: load_model(donor) for name, donor in donors.items()}
    )
    ids = torch.arange(64)[None]
    with torch.no_grad():
        equal = torch.equal(model.eval()(input_ids=ids).logits, virtual(input_ids=ids).logits)
    wrong = len(info["missing_keys"]) + len(info["unexpected_keys"])
    console.print(
        f"{merged.tensors} tensors, {merged.bytes / 1e6:.1f} MB in {merged.output}.", markup=False
    )
    console.print(
        f"transformers loads it with {wrong} missing or unexpected keys; "
        f"its logits {'equal' if equal else 'DIFFER from'} those of the splice in memory.\n"
    )
    return equal


def _evaluate(plan, alignment, donors: list, output: Path) -> tuple[list, list[float], Any]:
    from frankenmerge.cli.evaluate import check_prediction
    from frankenmerge.evaluation.compare import Bench, Text
    from frankenmerge.evaluation.record import Looks, evaluation_json
    from frankenmerge.evaluation.samples import sample_prompts, words_of
    from frankenmerge.planning.controls import goliath, naive_interleave, random_recipe
    from frankenmerge.planning.damping import dampings
    from frankenmerge.storage.atomic import write_file

    folder = Path(__file__).parent.parent / "demo" / "text"
    texts = [
        Text(name, (folder / f"{name}.txt").read_text(encoding="utf-8")[:CHARACTERS])
        for name in ("code", "prose")
    ]
    blocks = {donor.name: donor.blocks for donor in donors}
    bench = Bench(texts, [*blocks, str(output / "merged")])
    words = frozenset().union(*(words_of(text.content) for text in texts))
    looks = Looks(
        sample_prompts([text.content for text in texts], PROMPTS, 0), words, with_seams=True
    )
    pattern, writes = goliath(blocks, DEPTH), donors[0].architecture.stream.writes
    by_passes = {way.name: way.recipe for way in dampings(pattern, [alignment], writes)}["1/n"]
    controls = {
        "naive interleave": naive_interleave(blocks, DEPTH),
        "Goliath's pattern": pattern,
        "the same, damped": by_passes,
    }
    results = []
    with progress(
        "evaluating", len(donors) + 2 + len(controls) + RANDOM_RECIPES, "models"
    ) as advance:
        for donor in donors:
            results.append(
                bench.checkpoint(
                    donor.name, role="donor", visit=lambda subject: looks.visit(subject, bench)
                )
            )
            advance(1)
        results.append(
            bench.checkpoint(
                str(output / "merged"), visit=lambda subject: looks.visit(subject, bench)
            )
        )
        advance(1)
        for name, control in controls.items():
            results.append(bench.recipe(name, control))
            advance(1)
        randoms = []
        for seed in range(RANDOM_RECIPES):
            randoms.append(bench.recipe(f"random {seed}", random_recipe(blocks, DEPTH, seed)))
            advance(1)
    own = {result.name: result.total.nats_per_token for result in results[: len(donors)]}
    promise = check_prediction(
        results[len(donors)], plan.recipe, plan.predicted_damage, plan.interval, own
    )
    told = (
        json.dumps(
            evaluation_json(results, bench, looks, predictions=[promise._asdict()]),
            indent=2,
            ensure_ascii=False,
        )
        + "\n"
    )
    write_file(output / "evaluation.json", told.encode())
    middle = sorted(randoms, key=lambda result: result.total.bits_per_byte)[RANDOM_RECIPES // 2]
    results.append(middle._replace(name=f"median of {RANDOM_RECIPES} random"))
    return results, [result.total.bits_per_byte for result in randoms], promise


def _report(output: Path) -> None:
    from frankenmerge.reporting.page import page
    from frankenmerge.reporting.run import read_run
    from frankenmerge.storage.atomic import write_file

    write_file(output / "report.html", page(read_run(output)).encode())


def _tell(console, found: DemoResult, output: Path) -> None:
    from frankenmerge.cli.evaluate import print_prediction_check, results_table

    console.rule("5. Did the plan keep its word?")
    console.print(
        results_table(found.results, "On held-out code and prose (bits per byte; lower is better)")
    )
    ours = found.results[2].total.bits_per_byte
    beaten = sum(random > ours for random in found.randoms)
    print_prediction_check(console, found.promise)
    console.print(
        f"The planned recipe beats {beaten} of {len(found.randoms)} random recipes of its depth, undamped ({found.seconds:.0f} s in all)."
    )
    console.print(
        f"\nEverything is in {output}: atlases, alignment, recipe, evidence, evaluation, and the checkpoint in {output / 'merged'}.",
        markup=False,
    )
    console.print(
        f"To look at: {output / 'report.html'}, a page of all that was found.", markup=False
    )
    console.print("Next: `frankenmerge inspect YOUR-DONOR-A YOUR-DONOR-B`")


def _as_json(found: DemoResult, output: Path) -> dict[str, Any]:
    models = [
        {"name": result.name, "role": result.role, **result.total.as_json()}
        for result in found.results
    ]
    return {
        "output": str(output),
        "plan": found.plan.as_json(),
        "logits_equal": found.logits_equal,
        "models": models,
        "random_bits_per_byte": found.randoms,
        "seconds": found.seconds,
    }
