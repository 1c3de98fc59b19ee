"""`evaluate`: checkpoints and recipes on text, with their donors."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.console import Console
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
    print_remarks,
    progress,
)
from frankenmerge.cli.dry_run import dry_run_option, print_cost
from frankenmerge.cli.measuring import TEXT_HELP, read_texts, separator_option
from frankenmerge.cli.tables import (
    differences_table,
    further_tables,
    print_samples,
    results_table,
    retention_table,
    seams_table,
    task_differences_tables,
    tasks_table,
)
from frankenmerge.errors import fail

if TYPE_CHECKING:
    from frankenmerge.artefacts.evaluation import GainCheck, HealingCheck, PredictionCheck
    from frankenmerge.workflows.evaluating import Evaluated, EvaluateOptions

WORSE = 3
"""Exit status where `--compare` found a merge to be worse."""


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL|RECIPE|RESULTS...")
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help=f"{TEXT_HELP} May be repeated.",
)
@separator_option
@click.option(
    "--tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Measure at most N tokens of every text, from its beginning, counted by the first model's "
    "tokenizer.",
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
    help="Generate continuations of N prompts taken from the texts.",
    metavar="N",
)
@click.option("--prompt", "prompts", multiple=True, help="A prompt to continue. May be repeated.")
@click.option(
    "--words",
    "lists",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A list of valid words, in addition to those of the texts. May be repeated.",
)
@click.option(
    "--seams",
    is_flag=True,
    help="Report block by block how far the merge diverges from its donors.",
)
@click.option(
    "--retention",
    is_flag=True,
    help="Report the share of donor features that the merge preserves.",
)
@click.option(
    "--tasks",
    multiple=True,
    metavar="NAME|YAML|JSONL",
    help="Run a task of lm-evaluation-harness, or a JSONL file of items with context, choices and "
    "answer, on every model. May be repeated.",
)
@click.option(
    "--compare",
    "threshold",
    type=float,
    metavar="BITS",
    help="Exit with status 3 if a merge is worse than its best donor by more than BITS bits per "
    "byte.",
)
@click.option(
    "--against",
    metavar="MODEL",
    help="Compare merges with this model instead of their best donor.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Random seed for bootstrap resamples, prompts and lm-evaluation-harness.",
)
@output_option("Where to write all results, as NAME.evaluation.json.", required=False)
@dry_run_option
@device_option
@max_memory_option
@offload_option
@dtype_option
@download_option
@pickle_option
@json_option
@click.pass_context
def evaluate(
    invocation: click.Context,
    models: tuple[str, ...],
    texts: tuple[Path, ...],
    output: Path | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how well models predict text and solve tasks. A recipe is run in memory.

    Every donor of a recipe is measured, too; with --seams, --retention or --compare also those of a
    merged checkpoint. Nothing is written except with -o.

    RESULTS are a tool's results item by item: a folder of samples that lm-evaluation-harness has
    logged, one such file, or a JSONL file of {"id", "correct"}. The first are compared with each of
    the others; no model is run.
    """
    if _are_results(invocation, models):
        _compare_results(invocation, models, output, as_json)
        return
    if options["lists"] and not (options["samples"] or options["prompts"]):
        raise fail("--words", "samples to be judged", "none", "add --samples or --prompt")
    threshold = options["threshold"]
    if threshold is not None and not math.isfinite(threshold):
        raise fail("--compare", "a number of bits per byte", str(threshold), "give one such as 0.1")
    from frankenmerge.artefacts.evaluation import save
    from frankenmerge.workflows.evaluating import evaluate as evaluated

    separator = options.pop("separator")
    chosen = _options(options)
    if chosen.harness_tasks:
        from frankenmerge.evaluation.harness import check_tasks, stay_offline

        if not chosen.download:
            stay_offline()
        check_tasks(chosen.harness_tasks)
    read = read_texts(texts, separator, download=chosen.download)
    if dry_run:
        from frankenmerge.workflows.costs import evaluate_cost

        placement = chosen.placement
        print_cost(
            "evaluate",
            evaluate_cost(models, read, chosen),
            dtype=placement.dtype,
            device=placement.device,
            as_json=as_json,
        )
        return
    found = evaluated(
        models,
        read,
        chosen,
        arguments=_arguments(invocation),
        progress=progress,
    )
    print_remarks(found.remarks)
    if output:
        save(found.record, output)
    if as_json:
        print_json(found.record.as_json())
    else:
        _print(found)
        if output:
            out().print(f"Written to {output}", markup=False)
    if found.comparison and not found.comparison.passed:
        sys.exit(WORSE)


