"""Compare results by item that another tool wrote."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import frankenmerge
from frankenmerge.artefacts.evaluation import (
    KIND,
    Evaluation,
    ModelRecord,
    OriginRecord,
    TaskRecord,
)
from frankenmerge.errors import fail
from frankenmerge.evaluation.item_files import read_item_results
from frankenmerge.evaluation.paired import ItemResults
from frankenmerge.evaluation.record import item_records, task_differences
from frankenmerge.storage.hashing import file_hash


def compare_item_results(
    paths: Sequence[Path], *, arguments: Mapping[str, Any] | None = None
) -> Evaluation:
    """Compare the first results with each of the others, item by item.

    Args:
        paths: a JSONL file of one task, or a folder with lm-evaluation-harness's samples, for each
            model.
        arguments: of the command, for the record.

    Raises:
        FrankenmergeError: for less than two models, results that cannot be read, and pairs without
            a task in common or with results on different items.
    """
    results = _named({str(path): read_item_results(path) for path in paths})
    if len(results) < 2:
        expected = "results of at least two models"
        raise fail("evaluate", expected, ", ".join(results), "name the results to compare with")
    first, *others = results
    for other in others:
        _check_common(first, other, results)
    return Evaluation(
        kind=KIND,
        models=[ModelRecord(name=name, role="results") for name in results],
        tasks=[
            TaskRecord(
                model=name,
                task=each.task,
                metric=each.metric,
                value=each.accuracy,
                stderr=each.stderr,
            )
            for name, entries in results.items()
            for each in entries
        ],
        item_results=item_records(results),
        task_differences=task_differences([(first, other) for other in others], results),
        provenance=OriginRecord(
            arguments=dict(arguments or {}),
            versions={
                "frankenmerge": frankenmerge.__version__,
                "python": platform.python_version(),
            },
            items={str(file): file_hash(file) for path in paths for file in _files(path)},
        ),
    )


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("samples_*.jsonl")) if path.is_dir() else [path]


def _named(results: Mapping[str, Sequence[ItemResults]]) -> dict[str, list[ItemResults]]:
    """Results whose file does not name its task belong to the one task that the others name."""
    tasks = {each.task for entries in results.values() for each in entries if each.task}
    task = tasks.pop() if len(tasks) == 1 else "items"
    return {
        name: [each._replace(task=each.task or task) for each in entries]
        for name, entries in results.items()
    }


def _check_common(one: str, other: str, results: Mapping[str, Sequence[ItemResults]]) -> None:
    """Raise FrankenmergeError for a pair without a task and metric in common."""
    keys = {name: {(each.task, each.metric) for each in results[name]} for name in (one, other)}
    if not keys[one] & keys[other]:
        shown = (", ".join(sorted(map(" ".join, keys[name]))) for name in (one, other))
        found = " against ".join(shown)
        remedy = "give results of the same task and metric"
        raise fail(f"{one} and {other}", "a task and metric that both have", found, remedy)
