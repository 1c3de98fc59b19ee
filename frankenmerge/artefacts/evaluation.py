"""What `evaluate -o` writes: losses, differences, seams, features, tasks, items and predictions."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from frankenmerge.artefacts.bootstrap import COVERAGE
from frankenmerge.artefacts.json_files import Record, is_kind, load_json, parse_json, save_json
from frankenmerge.errors import FrankenmergeError

KIND = "frankenmerge.evaluation/1"
_EXPECTED = "an evaluation written by `frankenmerge evaluate -o`"

Interval = tuple[float, float]
"""95 % interval of the bootstrap."""
Hash = Annotated[str, BeforeValidator(str)]


class LossRecord(Record):
    """How well a text is predicted."""

    bits_per_byte: float | None = None
    """Missing if nothing was measured on text."""
    perplexity: float | None = None
    nats_per_token: float | None = None
    accuracy: float | None = None
    """The share of tokens that were the most probable ones."""
    tokens: int | None = None
    bytes: int | None = None
    intervals: dict[str, Interval] = {}
    """By figure."""


class DomainRecord(Record):
    """The documents of a text, together."""

    name: str
    documents: int
    tokens: int
    bits_per_byte: float
    nats_per_token: float


class SampleRecord(Record):
    """A greedy continuation of a prompt."""

    prompt: str
    text: str
    invalid: list[str] = []
    """Words that the reference vocabulary lacks."""


class _ModelName(Record):
    """The first fields of `ModelRecord`: they come before those of `LossRecord`."""

    name: str
    role: str
    """`model`, `recipe` or `donor`; `results` if another tool's results were read."""
    key: str | None = None
    """The key of the recipe with its donors; files of version 0.1 have none."""


class ModelRecord(LossRecord, _ModelName):
    """The results of one model, on all texts together and on each."""

    texts: dict[str, LossRecord] = {}
    domains: list[DomainRecord] = []
    """Each a text."""
    invalid_words: float | None = None
    """The share of words in the samples that the reference vocabulary lacks."""
    repetition: float | None = None
    samples: list[SampleRecord] | None = None


class TextDifferenceRecord(Record):
    """A paired difference on one text, in bits per byte; negative where the model is better."""

    bits_per_byte: float
    interval: Interval | None = None


class _DifferencePair(Record):
    """The first fields of `DifferenceRecord`."""

    model: str
    donor: str


class DifferenceRecord(TextDifferenceRecord, _DifferencePair):
    """A paired difference between a model and a donor, on all texts together and on each."""

    texts: dict[str, TextDifferenceRecord] = {}


class BlockRecord(Record):
    """The hidden state after a block of a merged model, compared with the donors'."""

    block: int
    """1-based, as block outputs are."""
    donor: str | None = None
    donor_block: int | None = None
    """0-based, as in `layer_range`."""
    seam: bool = False
    """Whether a seam comes before this block."""
    norm_ratio: float | None = None
    cosine: dict[str, float | None] = {}
    """By donor."""
    kl: dict[str, float | None] = {}
    """By donor, in nats."""
    kl_alone: float | None = None
    """The same for the unmodified donor, after its own block."""


class SeamsRecord(Record):
    """A merged model, block by block."""

    model: str
    blocks: Annotated[list[BlockRecord], Field(min_length=1)]


class KeptBlockRecord(Record):
    """The share of a donor's features that a block preserves."""

    block: int
    """1-based, of the merged model."""
    donor_block: int | None = None
    """0-based, of the donor."""
    kept: float


class RetentionRecord(Record):
    """How many of a donor's features a merged model preserves."""

    model: str
    donor: str
    blocks: list[KeptBlockRecord] = []
    kept: float | None = None
    chance: float | None = None


class TaskRecord(Record):
    """A figure of a task."""

    model: str
    task: str
    """As lm-evaluation-harness names it, or a file of items."""
    metric: str
    value: float
    stderr: float | None = None


class ItemResultsRecord(Record):
    """Which items of a task a model answers correctly, by one metric."""

    model: str
    task: str
    metric: str
    correct: str
    """A digit for each item: 1 if the answer is correct, else 0."""
    items: list[str] | None = None
    """The items' ids; those of missing ids are 0, 1, 2 ..."""


