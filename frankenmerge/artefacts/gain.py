"""`NAME.gain.json`: plans that were searched for by their gain, and what they are compared with."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from frankenmerge.artefacts.evaluation import TaskDifferenceRecord
from frankenmerge.artefacts.json_files import Record, is_kind, load_json, parse_json, save_json

KIND = "frankenmerge.gain/1"
SUFFIX = ".gain.json"
_EXPECTED = "gains written by `frankenmerge plan --objective gain`"

Interval = tuple[float, float]


class GainPlanRecord(Record):
    """A recipe and its gain."""

    recipe: dict[str, Any]
    summary: str
    key: str
    """Of the recipe with its donors."""
    kind: str
    """What is done with the donors: `average`, `exchange`, `stack` and so on."""
    gain: float
    """Nats per token won against the best donor; above 0 is better."""
    interval: Interval
    """95 %, for all recipes that were confirmed together."""
    text_interval: Interval | None = None
    """90 % interval of the gain on a text, for a gain on tokens that the donors generated."""
    captured_share: float | None = None
    """The share of the ensemble's gain; absent where the ensemble gains nothing."""
    domains: dict[str, float] = {}
    """On every domain, against the best donor there."""


class DonorControl(Record):
    """The best donor."""

    name: str
    nats: float


class GainControl(Record):
    """What another model does on the same tokens."""

    nats: float
    gain: float
    interval: Interval


class ControlsRecord(Record):
    """What gains are compared with."""

    best_donor: DonorControl
    average: GainControl | None = None
    """The uniform average of the donors; absent where they cannot be averaged."""
    ensemble: GainControl
    """The mean of the donors' probabilities: a ceiling, no single model."""


class GainFile(Record):
    """The whole file."""

    kind: Literal["frankenmerge.gain/1"]
    plans: Annotated[list[GainPlanRecord], Field(min_length=1)]
    """The best first, by the tokens that they were chosen on."""
    controls: ControlsRecord
    confirmed: bool
    """Whether the first plan's interval is above 0."""
    on: list[str]
    """Names of the domains: texts, or donors whose generated tokens they are."""
    tokens: int
    """How many tokens, or items of tasks, gains were measured on; none was used to choose."""
    tasks: list[TaskDifferenceRecord] = []
    """The first plan and the best donor on the items of each task."""
    candidates: int
    """How many recipes were compared."""
    refused: dict[str, int] = {}
    """Why other recipes could not be, with how many of each reason."""
    passes: int
    """What the search cost, in passes of the tokens that it chose by through a donor."""
    seed: int
    versions: dict[str, str]

    @property
    def unit(self) -> str:
        """What a gain is measured per."""
        return "item" if self.tasks else "token"

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        best, donor = self.plans[0], Path(self.controls.best_donor.name).name
        if not self.confirmed:
            return (
                f"No gain shown: the interval of the best candidate, {best.summary}, reaches "
                f"below 0. {donor} alone is the better choice."
            )
        share = best.captured_share
        captured = f", {share:.0%} of what the donors' ensemble wins" if share is not None else ""
        won = f"{best.gain:.3f} nats per {self.unit}{captured}"
        return f"{best.summary} is better than {donor} by {won}."


def gain_path(recipe: Path) -> Path:
    """The file of gains beside a recipe's file."""
    return recipe.with_suffix(SUFFIX)


def save(gains: GainFile, path: Path) -> None:
    """Write the file, completely or not at all. Raises FrankenmergeError on failure."""
    save_json(gains, path, indent=1)


def load(path: Path) -> GainFile:
    """Read the file. Raises FrankenmergeError for anything else."""
    return load_json(path, GainFile, KIND, _EXPECTED)


def parse(content: Any, place: str) -> GainFile:
    """Check parsed JSON, as `load` does. Raises FrankenmergeError, which names `place`."""
    return parse_json(content, place, GainFile, KIND, _EXPECTED)


def is_gain(content: Any) -> bool:
    """Whether parsed JSON is meant to be such a file, of this version or another."""
    return is_kind(content, KIND)
