"""Results by item that another tool wrote: read, and compared pair by pair."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from frankenmerge.errors import Fault, fail, raise_all
from frankenmerge.evaluation.paired import ItemResults

SUFFIX = ".jsonl"
_HARNESS = re.compile(r"samples_(?P<task>.+)_\d{4}-\d\d-\d\dT[\d.-]+")
"""A file of samples that lm-evaluation-harness wrote, without its suffix."""
_METRICS = ("acc", "acc_norm", "acc_bytes", "exact_match")
"""Metrics of samples that do not name theirs, as those of old versions."""
_EXPECTED = (
    "samples of lm-evaluation-harness (doc_id, and acc, acc_norm or exact_match), or "
    '{"id": ..., "correct": true or false}, on each line'
)
PLAIN = "correct"
"""The metric of a plain file of ids."""


def has_item_results(path: Path) -> bool:
    """Whether a path is a JSONL file, or a folder of samples that is no checkpoint."""
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob(f"samples_*{SUFFIX}"))
    return path.suffix == SUFFIX


def read_item_results(path: Path) -> list[ItemResults]:
    """Read the results of a model, from one file or from all samples of a folder.

    The task of a file is the one in its name, if the harness wrote it, and else empty.

    Raises:
        FrankenmergeError: for a file that cannot be read, several files of one task, results that
            are neither right nor wrong, and every line that is no result.
    """
    if not path.is_dir():
        return _read(path)
    files = sorted(path.glob(f"samples_*{SUFFIX}"))
    tasks: dict[str, Path] = {}
    for file in files:
        if (task := _task(file)) in tasks:
            found = f"{tasks[task].name} and {file.name}"
            raise fail(str(path), "one file of samples for each task", found, "remove one of them")
        tasks[task] = file
    return [results for file in files for results in _read(file)]


def _task(file: Path) -> str:
    match = _HARNESS.fullmatch(file.stem)
    return match["task"] if match else ""


def _read(path: Path) -> list[ItemResults]:
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise fail(str(path), "a JSONL file of results", str(error), "check the path") from error
    samples, faults, seen = [], [], set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        sample, found = _sample(line)
        key = sample.get("doc_id"), sample.get("filter")
        if not found and key in seen:
            found = f"the id {key[0]} a second time"
        seen.add(key)
        samples.append(sample)
        if found:
            faults.append(Fault(f"{path}:{number}", _EXPECTED, found, "correct this line"))
    raise_all(faults)
    results = results_of_samples(_task(path), samples)
    if not results:
        found = "no metric that is 0 or 1 for every item" if samples else "an empty file"
        raise fail(str(path), _EXPECTED, found, "give another file")
    return results


def _sample(line: str) -> tuple[dict[str, Any], str]:
    """A line as a sample of the harness, and what is wrong with it."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"no JSON: {error}"
    if not isinstance(content, dict):
        return {}, f"a JSON {type(content).__name__}"
    name = "doc_id" if "doc_id" in content else "id"
    if not isinstance(content.get(name), str | int):
        return {}, f"{name}: {json.dumps(content[name])[:100]}" if name in content else "no id"
    if name == "doc_id":
        metrics = content.get("metrics", [])
        texts = [content.get("filter", ""), content.get("doc_hash", "")]
        if not isinstance(metrics, list) or any(type(each) is not str for each in metrics + texts):
            return {}, "a filter, doc_hash or list of metrics that is none"
        return content, ""
    if not _is_binary(content.get(PLAIN)):
        return (
            {},
            f"{PLAIN}: {json.dumps(content[PLAIN])[:100]}" if PLAIN in content else "no correct",
        )
    return {"doc_id": content["id"], "metrics": [PLAIN], PLAIN: content[PLAIN]}, ""


def _is_binary(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.generic) and value in (0, 1)


def results_of_samples(task: str, samples: Iterable[Mapping[str, Any]]) -> list[ItemResults]:
    """The results in samples of lm-evaluation-harness: of every metric that is always 0 or 1."""
    columns: dict[str, dict[str, Any]] = {}
    hashes: dict[str, str] = {}
    for sample in samples:
        item, kind = str(sample["doc_id"]), sample.get("filter", "none")
        if "doc_hash" in sample:
            hashes[item] = sample["doc_hash"]
        for metric in sample.get("metrics") or [name for name in _METRICS if name in sample]:
            name = metric if kind == "none" else f"{metric},{kind}"
            columns.setdefault(name, {})[item] = sample.get(metric)
    return [
        ItemResults(task, name, {item: bool(value) for item, value in column.items()}, hashes)
        for name, column in columns.items()
        if all(map(_is_binary, column.values()))
    ]
