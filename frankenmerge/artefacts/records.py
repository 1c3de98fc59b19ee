"""What a report reads of the JSON that other stages wrote: planning's evidence, evaluation's results, a checkpoint's origin.

Keys that are not named here are left unread, so that a newer file can still be shown.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field


class _Read(BaseModel):
    """Something read from JSON."""


Interval = tuple[float, float]
Hash = Annotated[str, BeforeValidator(str)]


class Place(_Read):
    """A block of a donor, 0-based."""

    model: str
    block: int


class Neuron(_Read):
    """A neuron's agreement at a seam."""

    neuron: int
    scores: dict[str, float] = {}
    tokens: tuple[list[str], list[str]]
    """Each donor's most exciting tokens, the best first."""
    shared: list[str] = []


class SeamRecord(_Read):
    """Why a seam costs what it is predicted to."""

    after: Place
    before: Place
    cost: float
    skipped_blocks: int
    by_chance: bool
    scores: dict[str, float]
    nulls: dict[str, dict[str, float]]
    agree: list[Neuron]
    disagree: list[Neuron]


class PlanRecord(_Read):
    """A recipe and what is predicted of it."""

    recipe: dict[str, Any]
    summary: str
    depth: int
    predicted_damage: float
    interval: Interval
    measured_damage: float | None = None
    seams: list[SeamRecord]


class Evidence(_Read):
    """`recipe.evidence.json`, as `plan` writes it."""

    plans: Annotated[list[PlanRecord], Field(min_length=1)]
    constraints: dict[str, Any]
    model: dict[str, Any] = {}


class Loss(_Read):
    """How well a text is predicted."""

    bits_per_byte: float
    perplexity: float | None = None
    nats_per_token: float | None = None
    accuracy: float | None = None
    tokens: int | None = None
    bytes: int | None = None
    intervals: dict[str, Interval] = {}


class Sample(_Read):
    """A greedy continuation, and the words of it that are none."""

    prompt: str
    text: str
    invalid: list[str] = []


class ModelRecord(Loss):
    """One model's results, over all texts and for each."""

    name: str
    role: str
    texts: dict[str, Loss] = {}
    invalid_words: float | None = None
    repetition: float | None = None
    samples: list[Sample] | None = None


class TextDifference(_Read):
    """A paired difference on one text."""

    bits_per_byte: float
    interval: Interval | None = None


class Difference(TextDifference):
    """A paired difference between a model and a donor; below zero the model is the better one."""

    model: str
    donor: str
    texts: dict[str, TextDifference] = {}


class BlockRecord(_Read):
    """What enters the next block, held against the donors' streams."""

    block: int
    donor: str | None = None
    donor_block: int | None = None
    seam: bool = False
    norm_ratio: float | None = None
    cosine: dict[str, float | None] = {}
    kl: dict[str, float | None] = {}
    kl_alone: float | None = None
    """The same of the donor alone, behind its own block."""


class SeamsRecord(_Read):
    """A merged model, block by block."""

    model: str
    blocks: Annotated[list[BlockRecord], Field(min_length=1)]


class BlockKept(_Read):
    """The share of a donor's features that a block kept."""

    block: int
    kept: float


class RetentionRecord(_Read):
    """Which of a donor's features survive."""

    model: str
    donor: str
    chance: float | None = None
    blocks: list[BlockKept] = []
    kept: float | None = None


class TaskRecord(_Read):
    """A task's result."""

    model: str
    task: str
    metric: str
    value: float
    stderr: float | None = None


class PredictionCheck(_Read):
    """What was predicted of a recipe, and what was measured."""

    recipe: str
    predicted: float
    low: float
    high: float
    measured: float
    held: bool


class TextRecord(_Read):
    """A text that was predicted."""

    path: str
    sha256: str | None = None
    bytes: int | None = None


class Origin(_Read):
    """What produced the numbers."""

    arguments: Any = None
    seed: int | None = None
    versions: dict[str, Hash] = {}
    models: dict[str, dict[str, Hash | None]] = {}
    recipes: dict[str, Hash] = {}


class Evaluation(_Read):
    """`evaluation.json`, as `evaluate -o` writes it."""

    kind: Literal["frankenmerge.evaluation/1"]
    models: list[ModelRecord]
    differences: list[Difference] = []
    seams: list[SeamsRecord] = []
    retention: list[RetentionRecord] = []
    tasks: list[TaskRecord] = []
    predictions: list[PredictionCheck] = []
    dtype: str | None = None
    context: int | None = None
    texts: list[TextRecord] = []
    provenance: Origin = Origin()


class Merged(_Read):
    """`frankenmerge.json`, which `merge` leaves in a checkpoint."""

    frankenmerge: str
    versions: dict[str, str] = {}
    recipe_sha256: str
    donors: dict[str, dict[str, str]]
    shards: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
