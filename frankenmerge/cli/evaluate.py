"""`evaluate`: checkpoints and recipes on text, beside their donors."""

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.text import Text

from frankenmerge.cli.console import (
    device_option,
    download_option,
    dtype_option,
    json_option,
    max_memory_option,
    offload_option,
    out,
    output_option,
    pickle_option,
    print_json,
    progress,
)
from frankenmerge.cli.donors import RunOptions, atlas_of
from frankenmerge.cli.tables import (
    differences_table,
    further_tables,
    print_samples,
    results_table,
    retention_table,
    seams_table,
)
from frankenmerge.errors import fail


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL|RECIPE...")
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="A UTF-8 text file; may be repeated.",
)
@click.option(
    "--context",
    type=click.IntRange(2),
    help="Tokens in a window. [default: what every model was made for, at most 2048]",
)
@click.option(
    "--samples",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Let every model go on from so many prompts, drawn from the texts. Costs up to 64 passes each.",
)
@click.option("--prompt", "prompts", multiple=True, help="A prompt to go on from; may be repeated.")
@click.option(
    "--words",
    "lists",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A list of words that are no inventions, beside those of the texts; may be repeated.",
)
@click.option(
    "--seams",
    is_flag=True,
    help="Tell block by block where a merge leaves its donors. Costs a pass over four windows a text, and two read-outs a block.",
)
@click.option(
    "--retention",
    is_flag=True,
    help="Tell how many of the donors' features a merge keeps. Costs a pass of the vocabulary, and of each donor's, which is kept.",
)
@click.option(
    "--tasks",
    multiple=True,
    metavar="NAME|YAML",
    help="Run a task of lm-evaluation-harness on every model; may be repeated.",
)
@click.option(
    "--compare",
    "threshold",
    type=float,
    metavar="BITS",
    help="Leave with exit code 1 when a merge takes more bits per byte than its best donor by more than this; see docs/evaluate.md.",
)
@click.option(
    "--against",
    metavar="MODEL",
    help="Hold merges against this model, instead of against their best donor.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Draws resamples, prompts, and what the harness draws.",
)
@output_option("Where to write everything found, as NAME.evaluation.json.", required=False)
@device_option
@max_memory_option
@offload_option
@dtype_option
@download_option
@pickle_option
@json_option
@click.pass_context
def evaluate(
    context_of_command: click.Context,
    models: tuple[str, ...],
    texts: tuple[Path, ...],
    context: int | None,
    samples: int,
    prompts: tuple[str, ...],
    lists: tuple[Path, ...],
    seams: bool,
    retention: bool,
    tasks: tuple[str, ...],
    threshold: float | None,
    against: str | None,
    seed: int,
    output: Path | None,
    device: str,
    max_memory: dict | None,
    offload: Path | None,
    dtype: str,
    download: bool,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Measure how well MODELS predict text. A recipe is run as a virtual splice: nothing is written.

    Every donor of a recipe is measured beside it; with --seams, --retention or --compare those of a
    merged checkpoint too.
    """
    if lists and not (samples or prompts):
        raise fail("--words", "samples to be judged", "none", "give --samples or --prompt as well")
    if threshold is not None and not math.isfinite(threshold):
        raise fail("--compare", "a number of bits per byte", str(threshold), "give one such as 0.1")
    if tasks:
        from frankenmerge.evaluation.harness import check_tasks, stay_offline

        if not download:
            stay_offline()
        check_tasks(tasks)
    from frankenmerge.evaluation.compare import compare, read_text
    from frankenmerge.evaluation.non_inferiority import held_against
    from frankenmerge.evaluation.record import evaluation_json

    shown = [read_text(text) for text in texts]
    looks = _looks(shown, samples, prompts, lists, seams, retention, tasks, seed)
    results, bench = compare(
        models,
        shown,
        context=context,
        dtype=dtype,
        device=device,
        max_memory=max_memory,
        offload=offload,
        download=download,
        allow_pickle=allow_pickle,
        beside=seams or retention or (threshold is not None and not against),
        hold=seams,
        against=against,
        progress=progress,
        visit=looks.visit,
    )
    looks.retention = _retained(looks.features, RunOptions(device, dtype, download, allow_pickle))
    comparison = None if threshold is None else held_against(results, threshold, seed, against)
    promises = check_predictions(results)
    told = evaluation_json(
        results,
        bench,
        looks,
        dtype=dtype,
        predictions=[promise._asdict() for promise in promises],
        comparison=comparison,
        against=against,
        arguments=_given(context_of_command),
    )
    if output:
        from frankenmerge.storage.atomic import write_file

        write_file(output, (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode())
    if as_json:
        print_json(told)
    else:
        _print(results, looks, told, promises, comparison)
        if output:
            out().print(f"Written to {output}", markup=False)
    if comparison and not comparison.passed:
        sys.exit(1)


def _given(context: click.Context) -> dict[str, Any]:
    """The command's arguments, as JSON can hold them."""
    return {
        name: [str(part) for part in value]
        if isinstance(value, tuple)
        else str(value)
        if isinstance(value, Path)
        else value
        for name, value in sorted(context.params.items())
    }


def _looks(
    shown: list,
    samples: int,
    prompts: tuple[str, ...],
    lists: tuple[Path, ...],
    seams: bool,
    retention: bool,
    tasks: tuple[str, ...],
    seed: int,
) -> Any:
    from frankenmerge.analysis.complete import complete_search
    from frankenmerge.evaluation.record import Looks
    from frankenmerge.evaluation.samples import read_words, sample_prompts, words_of

    return Looks(
        prompts=[*prompts, *sample_prompts([text.content for text in shown], samples, seed)],
        vocabulary=frozenset().union(
            *(words_of(text.content) for text in shown), *map(read_words, lists)
        ),
        with_seams=seams,
        with_tasks=tasks,
        search=(lambda model, advance: complete_search(model, k=1, advance=advance))
        if retention
        else None,
        seed=seed,
        progress=progress,
    )


def _retained(features: dict, how: RunOptions) -> dict[str, list]:
    """What of each donor's features every model keeps; the donors' atlases come from the cache, or are made now."""
    from frankenmerge.evaluation.retention import retained

    names = dict.fromkeys(block.model for blocks, _ in features.values() for block in blocks)
    tops = {name: atlas_of(name, how).top["plain"] for name in names}
    return {name: retained(top, tops, blocks) for name, (blocks, top) in features.items()}


def _print(results: list, looks: Any, told: dict, promises: list, comparison: Any) -> None:
    console = out()
    console.print(results_table(results, "On text (bits per byte; lower is better)", looks.seed))
    for made in further_tables(results, looks):
        console.print(made)
    tokens = sorted({result.total.tokens for result in results})
    counted = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    console.print(
        f"Windows of {told['context']} tokens, {told['dtype']}; {counted} tokens of {results[0].total.bytes:,} bytes."
    )
    if told["differences"]:
        console.print(differences_table(told["differences"]))
    for name, blocks in looks.seams.items():
        console.print(seams_table(name, blocks))
    for name, entries in looks.retention.items():
        console.print(retention_table(name, entries))
    if looks.samples:
        print_samples(console, looks.samples)
    for promise in promises:
        print_prediction_check(console, promise)
    for entry in comparison.verdicts if comparison else ():
        low, high = entry.interval
        told_of = f"{entry.bits_per_byte:+.3f} ({low:+.3f} to {high:+.3f}) bits per byte, {comparison.threshold:+.3f} allowed"
        style = {"worse": "bold red", "undecided": "bold"}.get(entry.verdict, "green")
        more = "; more text would decide" if entry.verdict == "undecided" else ""
        console.print(
            Text.assemble(
                f"{Path(entry.model).name} against {Path(entry.donor).name}: {told_of}: ",
                (entry.verdict, style),
                f"{more}.",
            )
        )


class PredictionCheck(NamedTuple):
    """What a plan predicted of a recipe, and what was measured."""

    recipe: str
    predicted: float
    low: float
    high: float
    measured: float
    held: bool


def check_predictions(results) -> list[PredictionCheck]:
    """Hold recipes against the evidence files in their folders, where one tells of them."""
    from frankenmerge.artefacts.recipe import load_recipe

    losses = {
        result.name: result.total.nats_per_token for result in results if result.role != "recipe"
    }
    promises = []
    for result in (result for result in results if result.role == "recipe"):
        recipe = load_recipe(Path(result.name))
        if told := _foretold(Path(result.name).parent, str(recipe)):
            promises.append(
                check_prediction(result, recipe, told["predicted_damage"], told["interval"], losses)
            )
    return promises


def print_prediction_check(console, promise: PredictionCheck) -> None:
    """Show what was predicted, what was measured, and whether the one was in the other's interval."""
    verdict = "the prediction held" if promise.held else "the prediction did not hold"
    around = f"{promise.predicted:z.3f} ({promise.low:z.3f} to {promise.high:z.3f}) nats per token above its donors"
    console.print(
        f"{Path(promise.recipe).name}: predicted {around}, measured {promise.measured:z.3f}: {verdict}."
    )


def check_prediction(result, recipe, predicted: float, interval, losses) -> PredictionCheck:
    """Hold what was predicted of a recipe against its result; `losses` are the donors' own, nats per token by name."""
    from frankenmerge.planning.prediction import donor_loss

    measured = result.total.nats_per_token - donor_loss(recipe.blocks, losses)
    low, high = interval
    return PredictionCheck(result.name, predicted, low, high, measured, low <= measured <= high)


def _foretold(folder: Path, summary: str) -> dict | None:
    for path in sorted(folder.glob("*.evidence.json")):
        try:
            plans = json.loads(path.read_text(encoding="utf-8"))["plans"]
            return next(
                entry for entry in plans if entry["summary"] == summary and "interval" in entry
            )
        except (OSError, ValueError, LookupError, TypeError, StopIteration):
            continue  # another program's file, or another recipe's evidence: nothing is foretold there
    return None