def _are_results(invocation: click.Context, models: tuple[str, ...]) -> bool:
    """Whether all models are files of results.

    Raises FrankenmergeError for results together with models, or with options for models.
    """
    from frankenmerge.evaluation.item_files import has_item_results

    results = [model for model in models if has_item_results(Path(model))]
    if not results:
        return False
    others = [model for model in models if model not in results]
    others += [
        parameter.opts[0]
        for parameter in invocation.command.params
        if parameter.name not in ("models", "output", "as_json", "quiet")
        and invocation.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    if others:
        expected = f"only results, as {results[0]}, with at most -o and --json"
        raise fail("evaluate", expected, ", ".join(others), "compare results by themselves")
    return True


def _compare_results(
    invocation: click.Context, models: tuple[str, ...], output: Path | None, as_json: bool
) -> None:
    from frankenmerge.artefacts.evaluation import save
    from frankenmerge.workflows.comparing import compare_item_results

    paths = [Path(model) for model in models]
    record = compare_item_results(paths, arguments=_arguments(invocation))
    if output:
        save(record, output)
    if as_json:
        print_json(record.as_json())
        return
    console = out()
    console.print(tasks_table(record))
    for made in task_differences_tables(record.task_differences):
        console.print(made)
    if output:
        console.print(f"Written to {output}", markup=False)


def _options(options: dict[str, Any]) -> "EvaluateOptions":
    from frankenmerge.models.loading import Placement
    from frankenmerge.workflows.evaluating import EvaluateOptions

    placement = Placement(
        options.pop("dtype"),
        options.pop("device"),
        options.pop("max_memory") or {},
        options.pop("offload"),
    )
    words, compare = options.pop("lists"), options.pop("threshold")
    return EvaluateOptions(placement=placement, words=words, compare=compare, **options)


def _arguments(context: click.Context) -> dict[str, Any]:
    """The command's arguments as JSON values."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [str(part) for part in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in sorted(context.params.items())}


def _print(found: "Evaluated") -> None:
    console, findings, record = out(), found.findings, found.record
    results = found.results
    if record.texts:
        title = "On text (bits per byte; lower is better)"
        console.print(results_table(results, title, found.checks.seed))
    for made in further_tables(results, findings):
        console.print(made)
    if record.texts:
        _print_size(found)
    if record.differences:
        console.print(differences_table(record.differences))
    for made in task_differences_tables(record.task_differences):
        console.print(made)
    for name, blocks in findings.seams.items():
        console.print(seams_table(name, blocks))
    for name, entries in findings.retention.items():
        console.print(retention_table(name, entries))
    if findings.samples:
        print_samples(console, findings.samples)
    for check in found.predictions:
        print_prediction_check(console, check)
    for entry in found.gains:
        _print_gain_check(console, entry)
    for entry in record.healings:
        _print_healing_check(console, entry)
    _print_comparison(console, found)


def _print_size(found: "Evaluated") -> None:
    """Say how much text was measured, and how."""
    record, totals = found.record, [result.total for result in found.results]
    tokens = sorted({total.tokens for total in totals})
    documents = sum(text.documents or 1 for text in record.texts)
    parts = f" in {documents:,} documents" if documents > len(record.texts) else ""
    counted = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    out().print(
        f"Windows of {record.context} tokens, {record.dtype}; {counted} tokens of "
        f"{totals[0].bytes:,} bytes{parts}."
    )


def print_prediction_check(console: Console, check: "PredictionCheck") -> None:
    """Show what was predicted, what was measured, and whether it lies in the interval."""
    verdict = "within the interval" if check.held else "outside the interval"
    interval = f"90 % interval {check.low:z.3f} to {check.high:z.3f}"
    console.print(
        f"{Path(check.recipe).name}: predicted damage {check.predicted:z.3f} nats per token "
        f"({interval}), measured {check.measured:z.3f}: {verdict}."
    )


def _print_gain_check(console: Console, check: "GainCheck") -> None:
    """Show what a recipe won where it was searched for, and what it wins here."""
    (low, high), (low_here, high_here) = check.predicted_interval, check.measured_interval
    coverage = f"{check.predicted_coverage:.0%}".replace("%", " %")
    console.print(
        f"{Path(check.recipe).name}: predicted gain {check.predicted:z.3f} nats per token "
        f"({coverage} interval {low:z.3f} to {high:z.3f}), measured here {check.measured:z.3f} "
        f"({low_here:z.3f} to {high_here:z.3f}) against {Path(check.best_donor).name}."
    )


def _print_healing_check(console: Console, check: "HealingCheck") -> None:
    """Show what healing has changed, and the loss here."""
    names = ", ".join(Path(name).name for name in check.on)
    console.print(
        f"{Path(check.model).name}: healed from {check.before:.3f} to {check.after:.3f} nats per "
        f"token on tokens of {names}; measured here {check.measured:.3f}.",
        markup=False,
    )


def _print_comparison(console: Console, found: "Evaluated") -> None:
    comparison = found.comparison
    for entry in comparison.verdicts if comparison else ():
        low, high = entry.interval
        value = f"{entry.bits_per_byte:+.3f} ({low:+.3f} to {high:+.3f}) bits per byte"
        limit = f"{comparison.threshold:+.3f} allowed" if comparison else ""
        names = f"{Path(entry.model).name} compared with {Path(entry.donor).name}"
        style = {"worse": "bold red", "undecided": "bold"}.get(entry.verdict, "green")
        more = "; more text would decide" if entry.verdict == "undecided" else ""
        verdict = (entry.verdict, style)
        console.print(Text.assemble(f"{names}: {value}, {limit}: ", verdict, f"{more}."))