class TaskDifferenceRecord(Record):
    """A paired comparison of a model with a donor on the same items of a task."""

    model: str
    donor: str
    task: str
    metric: str
    items: int
    """How many."""
    accuracy: float
    """The model's."""
    donor_accuracy: float
    difference: float
    """The model's accuracy minus the donor's: above 0 the model is better."""
    interval: Interval
    """95 % score interval of the difference."""
    only_model: int
    """Items that the model alone answers correctly."""
    only_donor: int
    p: float
    """Of the exact McNemar test, two-sided."""
    p_holm: float
    """The same after Holm's correction over all tests of this model and donor."""


class PredictionCheck(Record):
    """The predicted damage of a recipe and the measured one, in nats per token."""

    recipe: str
    predicted: float
    low: float
    high: float
    measured: float
    held: bool
    """Whether the measured damage is in the predicted interval."""


class GainCheck(Record):
    """The gain of a recipe where it was searched for, and the one measured on these texts.

    Both in nats per token against the best donor. The texts are others than those of the search,
    so that the gains may differ.
    """

    recipe: str
    predicted: float
    predicted_interval: Interval
    predicted_coverage: float = COVERAGE
    """Of that interval: 0.9 where it is for a text, from tokens that the donors generated."""
    on: list[str]
    """What the recipe was searched for on."""
    best_donor: str
    """On these texts."""
    measured: float
    measured_interval: Interval
    """95 %."""


class HealingCheck(Record):
    """What healing a model has changed, by its own record, and its loss on these texts.

    All in nats per token; the first two on tokens that nothing was chosen by.
    """

    model: str
    before: float
    after: float
    on: list[str]
    """Texts, or the donors whose sampled tokens they are."""
    measured: float


class VerdictRecord(Record):
    """A merge compared with its best donor."""

    model: str
    donor: str
    bits_per_byte: float
    interval: Interval
    verdict: str
    """`worse`, `undecided` or `not worse`."""


class ComparisonRecord(Record):
    """The result of `evaluate --compare`."""

    threshold: float
    """Bits per byte."""
    rule: str
    """How verdicts are reached, in words."""
    passed: bool
    models: list[VerdictRecord]


class TextRecord(Record):
    """A text on which the models were evaluated."""

    path: str
    sha256: str | None = None
    bytes: int | None = None
    documents: int | None = None


class OriginRecord(Record):
    """What produced the numbers."""

    arguments: Any = None
    seed: int | None = None
    reference_words: int | None = None
    """How many words the reference vocabulary has."""
    versions: dict[str, Hash] = {}
    models: dict[str, dict[str, Hash | None]] = {}
    """By name: fingerprint and revision."""
    recipes: dict[str, Hash] = {}
    """SHA-256 of recipe files by path."""
    items: dict[str, Hash] = {}
    """SHA-256 of files of items by path."""


class Evaluation(Record):
    """The whole file."""

    kind: Literal["frankenmerge.evaluation/1"]
    models: list[ModelRecord]
    differences: list[DifferenceRecord] = []
    seams: list[SeamsRecord] = []
    retention: list[RetentionRecord] = []
    tasks: list[TaskRecord] = []
    item_results: list[ItemResultsRecord] = []
    task_differences: list[TaskDifferenceRecord] = []
    predictions: list[PredictionCheck] = []
    gains: list[GainCheck] = []
    healings: list[HealingCheck] = []
    comparison: ComparisonRecord | None = None
    dtype: str | None = None
    context: int | None = None
    """Tokens of a window."""
    texts: list[TextRecord] = []
    provenance: OriginRecord = OriginRecord()


def save(evaluation: Evaluation, path: Path) -> None:
    """Write the file, completely or not at all. Raises FrankenmergeError on failure."""
    save_json(evaluation, path, indent=2)


def load(path: Path) -> Evaluation:
    """Read the file. Raises FrankenmergeError for anything else."""
    return load_json(path, Evaluation, KIND, _EXPECTED)


def beside(file: Path) -> list[Evaluation]:
    """The evaluations in the folder of a file, by name; what is no evaluation is passed over."""
    found = []
    for path in sorted(file.parent.glob("*.json")):
        try:
            found.append(load(path))
        except FrankenmergeError:
            continue
    return found


def parse(content: Any, place: str) -> Evaluation:
    """Check parsed JSON, as `load` does. Raises FrankenmergeError, which names `place`."""
    return parse_json(content, place, Evaluation, KIND, _EXPECTED)


def is_evaluation(content: Any) -> bool:
    """Whether parsed JSON is meant to be such a file, of this version or another."""
    return is_kind(content, KIND)
