"""`NAME.features.json`: features with the inputs that a search found, and examples from texts."""

from pathlib import Path
from typing import Any, Literal

from frankenmerge.artefacts.json_files import Record, is_kind, parse_json, save_json

KIND = "frankenmerge.features/1"
SUFFIX = ".features.json"
_EXPECTED = "features written by `frankenmerge features -o`"


class FrontRecord(Record):
    """An input that no other surpasses in both activation and fluency."""

    tokens: list[int]
    texts: list[str]
    activation: float
    cross_entropy: float
    """Nats per token of the input, by the model itself."""


class ExampleRecord(Record):
    """A place in a text with a high activation."""

    tokens: list[int]
    texts: list[str]
    place: int
    """Which token it is."""
    activation: float
    text: str
    """The name of the text."""


class FeatureRecord(Record):
    """A feature and its inputs."""

    block: int
    feature: str
    """In the source document's notation."""
    neuron: int | None
    tokens: list[int]
    texts: list[str]
    activation: float | None = None
    """At the last token of the input, or for the best token of a complete search."""
    front: list[FrontRecord] | None = None
    """The highest activation first."""
    examples: list[ExampleRecord] | None = None
    """The highest activation first."""

    @property
    def name(self) -> str:
        """For headings."""
        which = self.feature if self.neuron is None else f"neuron {self.neuron}"
        return f"block {self.block}, {which}"


class FeaturesFile(Record):
    """The whole file."""

    kind: Literal["frankenmerge.features/1"]
    donor: str
    fingerprint: str
    method: str
    untrained: int | None
    """The seed of random weights; None for the donor's own."""
    context: Literal["plain", "bos"]
    features: list[FeatureRecord]
    versions: dict[str, str]


def save(found: FeaturesFile, path: Path) -> None:
    """Write the file, completely or not at all. Raises FrankenmergeError on failure."""
    save_json(found, path, indent=1)


def parse(content: Any, place: str) -> FeaturesFile:
    """Check parsed JSON. Raises FrankenmergeError, which names `place`, for anything else."""
    return parse_json(content, place, FeaturesFile, KIND, _EXPECTED)


def is_features(content: Any) -> bool:
    """Whether parsed JSON is meant to be such a file, of this version or another."""
    return is_kind(content, KIND)
