"""An evaluation: what was looked at while the models were in memory, and everything that was found, as one JSON object."""

import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import frankenmerge
from frankenmerge.artefacts.atlas import TopTokens
from frankenmerge.artefacts.evaluation import (
    KIND,
    BlockRecord,
    DifferenceRecord,
    Evaluation,
    KeptBlockRecord,
    ModelRecord,
    OriginRecord,
    PredictionCheck,
    RetentionRecord,
    SeamsRecord,
    TaskRecord,
    TextDifferenceRecord,
    TextRecord,
)
from frankenmerge.artefacts.recipe import Block
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import Fault, raise_all
from frankenmerge.evaluation.compare import Bench, Result, Subject, Text, is_recipe
from frankenmerge.evaluation.harness import TaskFigure, run_tasks
from frankenmerge.evaluation.intervals import difference, drawn, intervals, together
from frankenmerge.evaluation.lineage import same_tokens
from frankenmerge.evaluation.non_inferiority import Comparison, merges
from frankenmerge.evaluation.retention import Retention
from frankenmerge.evaluation.samples import Sample, invalid_rate, repetition, sampled
from frankenmerge.evaluation.seams import BlockComparison, compared_blocks, windows_of
from frankenmerge.models.hooks import embedding_of
from frankenmerge.models.loading import load_tokenizer
from frankenmerge.progress import Advance, Progress, silent


@dataclass
class Looks:
    """What is looked at in every model besides its losses, and what was found, by the models' names."""

    prompts: Sequence[str] = ()
    """What to let it go on from."""
    vocabulary: frozenset[str] = frozenset()
    """Words that are no inventions."""
    with_seams: bool = False
    """Whether to hold what is made of donors that are on the bench against them, block by block."""
    with_tasks: Sequence[str] = ()
    """Tasks of lm-evaluation-harness."""
    search: Callable[[PreTrainedModel, Advance], TopTokens] | None = None
    """Complete search, where the features of such models are asked for; the stage that has it is
    another. It is given what to call with the inputs times blocks done.
    """
    progress: Progress = silent
    """Shows progress; tasks show their own."""
    seed: int = 0
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    seams: dict[str, list[BlockComparison]] = field(default_factory=dict)
    tasks: dict[str, list[TaskFigure]] = field(default_factory=dict)
    features: dict[str, tuple[tuple[Block, ...], TopTokens]] = field(default_factory=dict)
    """Where the blocks are from, and what was searched."""
    retention: dict[str, list[Retention]] = field(default_factory=dict)

    def visit(self, subject: Subject, bench: Bench) -> None:
        """Look at a model that is in memory."""
        tokenizer, shown = load_tokenizer(subject.reader), Path(subject.name).name
        if self.prompts:
            with self.progress(f"{shown}: samples", len(self.prompts), "prompts") as advance:
                self.samples[subject.name] = sampled(
                    subject.model,
                    tokenizer,
                    self.prompts,
                    self.vocabulary,
                    context=bench.context,
                    advance=advance,
                )
        blocks, model = subject.lineage.blocks if subject.lineage else (), subject.model
        names = dict.fromkeys(block.model for block in blocks)
        if blocks and names.keys() <= bench.checkpoints.keys() and (self.with_seams or self.search):
            _check_tokens(subject, {name: bench.checkpoints[name] for name in names})
            if self.with_seams:
                donors = {name: bench.load(name)[1] for name in names}
                rows = windows_of(subject.texts, bench.context)
                with self.progress(f"{shown}: seams", len(rows), "windows") as advance:
                    self.seams[subject.name] = compared_blocks(model, blocks, donors, rows, advance)
            if self.search:
                with self.progress(
                    f"{shown}: features", len(embedding_of(model)) * len(blocks), "inputs x blocks"
                ) as advance:
                    self.features[subject.name] = blocks, self.search(model, advance)
        if self.with_tasks:
            self.tasks[subject.name] = run_tasks(
                subject.model, tokenizer, self.with_tasks, seed=self.seed
            )


def _check_tokens(subject: Subject, donors: Mapping[str, Checkpoint]) -> None:
    """Raise FrankenmergeError where a donor reads other tokens than the model: the two cannot be held together block by block."""
    raise_all(
        Fault(
            name,
            f"a donor with the tokens of {subject.name}, to hold them together block by block",
            "other tokens",
            "leave --seams and --retention out",
        )
        for name, donor in donors.items()
        if not same_tokens(subject.reader, donor)
    )


