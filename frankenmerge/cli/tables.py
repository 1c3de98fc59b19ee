"""Results of an evaluation and of a plan as tables and lines of at most 80 columns."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from frankenmerge.cli.console import table
from frankenmerge.reporting.labels import task_name

if TYPE_CHECKING:
    from frankenmerge.artefacts.evaluation import DifferenceRecord, Evaluation, TaskDifferenceRecord
    from frankenmerge.evaluation.bench import Result
    from frankenmerge.evaluation.checks import Findings
    from frankenmerge.evaluation.harness import TaskFigure
    from frankenmerge.evaluation.retention import Retention
    from frankenmerge.evaluation.samples import Sample
    from frankenmerge.evaluation.seams import BlockComparison
    from frankenmerge.planning.seams import SeamEvidence
    from frankenmerge.workflows.planning import Damped

FEW = 2
"""Up to this many texts have a column each in the first table."""
COLUMNS = 5
"""Most columns of further figures in one table; more are split over several tables."""


def signed_interval(interval: tuple[float, float]) -> str:
    """An interval of differences, `+0.1009 to +0.1197`."""
    low, high = interval
    return f"{low:+.4f} to {high:+.4f}"


def results_table(results: "Sequence[Result]", title: str, seed: int = 0) -> Table:
    """Results on all texts together, and on each text where there are at most `FEW`."""
    from frankenmerge.evaluation.intervals import intervals, pooled, resampled

    texts = list(results[0].losses)
    each = texts if 1 < len(texts) <= FEW else []
    made = table(
        title,
        "model",
        *(Path(text).stem for text in each),
        "bits/byte",
        "95 % in",
        "perplexity",
        *([] if each else ["nats/token"]),
        "top-1",
    )
    for result in results:
        total = result.total
        low, high = intervals(pooled(resampled(result.losses, seed)))["bits_per_byte"]
        accuracy = "" if total.accuracy is None else f"{total.accuracy:.1%}"
        made.add_row(
            _label(result),
            *(f"{result.losses[text].bits_per_byte:.3f}" for text in each),
            f"{total.bits_per_byte:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{total.perplexity:,.1f}",
            *([] if each else [f"{total.nats_per_token:.3f}"]),
            accuracy,
        )
    return made


def _label(result: "Result") -> str:
    name = Path(result.name).name
    return f"{name} (donor)" if result.role == "donor" else name


def further_tables(results: "Sequence[Result]", findings: "Findings") -> Iterable[Table]:
    """Bits per byte of each of more than `FEW` texts, rates of samples, figures of tasks."""
    from frankenmerge.evaluation.samples import invalid_rate, repetition

    columns: list[tuple[str, list[str]]] = []
    texts = results[0].losses
    for text in texts if len(texts) > FEW else ():
        columns.append(
            (
                f"{Path(text).stem} bits/byte",
                [f"{result.losses[text].bits_per_byte:.3f}" for result in results],
            )
        )
    for name, rate in (("invalid words", invalid_rate), ("repeated", repetition)):
        if findings.samples:
            rates = [rate(findings.samples[result.name]) for result in results]
            columns.append((name, ["" if value is None else f"{value:.1%}" for value in rates]))
    by_model = {
        result.name: {
            (figure.task, figure.metric): figure for figure in findings.tasks.get(result.name, [])
        }
        for result in results
    }
    for key in dict.fromkeys(key for figures in by_model.values() for key in figures):
        cells = [by_model[result.name].get(key) for result in results]
        task, metric = key
        columns.append(
            (
                f"{task_name(task)} {metric}",
                ["" if cell is None else _with_error(cell) for cell in cells],
            )
        )
    for first in range(0, len(columns), COLUMNS):
        group = columns[first : first + COLUMNS]
        made = table("Further figures", "model", *(name for name, _ in group))
        for number, result in enumerate(results):
            made.add_row(_label(result), *(cells[number] for _, cells in group))
        yield made


def _with_error(figure: "TaskFigure") -> str:
    return f"{figure.value:.3f}" + ("" if figure.stderr is None else f" ±{figure.stderr:.3f}")


def differences_table(differences: "Sequence[DifferenceRecord]") -> Table:
    """Differences in bits per byte between models and donors."""
    title = "Compared with each donor, on the same text (bits per byte; above 0 is worse)"
    made = table(title, "model", "donor", "difference", "95 % in")
    for entry in differences:
        low, high = entry.interval or (float("nan"), float("nan"))
        names = Path(entry.model).name, Path(entry.donor).name
        made.add_row(*names, f"{entry.bits_per_byte:+.3f}", f"{low:+.3f} to {high:+.3f}")
    return made


def task_differences_tables(differences: "Sequence[TaskDifferenceRecord]") -> Iterable[Table]:
    """Accuracies of models and donors on the same items, a table for each pair."""
    for model, donor in dict.fromkeys((entry.model, entry.donor) for entry in differences):
        title = f"{Path(model).name} and {Path(donor).name} on the same items (above 0 is better)"
        made = table(title, "task", "difference", "95 % in", "only first : second", "p", "p (Holm)")
        made.columns[2].no_wrap = True
        for entry in differences:
            if (entry.model, entry.donor) == (model, donor):
                low, high = entry.interval
                made.add_row(
                    f"{task_name(entry.task)} {entry.metric}",
                    f"{entry.difference:+.3f}",
                    f"{low:+.3f} to {high:+.3f}",
                    f"{entry.only_model} : {entry.only_donor}",
                    f"{entry.p:.2g}",
                    f"{entry.p_holm:.2g}",
                )
        yield made


def tasks_table(evaluation: "Evaluation") -> Table:
    """Figures of tasks with their standard errors."""
    made = table("Tasks", "model", "task", "metric", "value", "error")
    for entry in evaluation.tasks:
        error = "" if entry.stderr is None else f"{entry.stderr:.3f}"
        names = Path(entry.model).name, task_name(entry.task)
        made.add_row(*names, entry.metric, f"{entry.value:.3f}", error)
    return made


def seams_table(name: str, blocks: "Sequence[BlockComparison]") -> Table:
    """A merged model block by block, compared with its donors."""
    donors = list(blocks[0].cosine)
    short = {donor: Path(donor).name for donor in donors}
    made = table(
        f"{Path(name).name}: after each block",
        "block",
        "from",
        "norm",
        *(f"cos {short[donor]}" for donor in donors[:2]),
        *(f"KL {short[donor]}" for donor in donors[:2]),
        "KL alone",
    )
    for entry in blocks:
        cosines = (f"{entry.cosine[donor]:.2f}" for donor in donors[:2])
        divergences = (f"{entry.kl[donor]:.2f}" for donor in donors[:2])
        origin = f"{Path(entry.donor).name} {entry.donor_block}"
        made.add_row(
            f"{entry.block}",
            origin,
            f"{entry.norm_ratio:.2f}",
            *cosines,
            *divergences,
            f"{entry.kl_alone:.2f}",
            style="bold" if entry.seam else None,
        )
        if entry.seam:
            made.rows[-1].end_section = False
            made.rows[-2].end_section = True
    return made


def retention_table(name: str, entries: "Sequence[Retention]") -> Table:
    """The share of each donor's features that a merged model preserves."""
    title = f"{Path(name).name}: preserved features"
    made = table(title, "donor", "share", "by chance", "by block")
    for entry in entries:
        blocks = " ".join(f"{block.block}:{block.kept:.0%}" for block in entry.blocks)
        made.add_row(Path(entry.donor).name, f"{entry.kept:.1%}", f"{entry.chance:.1%}", blocks)
    return made


