"""What a run left in its folder: artefacts are identified by their content, not by their names."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from frankenmerge.artefacts import evaluation, evidence, features, gain, provenance, sweep
from frankenmerge.artefacts.alignment import Alignment, load_alignment
from frankenmerge.artefacts.atlas import load_atlas
from frankenmerge.artefacts.evaluation import Evaluation
from frankenmerge.artefacts.evidence import Evidence
from frankenmerge.artefacts.features import FeaturesFile
from frankenmerge.artefacts.gain import GainFile
from frankenmerge.artefacts.provenance import PROVENANCE, Provenance
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_file import parse_recipes
from frankenmerge.artefacts.sweep import Sweep
from frankenmerge.errors import FrankenmergeError, fail
from frankenmerge.reporting.features import Features, features_of
from frankenmerge.reporting.pictures import PictureTable, picture_tables
from frankenmerge.storage.arrays import kind_of

LARGEST = 200_000_000
"""Bytes of JSON or YAML; larger files are not artefacts."""


@dataclass
class Run:
    """The artefacts of a run, by path within its folder."""

    folder: Path
    recipes: dict[str, Recipe] = field(default_factory=dict)
    """Those of merged checkpoints come first."""
    texts: dict[str, str] = field(default_factory=dict)
    """The text of the recipes' files."""
    evidence: dict[str, Evidence] = field(default_factory=dict)
    gains: dict[str, GainFile] = field(default_factory=dict)
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    alignments: dict[str, Alignment] = field(default_factory=dict)
    features: list[Features] = field(default_factory=list)
    searched: dict[str, FeaturesFile] = field(default_factory=dict)
    pictures: list[PictureTable] = field(default_factory=list)
    """Feature maps of vision transformers."""
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    merges: dict[str, Provenance] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    """Blocks of donors by name, where an artefact says so."""
    refused: dict[str, str] = field(default_factory=dict)
    """Why a file that looks like an artefact cannot be read."""


def read_run(folder: Path) -> Run:
    """Read the artefacts in `folder`: its own files and those of checkpoints directly in it.

    Raises:
        FrankenmergeError: if it is not a folder, or has nothing that can be shown.
    """
    if not folder.is_dir():
        raise fail(
            str(folder),
            "the folder that commands wrote to",
            "not a folder",
            "give the folder, such as demo-run",
        )
    run = Run(folder)
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            _READERS[path.suffix](run, name, path)
        except (FrankenmergeError, ValidationError, OSError, ValueError, RecursionError) as error:
            run.refused[name] = _reason(error)
    found = (run.recipes, run.evidence, run.gains, run.sweeps, run.alignments, run.features)
    if not (any(found) or run.searched or run.pictures or run.evaluations):
        broken = "; ".join(f"{name}: {reason}" for name, reason in run.refused.items())
        raise fail(
            str(folder),
            "atlases, alignments, recipes, evidence, merged checkpoints or evaluations",
            broken or "none of these",
            "run `frankenmerge demo --out DIR`, or write the output of `align`, `plan` and "
            "`evaluate` to one folder",
        )
    return run


def _files(folder: Path) -> Iterator[Path]:
    """The files that may be artefacts, those of merged checkpoints first."""
    for path in sorted(folder.glob(f"*/{PROVENANCE}")):
        yield from (file for file in (path.with_name("recipe.yaml"), path) if file.is_file())
    yield from (
        path
        for path in sorted(folder.iterdir())
        if path.suffix in _READERS and path.is_file() and not path.name.startswith(".")
    )


def _reason(error: Exception) -> str:
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
        alignment = load_alignment(path)
        _check_shapes(alignment)
        run.alignments[name] = alignment
        run.depths |= dict(zip(alignment.donors, alignment.blocks, strict=True))
    elif kind and kind.startswith("frankenmerge.atlas/"):
        atlas = load_atlas(path)
        run.depths[atlas.donor] = atlas.blocks
        if atlas.of_images:
            run.pictures += picture_tables(atlas)
        else:
            run.features.append(features_of(atlas))


def _check_shapes(alignment: Alignment) -> None:
    """Raise ValueError for parts that do not fit each other: the file is damaged or not ours."""
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
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    if evaluation.is_evaluation(content):
        run.evaluations[name] = evaluation.parse(content, name)
    elif evidence.is_evidence(content):
        run.evidence[name] = evidence.parse(content, name)
    elif features.is_features(content):
        run.searched[name] = features.parse(content, name)
    elif gain.is_gain(content):
        run.gains[name] = gain.parse(content, name)
    elif sweep.is_sweep(content):
        run.sweeps[name] = sweep.parse(content, name)
    elif path.name == PROVENANCE and isinstance(content, dict):
        run.merges[name] = provenance.parse(content, name)


def _yaml(run: Run, name: str, path: Path) -> None:
    text = path.read_text(encoding="utf-8") if path.stat().st_size <= LARGEST else ""
    if "merge_method" in text:
        stages = parse_recipes(text, name)
        for stage in stages:
            shown = f"stage {stage.name}" if stage.name else "the result"
            key = name if len(stages) == 1 else f"{name}, {shown}"
            run.recipes[key], run.texts[key] = stage, text


_READERS = {".safetensors": _tensors, ".json": _json, ".yaml": _yaml, ".yml": _yaml}
