"""Find what a run left in its folder: artefacts are known by what they hold, not by their names."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from frankenmerge.artefacts.alignment import Alignment, load_alignment
from frankenmerge.artefacts.atlas import load_atlas
from frankenmerge.artefacts.recipe import Recipe, parse_recipes
from frankenmerge.artefacts.records import Evaluation, Evidence, Merged
from frankenmerge.errors import FrankenmergeError, fail
from frankenmerge.reporting.features import Features, features_of
from frankenmerge.storage.arrays import kind_of

LARGEST = 200_000_000
"""Bytes of JSON or YAML; what is larger is none of ours."""


@dataclass
class Run:
    """What was found, by the file's path within the folder."""

    folder: Path
    recipes: dict[str, Recipe] = field(default_factory=dict)
    """Those of merged checkpoints stand first."""
    texts: dict[str, str] = field(default_factory=dict)
    """The recipes as they are written."""
    evidence: dict[str, Evidence] = field(default_factory=dict)
    alignments: dict[str, Alignment] = field(default_factory=dict)
    features: list[Features] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    merges: dict[str, Merged] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    """Blocks of donors by name, where an artefact tells."""
    refused: dict[str, str] = field(default_factory=dict)
    """What looks like an artefact and cannot be read, and why."""


def read_run(folder: Path) -> Run:
    """Read everything in `folder` that commands wrote: its own files and those of checkpoints directly in it.

    Raises FrankenmergeError for something that is no folder, or holds nothing that can be shown.
    """
    if not folder.is_dir():
        raise fail(
            str(folder),
            "the folder that commands wrote to",
            "no folder",
            "give the folder, such as demo-run",
        )
    run = Run(folder)
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            _READERS[path.suffix](run, name, path)
        except (FrankenmergeError, ValidationError, OSError, ValueError, RecursionError) as error:
            run.refused[name] = _told(error)
    if not (run.recipes or run.evidence or run.alignments or run.features or run.evaluations):
        broken = "; ".join(f"{name}: {reason}" for name, reason in run.refused.items())
        expected = "atlases, alignments, recipes, evidence, merged checkpoints or evaluations"
        remedy = "run `frankenmerge demo --out DIR`, or write what `align`, `plan` and `evaluate` make into one folder"
        raise fail(str(folder), expected, broken or "none of them", remedy)
    return run


def _files(folder: Path) -> Iterator[Path]:
    """The files that may be artefacts, those of merged checkpoints first."""
    for origin in sorted(folder.glob("*/frankenmerge.json")):
        yield from (path for path in (origin.with_name("recipe.yaml"), origin) if path.is_file())
    yield from (
        path
        for path in sorted(folder.iterdir())
        if path.suffix in _READERS and path.is_file() and not path.name.startswith(".")
    )


def _told(error: Exception) -> str:
    if isinstance(error, FrankenmergeError):
        return "; ".join(
            f"expected {fault.expected}, found {fault.found}" for fault in error.faults
        )
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()[:3]
        )
    return f"{type(error).__name__}: {error}"


def _tensors(run: Run, name: str, path: Path) -> None:
    kind = kind_of(path)
    if kind and kind.startswith("frankenmerge.alignment/"):
        found = load_alignment(path)
        _check_shapes(found)
        run.alignments[name] = found
        run.depths |= dict(zip(found.donors, found.blocks, strict=True))
    elif kind and kind.startswith("frankenmerge.atlas/"):
        atlas = load_atlas(path)
        run.depths[atlas.donor] = atlas.blocks
        run.features.append(features_of(atlas))


def _check_shapes(alignment: Alignment) -> None:
    """Raise ValueError for parts that do not belong together: another program's alignment, or a damaged one."""
    rows, columns = (blocks + 1 for blocks in alignment.blocks)
    neurons = max(score.detail.shape[2] for score in alignment.scores.values())
    matrices = [
        matrix
        for score in alignment.scores.values()
        for matrix in (score.matrix, *score.nulls.values())
    ]
    tokens = zip(alignment.tokens, (rows, columns), strict=True)
    if any(matrix.shape != (rows, columns) for matrix in matrices) or any(
        table.shape[0] != length or table.shape[1] < neurons for table, length in tokens
    ):
        raise ValueError("scores and tokens of different shapes")


def _json(run: Run, name: str, path: Path) -> None:
    if path.stat().st_size > LARGEST:
        return
    told: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(told, dict):
        return
    if str(told.get("kind", "")).startswith("frankenmerge.evaluation/"):
        run.evaluations[name] = Evaluation.model_validate(told)
    elif "plans" in told and "constraints" in told:
        run.evidence[name] = Evidence.model_validate(told)
    elif path.name == "frankenmerge.json":
        run.merges[name] = Merged.model_validate(told)


def _yaml(run: Run, name: str, path: Path) -> None:
    text = path.read_text(encoding="utf-8") if path.stat().st_size <= LARGEST else ""
    if "merge_method" in text:
        stages = parse_recipes(text, name)
        for stage in stages:
            key = (
                name
                if len(stages) == 1
                else f"{name}, {f'stage {stage.name}' if stage.name else 'the result'}"
            )
            run.recipes[key], run.texts[key] = stage, text


_READERS = {".safetensors": _tensors, ".json": _json, ".yaml": _yaml, ".yml": _yaml}
