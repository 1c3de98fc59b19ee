"""What is examined in a model besides its losses, while it is in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from frankenmerge.artefacts.atlas import TopTokens
from frankenmerge.artefacts.recipe import Block
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import Fault, raise_all
from frankenmerge.evaluation.bench import Bench, Subject
from frankenmerge.evaluation.harness import TaskFigure, run_tasks
from frankenmerge.evaluation.items import (
    Item,
    choice_log_likelihoods,
    encoded_items,
    item_results,
)
from frankenmerge.evaluation.lineage import same_tokens
from frankenmerge.evaluation.paired import ItemResults
from frankenmerge.evaluation.retention import Retention
from frankenmerge.evaluation.samples import Sample, sampled
from frankenmerge.evaluation.seams import BlockComparison, compared_blocks, windows_of
from frankenmerge.models.hooks import embedding_of
from frankenmerge.progress import Advance, Progress, silent

Search = Callable[[PreTrainedModel, Advance], TopTokens]
"""Complete search, which belongs to another stage; it advances by inputs times blocks."""


@dataclass(frozen=True)
class Checks:
    """What to examine in every model."""

    prompts: Sequence[str] = ()
    """To generate continuations of."""
    vocabulary: frozenset[str] = frozenset()
    """Words that count as valid."""
    seams: bool = False
    """Compare merges with their donors block by block."""
    tasks: Sequence[str] = ()
    """Tasks of lm-evaluation-harness."""
    items: Mapping[str, Sequence[Item]] = field(default_factory=dict)
    """Multiple-choice items, by the name of their task."""
    search: Search | None = None
    """Where the features of merges are asked for."""
    seed: int = 0


@dataclass
class Findings:
    """What was found, by the models' names."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    seams: dict[str, list[BlockComparison]] = field(default_factory=dict)
    tasks: dict[str, list[TaskFigure]] = field(default_factory=dict)
    items: dict[str, list[ItemResults]] = field(default_factory=dict)
    features: dict[str, tuple[tuple[Block, ...], TopTokens]] = field(default_factory=dict)
    """Where the blocks are from, and their top-activating tokens."""
    retention: dict[str, list[Retention]] = field(default_factory=dict)


def examine(
    subject: Subject,
    bench: Bench,
    checks: Checks,
    findings: Findings,
    progress: Progress = silent,
) -> None:
    """Examine a model that is in memory, and add to the findings."""
    name, shown = subject.name, Path(subject.name).name
    if checks.prompts:
        with progress(f"{shown}: samples", len(checks.prompts), "prompts") as advance:
            findings.samples[name] = sampled(
                subject.model,
                subject.tokenizer,
                checks.prompts,
                checks.vocabulary,
                context=bench.context,
                advance=advance,
            )
    blocks = subject.lineage.blocks if subject.lineage else ()
    names = dict.fromkeys(block.model for block in blocks)
    known = blocks and names.keys() <= bench.checkpoints.keys()
    if known and (checks.seams or checks.search):
        _check_tokens(subject, {name: bench.checkpoints[name] for name in names})
        if checks.seams:
            donors = {name: bench.load(name).model for name in names}
            rows = windows_of(subject.texts, bench.context)
            with progress(f"{shown}: seams", len(rows), "windows") as advance:
                compared = compared_blocks(subject.model, blocks, donors, rows, advance)
            findings.seams[name] = compared
        if checks.search:
            total = len(embedding_of(subject.model)) * len(blocks)
            with progress(f"{shown}: features", total, "inputs x blocks") as advance:
                findings.features[name] = blocks, checks.search(subject.model, advance)
    if checks.items or checks.tasks:
        _run_tasks(subject, bench, checks, findings, progress)


def _run_tasks(
    subject: Subject, bench: Bench, checks: Checks, findings: Findings, progress: Progress
) -> None:
    figures, results = [], []
    for task, items in checks.items.items():
        shown = f"{Path(subject.name).name}: {Path(task).name}"
        rows = encoded_items(subject.tokenizer, items, context=bench.context, place=task)
        with progress(shown, len(rows.ids), "choices") as advance:
            sums = choice_log_likelihoods(subject.model, rows, advance=advance)
        results += item_results(task, rows, sums)
    figures += [TaskFigure(each.task, each.metric, each.accuracy, each.stderr) for each in results]
    if checks.tasks:
        found = run_tasks(subject.model, subject.tokenizer, checks.tasks, seed=checks.seed)
        figures, results = figures + found.figures, results + found.items
    findings.tasks[subject.name], findings.items[subject.name] = figures, results


def _check_tokens(subject: Subject, donors: Mapping[str, Checkpoint]) -> None:
    """Raise FrankenmergeError where a donor has other tokens than the model."""
    expected = f"a donor with the tokens of {subject.name}, to compare them block by block"
    raise_all(
        Fault(name, expected, "other tokens", "leave --seams and --retention out")
        for name, donor in donors.items()
        if not same_tokens(subject.source, donor)
    )
