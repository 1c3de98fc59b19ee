"""Evaluate checkpoints and recipes on texts, side by side with every donor of the recipes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from frankenmerge.analysis.complete import complete_search
from frankenmerge.artefacts.evaluation import Evaluation, GainCheck, PredictionCheck
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import fail
from frankenmerge.evaluation.bench import Bench, Result, Subject
from frankenmerge.evaluation.checks import Checks, Findings, examine
from frankenmerge.evaluation.documents import Text, predicted_text
from frankenmerge.evaluation.items import encoded_items, read_items
from frankenmerge.evaluation.language import limited
from frankenmerge.evaluation.lineage import checkpoint_lineage
from frankenmerge.evaluation.non_inferiority import Comparison, judge
from frankenmerge.evaluation.record import evaluation_record
from frankenmerge.evaluation.retention import retained
from frankenmerge.evaluation.samples import read_words, sample_prompts, words_of
from frankenmerge.evaluation.usable_context import Rise, rise_of
from frankenmerge.models.loading import CPU, Placement, load_tokenizer
from frankenmerge.models.lora import WEIGHTS_NAME
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.assemble import splice_tokenizer
from frankenmerge.splicing.opening import open_donor
from frankenmerge.storage.hashing import file_hash
from frankenmerge.workflows.atlases import atlas_of
from frankenmerge.workflows.predictions import check_gains, check_healings, check_predictions
from frankenmerge.workflows.subjects import Model, Subjects, opened_subjects

SUFFIX = ".jsonl"
"""Of files of items, by which they differ from tasks of lm-evaluation-harness."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured, and how."""

    context: int | None = None
    """Tokens in a window; by default what every model was made for, at most 2048."""
    tokens: int | None = None
    """Measure at most so many tokens of every text, counted by the first model's tokenizer."""
    samples: int = 0
    """Continuations of so many prompts taken from the texts."""
    prompts: tuple[str, ...] = ()
    """Prompts to continue."""
    words: tuple[Path, ...] = ()
    """Lists of valid words, besides those of the texts."""
    seams: bool = False
    """Compare merges with their donors block by block."""
    retention: bool = False
    """Report the share of donor features that a merge preserves."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, and JSONL files of items (see `item_files`)."""
    compare: float | None = None
    """Bits per byte by which a merge may be worse than its best donor."""
    against: str | None = None
    """Compare merges with this model, instead of their best donor."""
    seed: int = 0
    """Of bootstrap resamples, prompts and lm-evaluation-harness."""
    placement: Placement = CPU
    download: bool = False
    allow_pickle: bool = False

    @property
    def item_files(self) -> tuple[str, ...]:
        """The tasks that are files of items: their names end in `.jsonl`."""
        return tuple(task for task in dict.fromkeys(self.tasks) if task.endswith(SUFFIX))

    @property
    def harness_tasks(self) -> tuple[str, ...]:
        """The tasks of lm-evaluation-harness."""
        return tuple(task for task in self.tasks if not task.endswith(SUFFIX))


class Evaluated(NamedTuple):
    """Everything that was found."""

    results: list[Result]
    """In the order given, then the donors that were not named."""
    findings: Findings
    checks: Checks
    predictions: list[PredictionCheck]
    gains: list[GainCheck]
    comparison: Comparison | None
    record: Evaluation
    """All of it, as `evaluate -o` writes it."""
    remarks: tuple[str, ...] = ()
    """What is worth knowing about the models and the items."""