def evaluation_record(
    results: Sequence[Result],
    bench: Bench,
    looks: Looks,
    *,
    dtype: str = "float32",
    predictions: Sequence[PredictionCheck | Mapping[str, Any]] = (),
    comparison: Comparison | None = None,
    against: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    keys: Mapping[str, str] | None = None,
) -> Evaluation:
    """Return the results of an evaluation and what produced them, as `evaluate -o` writes them.

    Args:
        results: of every model; docs/evaluate.md explains the figures.
        bench: the texts and the checkpoints.
        looks: the results beyond losses.
        dtype: the models' data type.
        predictions: what was predicted of recipes, and measured.
        comparison: with the best donors, where it was asked for.
        against: the model that all merges are compared with, besides their donors.
        arguments: of the command.
        keys: by model name, the key of a recipe with its donors, where it is known.
    """
    by_name = {result.name: result for result in results}
    pairs = [
        (by_name[name], by_name[donor])
        for name, donors in merges(results, against).items()
        for donor in donors
    ]
    return Evaluation(
        kind=KIND,
        models=[_model(result, looks, (keys or {}).get(result.name)) for result in results],
        differences=[_difference(model, donor, looks.seed) for model, donor in pairs],
        seams=[
            SeamsRecord(model=name, blocks=[BlockRecord(**block._asdict()) for block in blocks])
            for name, blocks in looks.seams.items()
        ],
        retention=[
            _retention(name, entry)
            for name, entries in looks.retention.items()
            for entry in entries
        ],
        tasks=[
            TaskRecord(model=name, **figure._asdict())
            for name, figures in looks.tasks.items()
            for figure in figures
        ],
        predictions=[PredictionCheck.model_validate(check) for check in predictions],
        comparison=comparison.record() if comparison else None,
        dtype=dtype,
        context=bench.context,
        texts=[_text(text) for text in bench.texts],
        provenance=_origin(by_name, bench, looks, arguments or {}),
    )


def evaluation_json(
    results: Sequence[Result], bench: Bench, looks: Looks, **options: Any
) -> dict[str, Any]:
    """The same as JSON; see `evaluation_record`."""
    return evaluation_record(results, bench, looks, **options).as_json()


def _model(result: Result, looks: Looks, key: str | None) -> ModelRecord:
    sums, samples = drawn(result.losses, looks.seed), looks.samples.get(result.name, [])
    return ModelRecord.model_validate(
        {
            "name": result.name,
            "role": result.role,
            **({"key": key} if key else {}),
            **result.total.as_json(),
            "intervals": intervals(together(sums)),
            "texts": {
                name: loss.as_json() | {"intervals": intervals(sums[name])}
                for name, loss in result.losses.items()
            },
            "invalid_words": invalid_rate(samples),
            "repetition": repetition(samples),
            "samples": [
                {"prompt": sample.prompt, "text": sample.text, "invalid": sample.invalid}
                for sample in samples
            ],
        }
    )


def _difference(model: Result, donor: Result, seed: int) -> DifferenceRecord:
    total, texts = difference(model.losses, donor.losses, seed)
    return DifferenceRecord(
        model=model.name,
        donor=donor.name,
        **total._asdict(),
        texts={name: TextDifferenceRecord(**entry._asdict()) for name, entry in texts.items()},
    )


def _retention(model: str, entry: Retention) -> RetentionRecord:
    return RetentionRecord(
        model=model,
        donor=entry.donor,
        blocks=[KeptBlockRecord(**block._asdict()) for block in entry.blocks],
        kept=entry.kept,
        chance=entry.chance,
    )


def _text(text: Text) -> TextRecord:
    content = text.content.encode()
    digest = hashlib.sha256(content).hexdigest()
    return TextRecord(path=text.name, sha256=digest, bytes=len(content))


def _origin(
    names: Iterable[str], bench: Bench, looks: Looks, arguments: Mapping[str, Any]
) -> OriginRecord:
    return OriginRecord(
        arguments=dict(arguments),
        seed=looks.seed,
        reference_words=len(looks.vocabulary),
        versions={
            "frankenmerge": frankenmerge.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        models={
            name: {"fingerprint": checkpoint.fingerprint, "revision": _revision(checkpoint)}
            for name, checkpoint in bench.checkpoints.items()
        },
        recipes={
            name: hashlib.sha256(Path(name).read_bytes()).hexdigest()
            for name in names
            if is_recipe(name)
        },
    )


def _revision(checkpoint: Checkpoint) -> str | None:
    """The commit of a donor in the hub's cache."""
    return checkpoint.path.name if checkpoint.path.parent.name == "snapshots" else None