def print_samples(console: Console, samples: "Mapping[str, list[Sample]]") -> None:
    """Show every model's continuation of each prompt, invalid words highlighted."""
    for number, first in enumerate(next(iter(samples.values()))):
        console.print(Text(f"\nAfter {first.prompt!r}:", style="bold"))
        for name, entries in samples.items():
            sample = entries[number]
            shown = Text(f"{sample.text!r}")
            shown.highlight_words(
                [word for word in set(sample.invalid)], "bold red", case_sensitive=False
            )
            console.print(Text(f"  {Path(name).name}: ", style="bold") + shown)
            if sample.invalid:
                console.print(
                    f"    not in the reference words: {', '.join(dict.fromkeys(sample.invalid))}",
                    markup=False,
                )


def print_damping(console: Console, damped: "Damped") -> None:
    """Show what damping the best plan's repeated blocks gained."""
    ways = ", ".join(f"{name} {value:z.3f}" for name, value in damped.damage.items())
    used = f"Using {damped.kept}." if damped.kept else "Not damped."
    console.print(f"Damping of repeated blocks (loss in nats/token): {ways}. {used}")


def print_seams(console: Console, seams: "Sequence[SeamEvidence]") -> None:
    """Show every seam: what it joins, its cost alone, and the donors' token overlap there."""
    for number, seam in enumerate(seams, 1):
        after, before = (f"{Path(block.model).name} block {block.index}" for block in seam.seam)
        kind = "same depth"
        if seam.skipped:
            kind = f"{abs(seam.skipped)} {'skipped' if seam.skipped > 0 else 'repeated'}"
        overlap, chance = seam.scores["jaccard"], seam.nulls["jaccard"]["permuted_neurons"]
        values = f"alone {seam.cost:.3f}; token overlap {overlap:.3f}, by chance {chance:.3f}"
        console.print(f"Seam {number}: {after} -> {before} ({kind}): {values}", markup=False)
        if seam.gauged:
            console.print(
                "  Agreement is at chance level in the donors' own bases; "
                "the recipe rotates this slice (gauge)."
            )
        elif seam.by_chance:
            console.print(
                "  [bold red]Agreement is at chance level:[/] the same neurons like other tokens "
                "on both sides. Measure this plan first: --verify sampled.",
                markup=True,
            )