def evaluate(
    models: Sequence[Model],
    texts: Sequence[Text],
    options: EvaluateOptions = EvaluateOptions(),  # noqa: B008 - it is immutable
    *,
    opened: Mapping[str, Checkpoint] | None = None,
    arguments: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Evaluated:
    """Measure checkpoints and recipes, and every donor of the recipes that was not named itself.

    Recipes are run in memory, and nothing is written. Models are in memory one after another:
    except for the donors of recipes that are still to come, each is released when it was measured.

    Args:
        models: what to measure.
        texts: on what.
        options: what else to examine, and how.
        opened: donors that are open already, by name.
        arguments: of the command, for the record.
        progress: in every model; with several, it says which of how many it is.

    Raises:
        FrankenmergeError: for models that cannot be opened, and recipes that cannot be resolved.
    """
    check_texts(texts, options)
    with opened_subjects(
        models, download=options.download, allow_pickle=options.allow_pickle, opened=opened
    ) as subjects:
        return _evaluated(subjects, texts, options, arguments or {}, progress)


def check_texts(texts: Sequence[Text], options: EvaluateOptions) -> None:
    """Raise FrankenmergeError for what needs a text, if there is none."""
    needing = {
        "--samples": options.samples,
        "--prompt": options.prompts,
        "--seams": options.seams,
        "--compare": options.compare is not None,
    }
    asked = [name for name, value in needing.items() if value]
    if not texts and (asked or not options.tasks):
        expected = f"a text for {', '.join(asked)}" if asked else "a text or a task to measure on"
        raise fail("evaluate", expected, "none", "add --text" + ("" if asked else " or --tasks"))


def _evaluated(
    subjects: Subjects,
    texts: Sequence[Text],
    options: EvaluateOptions,
    arguments: Mapping[str, Any],
    progress: Progress,
) -> Evaluated:
    order = order_of(subjects, options)
    checkpoints = {**subjects.checkpoints, **order.donors}
    bench = Bench(
        texts,
        checkpoints,
        context=options.context,
        placement=options.placement,
        stages=subjects.stages,
    )
    # Missing tokenizers and faulty items are reported before anything is measured.
    tokenizers = {name: load_tokenizer(each) for name, each in checkpoints.items()}
    tokenizers |= {name: splice_tokenizer(each) for name, each in subjects.splices.items()}
    if options.tokens:
        # One tokenizer counts for all, so that every model is measured on the same bytes.
        first = tokenizers[subjects.names[0]]
        texts = [limited(first, text, options.tokens) for text in texts]
        bench = bench.on(texts)
    checks, findings = _checks(texts, options), Findings()
    remarks = _cut_items(checks, tokenizers, bench.context)
    results = _results(bench, subjects, order, checks, findings, progress)
    if texts and not options.context and (rises := _rises(results, bench)):
        bench = bench.within(min(rise.position for rise in rises.values()))
        remarks = (
            *_cut_items(checks, tokenizers, bench.context),
            *(
                f"{name}: behind {rise.position} tokens of context it loses {rise.nats:.2f} nats "
                f"per token more on {texts[0].name}"
                for name, rise in rises.items()
            ),
            f"all windows have {bench.context} tokens; --context sets another number",
        )
        findings = Findings()
        results = _results(bench, subjects, order, checks, findings, progress)
    findings.retention = _retention(findings, checkpoints, options, progress)
    comparison = None
    if options.compare is not None:
        comparison = judge(results, options.compare, options.seed, options.against)
    predictions = check_predictions(results, subjects.splices, subjects.files) if texts else []
    gains = check_gains(results, subjects.splices, subjects.files, options.seed) if texts else []
    folders = {name: each.path for name, each in checkpoints.items()} | subjects.adapters
    healings = check_healings(results, folders) if texts else []
    record = evaluation_record(
        results,
        bench,
        checks,
        findings,
        predictions=predictions,
        gains=gains,
        healings=healings,
        comparison=comparison,
        against=options.against,
        arguments=arguments,
        recipes={
            name: file_hash(file)
            for name, file in {**subjects.files, **_adapter_files(subjects)}.items()
        },
        items={name: file_hash(Path(name)) for name in checks.items},
    )
    return Evaluated(results, findings, checks, predictions, gains, comparison, record, remarks)


def _adapter_files(subjects: Subjects) -> dict[str, Path]:
    return {name: folder / WEIGHTS_NAME for name, folder in subjects.adapters.items()}


def _cut_items(
    checks: Checks, tokenizers: Mapping[str, PreTrainedTokenizerBase], context: int
) -> tuple[str, ...]:
    """Remarks on items that are longer than the models can read."""
    remarks = []
    for task, items in checks.items.items():
        for name, tokenizer in tokenizers.items():
            rows = encoded_items(tokenizer, items, context=context, place=f"{task} for {name}")
            if rows.cut:
                remarks.append(
                    f"{task} for {name}: {rows.cut} of {len(rows.ids)} choices with their context "
                    f"have more than {context + 1} tokens and lose the first ones"
                )
    return tuple(remarks)


class Order(NamedTuple):
    """What is measured one after another, and what must be in memory then."""

    names: list[str]
    donors: dict[str, Checkpoint]
    """Of the names those that were not given: donors of recipes and of merged checkpoints."""
    needed: dict[str, tuple[str, ...]]
    """The donors that must be in memory for a model, besides itself."""

    def kept_after(self, number: int) -> set[str]:
        """What stays in memory when so many are measured."""
        later = self.names[number:]
        return {*later, *(donor for other in later for donor in self.needed.get(other, ()))}


def order_of(subjects: Subjects, options: EvaluateOptions, *, weights: bool = True) -> Order:
    """The order of measuring; raises FrankenmergeError where donors are needed and not known."""
    with_donors = options.seams or options.retention
    with_donors |= options.compare is not None and not options.against
    recorded = _recorded_donors(subjects) if with_donors else {}
    if with_donors and not subjects.splices and not any(recorded.values()):
        expected = "a recipe, or a checkpoint with a frankenmerge.json that names its donors"
        raise fail("evaluate", expected, ", ".join(subjects.names), "name one")
    donors = _donors(subjects, recorded, options, weights)
    needed = _needed(subjects, recorded if options.seams else None)
    return Order([*subjects.names, *donors], donors, needed)


def _needed(
    subjects: Subjects, recorded: Mapping[str, tuple[str, ...]] | None
) -> dict[str, tuple[str, ...]]:
    """The donors that must be in memory for each model; `recorded` where seams are compared."""
    needed = {name: splice.copied_donors for name, splice in subjects.splices.items()}
    if recorded is None:
        return needed
    compared = {
        name: tuple(dict.fromkeys([*needed.get(name, ()), *lineage.donors]))
        for name, lineage in subjects.lineages.items()
    }
    return {**compared, **recorded}


def _results(
    bench: Bench,
    subjects: Subjects,
    order: Order,
    checks: Checks,
    findings: Findings,
    progress: Progress,
) -> list[Result]:
    """Measure and examine one model after another; releases those that none needs any more."""
    results = []
    for number, name in enumerate(order.names, 1):
        shown = _numbered(progress, number, len(order.names))

        def visit(subject: Subject, shown: Progress = shown) -> None:
            examine(subject, bench, checks, findings, shown)

        if name in subjects.splices:
            splice = subjects.splices[name]
            lineage, adapter = subjects.lineages[name], subjects.adapters.get(name)
            results.append(
                bench.splice(
                    name, splice, lineage=lineage, adapter=adapter, progress=shown, visit=visit
                )
            )
        else:
            role = "donor" if name in order.donors else "model"
            results.append(bench.checkpoint(name, role=role, progress=shown, visit=visit))
        bench.keep(order.kept_after(number))
    return results


def _rises(results: Sequence[Result], bench: Bench) -> dict[str, Rise]:
    """By model, where its loss on the first text rises within the windows."""
    losses = {result.name: result.losses[bench.texts[0].name] for result in results}
    found = {name: rise_of(loss, bench.context) for name, loss in losses.items()}
    return {name: rise for name, rise in found.items() if rise}


def _numbered(progress: Progress, number: int, models: int) -> Progress:
    """Progress that says which of the models it is about."""
    if models == 1:
        return progress
    return lambda what, total, unit: progress(f"{number} of {models}: {what}", total, unit)


def _recorded_donors(subjects: Subjects) -> dict[str, tuple[str, ...]]:
    """The donors of merged checkpoints, by the provenance in their folders."""
    recorded = {}
    for name, checkpoint in subjects.checkpoints.items():
        others = {other: each for other, each in subjects.checkpoints.items() if other != name}
        if lineage := checkpoint_lineage(checkpoint, others):
            recorded[name] = lineage.donors
    return recorded


def _donors(
    subjects: Subjects,
    recorded: Mapping[str, tuple[str, ...]],
    options: EvaluateOptions,
    weights: bool,
) -> dict[str, Checkpoint]:
    """What is measured in addition to the models that were named."""
    names = [*subjects.donors, *(name for donors in recorded.values() for name in donors)]
    names += [options.against] if options.against else []
    wanted = (name for name in dict.fromkeys(names) if name not in subjects.names)
    opening: Any = {
        "download": options.download,
        "allow_pickle": options.allow_pickle,
        "weights": weights,
    }
    return {name: subjects.donors.get(name) or open_donor(name, **opening) for name in wanted}


def _checks(texts: Sequence[Text], options: EvaluateOptions) -> Checks:
    passages = _passages(texts, options.samples)
    prompts = [*options.prompts, *sample_prompts(passages, options.samples, options.seed)]
    words = [*(words_of(text.content) for text in texts), *map(read_words, options.words)]
    return Checks(
        prompts=prompts,
        vocabulary=frozenset().union(*words),
        seams=options.seams,
        tasks=options.harness_tasks,
        items={task: read_items(Path(task)) for task in options.item_files},
        search=(lambda model, advance: complete_search(model, k=1, advance=advance))
        if options.retention
        else None,
        seed=options.seed,
    )


def _passages(texts: Sequence[Text], count: int) -> list[str]:
    """Where each of `count` prompts is from: the texts in turn, of each evenly spaced documents."""
    passages = []
    for number in range(count):
        documents = texts[number % len(texts)].documents
        passages.append(predicted_text(documents[number * len(documents) // count]))
    return passages


def _retention(
    findings: Findings,
    checkpoints: Mapping[str, Checkpoint],
    options: EvaluateOptions,
    progress: Progress,
) -> dict[str, list]:
    """The features of each donor that every model preserves; atlases of donors are cached."""
    names = dict.fromkeys(
        block.model for blocks, _ in findings.features.values() for block in blocks
    )
    tops = {
        name: atlas_of(
            checkpoints[name],
            device=options.placement.device,
            dtype=options.placement.dtype,
            progress=progress,
        ).top["plain"]
        for name in names
    }
    return {name: retained(top, tops, blocks) for name, (blocks, top) in findings.features.items()}
