"""`NAME.evidence.json`: the plans that `plan` wrote as recipes, and the evidence for every seam."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from frankenmerge.artefacts.json_files import Record, load_json, parse_json, save_json

KIND = "frankenmerge.evidence/1"
"""The kind of these files; files of version 1 do not state it."""
SUFFIX = ".evidence.json"
_EXPECTED = "evidence written by `frankenmerge plan`"

Interval = tuple[float, float]


class SeamBlockRecord(Record):
    """A block at a seam."""

    model: str
    block: int
    """0-based, as in the recipe."""


class NeuronRecord(Record):
    """How well the donors agree on one neuron at a seam."""

    neuron: int
    scores: dict[str, float] = {}
    """By name; a score without this neuron is absent."""
    tokens: tuple[list[str], list[str]]
    """Each donor's top-activating tokens, the best first."""
    shared: list[str] = []
    """Tokens that both donors have."""


class SeamRecord(Record):
    """Why a seam is predicted to cost what it does."""

    after: SeamBlockRecord
    """The last block before the seam."""
    before: SeamBlockRecord
    """The first block after it."""
    cost: float
    """Predicted damage of a recipe with this seam alone, in nats per token."""
    skipped_blocks: int
    """Negative when blocks are repeated."""
    by_chance: bool
    """Whether the donors agree here no better than by chance."""
    gauged: bool = False
    """Whether the recipe rotates one of the donors here."""
    scores: dict[str, float]
    nulls: dict[str, dict[str, float]]
    """By score and null model."""
    agree: list[NeuronRecord]
    disagree: list[NeuronRecord]


class PlanRecord(Record):
    """A recipe and what is predicted of it."""

    recipe: dict[str, Any]
    summary: str
    key: str | None = None
    """The key of the recipe with its donors; files of version 0.1 have none."""
    depth: int
    """Blocks of the result."""
    predicted_damage: float
    """Nats per token above the donors' own loss, each weighted by its share of the blocks."""
    interval: Interval
    """90 % prediction interval."""
    basis: str = "scores"
    """What the prediction is based on."""
    measured_damage: float | None = None
    """Damage measured on a text, where the plan was verified on one."""
    seams: list[SeamRecord]


class ConstraintsRecord(Record):
    """The constraints that every plan meets; those that were not set are absent."""

    depth: int
    max_seams: int | None = None
    min_slice: int | None = None
    protect_first: int | None = None
    protect_last: int | None = None
    max_back: int | None = None
    required: list[tuple[str, int]] | None = None
    avoided: list[tuple[str, int]] | None = None
    shares: dict[str, Interval] | None = None


class PredictionModelRecord(Record):
    """The model that predicted the damage."""

    intercept: float
    weights: dict[str, float] = {}
    """By feature."""
    spread: Interval | None = None
    drawn_spread: Interval | None = None
    domain_share: float | None = None
    origin: dict[str, Any] = {}
    """Donors, texts, seeds, versions and hashes that the model was fitted with."""


class Evidence(Record):
    """The whole file."""

    plans: Annotated[list[PlanRecord], Field(min_length=1)]
    """The best first."""
    constraints: ConstraintsRecord
    model: PredictionModelRecord | None = None


def evidence_path(recipe: Path) -> Path:
    """The evidence file for a recipe's file."""
    return recipe.with_suffix(SUFFIX)


def save(evidence: Evidence, path: Path) -> None:
    """Write the file, completely or not at all. Raises FrankenmergeError on failure."""
    save_json(evidence, path, indent=1)


def load(path: Path) -> Evidence:
    """Read the file. Raises FrankenmergeError for anything else."""
    return load_json(path, Evidence, KIND, _EXPECTED)


def parse(content: Any, place: str) -> Evidence:
    """Check parsed JSON, as `load` does. Raises FrankenmergeError, which names `place`."""
    return parse_json(content, place, Evidence, KIND, _EXPECTED)


def is_evidence(content: Any) -> bool:
    """Whether parsed JSON is meant to be such a file, of this version or another."""
    if not isinstance(content, dict):
        return False
    kind = str(content.get("kind", ""))
    return kind.startswith("frankenmerge.evidence/") or (
        not kind and "plans" in content and "constraints" in content
    )
