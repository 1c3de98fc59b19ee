"""The record of an evaluation: everything that was found, and what produced it."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

import frankenmerge
from frankenmerge.artefacts.evaluation import (
    KIND,
    BlockRecord,
    DifferenceRecord,
    DomainRecord,
    Evaluation,
    GainCheck,
    HealingCheck,
    ItemResultsRecord,
    KeptBlockRecord,
    ModelRecord,
    OriginRecord,
    PredictionCheck,
    RetentionRecord,
    SeamsRecord,
    TaskDifferenceRecord,
    TaskRecord,
    TextDifferenceRecord,
    TextRecord,
)
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.evaluation.bench import Bench, Result
from frankenmerge.evaluation.checks import Checks, Findings
from frankenmerge.evaluation.documents import Text
from frankenmerge.evaluation.intervals import difference, intervals, pooled, resampled
from frankenmerge.evaluation.non_inferiority import Comparison, merges
from frankenmerge.evaluation.paired import ItemResults, paired_tests
from frankenmerge.evaluation.retention import Retention
from frankenmerge.evaluation.samples import invalid_rate, repetition


def evaluation_record(
    results: Sequence[Result],
    bench: Bench,
    checks: Checks,
    findings: Findings,
    *,
    predictions: Sequence[PredictionCheck | Mapping[str, Any]] = (),
    gains: Sequence[GainCheck] = (),
    healings: Sequence[HealingCheck] = (),
    comparison: Comparison | None = None,
    against: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    recipes: Mapping[str, str] | None = None,
    items: Mapping[str, str] | None = None,
) -> Evaluation:
    """Return the results of an evaluation and what produced them, as `evaluate -o` writes them.

    Args:
        results: of every model; docs/evaluate.md explains the figures.
        bench: the texts and the checkpoints.
        checks: what was examined beyond losses.
        findings: what was found.
        predictions: what was predicted of recipes, and measured.
        gains: of recipes that were searched for by their gain, and measured.
        healings: of healed models, by their records.
        comparison: with the best donors, where it was asked for.
        against: the model that all merges are compared with, besides their donors.
        arguments: of the command.
        recipes: hashes of the files of recipes, and of LoRAs that repeat blocks, by model name.
        items: hashes of the files of items, by path.
    """
    by_name = {result.name: result for result in results}
    pairs = [
        (by_name[name], by_name[donor])
        for name, donors in merges(results, against).items()
        for donor in donors
    ]
    return Evaluation(
        kind=KIND,
        models=[_model(result, findings, checks.seed) for result in results],
        differences=[
            _difference(model, donor, checks.seed) for model, donor in pairs if model.losses
        ],
        seams=[
            SeamsRecord(model=name, blocks=[BlockRecord(**block._asdict()) for block in blocks])
            for name, blocks in findings.seams.items()
        ],
        retention=[
            _retention(name, entry)
            for name, entries in findings.retention.items()
            for entry in entries
        ],
        tasks=[
            TaskRecord(model=name, **figure._asdict())
            for name, figures in findings.tasks.items()
            for figure in figures
        ],
        item_results=item_records(findings.items),
        task_differences=task_differences(
            [(model.name, donor.name) for model, donor in pairs], findings.items
        ),
        predictions=[PredictionCheck.model_validate(check) for check in predictions],
        gains=list(gains),
        healings=list(healings),
        comparison=comparison.record() if comparison else None,
        dtype=bench.placement.dtype,
        context=bench.context,
        texts=[_text(text) for text in bench.texts],
        provenance=_origin(bench, checks, arguments or {}, recipes or {}, items or {}),
    )


def item_records(results: Mapping[str, Sequence[ItemResults]]) -> list[ItemResultsRecord]:
    """Results by item, as they are stored in the evaluation's file; `results` by model."""
    return [
        ItemResultsRecord.of(
            model=model,
            task=each.task,
            metric=each.metric,
            correct="".join(str(int(right)) for right in each.correct.values()),
            items=None if list(each.correct) == _numbers(len(each.correct)) else [*each.correct],
        )
        for model, entries in results.items()
        for each in entries
    ]


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def task_differences(
    pairs: Sequence[tuple[str, str]], results: Mapping[str, Sequence[ItemResults]]
) -> list[TaskDifferenceRecord]:
    """Paired comparisons of models with donors on the items of their tasks.

    Args:
        pairs: (model, donor).
        results: by model.

    Raises:
        FrankenmergeError: for a pair with results on different items.
    """
    return [
        TaskDifferenceRecord(model=model, donor=donor, **test._asdict())
        for model, donor in pairs
        for test in paired_tests(
            results.get(model, ()), results.get(donor, ()), f"{model} and {donor}"
        )
    ]


def _model(result: Result, findings: Findings, seed: int) -> ModelRecord:
    samples = findings.samples.get(result.name, [])
    return ModelRecord.model_validate(
        {
            "name": result.name,
            "role": result.role,
            **({"key": result.key} if result.key else {}),
            **(_losses(result, seed) if result.losses else {}),
            "invalid_words": invalid_rate(samples),
            "repetition": repetition(samples),
            "samples": [
                {"prompt": sample.prompt, "text": sample.text, "invalid": sample.invalid}
                for sample in samples
            ],
        }
    )


def _losses(result: Result, seed: int) -> dict[str, Any]:
    sums = resampled(result.losses, seed)
    return {
        **result.total.as_json(),
        "intervals": intervals(pooled(sums)),
        "texts": {
            name: loss.as_json() | {"intervals": intervals(sums[name])}
            for name, loss in result.losses.items()
        },
        "domains": [
            DomainRecord(
                name=name,
                documents=loss.documents,
                tokens=loss.tokens,
                bits_per_byte=loss.bits_per_byte,
                nats_per_token=loss.nats_per_token,
            )
            for name, loss in result.losses.items()
        ],
    }


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
    digest = hashlib.sha256(text.content.encode()).hexdigest()
    documents = len(text.documents)
    return TextRecord(path=text.name, sha256=digest, bytes=text.bytes, documents=documents)


def _origin(
    bench: Bench,
    checks: Checks,
    arguments: Mapping[str, Any],
    recipes: Mapping[str, str],
    items: Mapping[str, str],
) -> OriginRecord:
    return OriginRecord(
        arguments=dict(arguments),
        seed=checks.seed,
        reference_words=len(checks.vocabulary),
        versions=library_versions() | {"python": platform.python_version()},
        models={
            name: {"fingerprint": checkpoint.fingerprint, "revision": _revision(checkpoint)}
            for name, checkpoint in bench.checkpoints.items()
        },
        recipes=dict(recipes),
        **({"items": dict(items)} if items else {}),
    )


def library_versions() -> dict[str, str]:
    """The versions of what computes figures."""
    packages = (frankenmerge, torch, transformers)
    return {package.__name__: package.__version__ for package in packages}


def _revision(checkpoint: Checkpoint) -> str | None:
    """The commit of a donor in the hub's cache."""
    return checkpoint.path.name if checkpoint.path.parent.name == "snapshots" else None
