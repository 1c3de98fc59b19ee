"""`NAME.sweep.json`: a donor with each window of its blocks run twice, measured."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from frankenmerge.artefacts.json_files import Record, is_kind, load_json, parse_json, save_json

KIND = "frankenmerge.sweep/1"
SUFFIX = ".sweep.json"
_EXPECTED = "a sweep written by `frankenmerge plan --sweep`"

Interval = tuple[float, float]


class WindowRecord(Record):
    """Blocks `[start, stop)` run twice, on the tokens that finalists were selected by."""

    start: int
    stop: int
    scale: float
    """Of what the second pass writes."""
    gain: float
    """Nats per token won against the donor itself; above 0 is better."""
    error: float
    """Standard error of the gain, over units of tokens."""


class ConfirmedRecord(Record):
    """A finalist on tokens that nothing was selected by."""

    start: int
    stop: int
    scale: float
    selected: float
    """Its gain on the tokens that it was selected by."""
    gain: float
    interval: Interval
    """95 %, for all finalists together."""


class Sweep(Record):
    """The whole file."""

    kind: Literal["frankenmerge.sweep/1"]
    donor: str
    fingerprint: str
    blocks: int
    nats: float
    """Of the donor itself, on the tokens that finalists were selected by."""
    scales: list[float]
    windows: Annotated[list[WindowRecord], Field(min_length=1)]
    confirmed: list[ConfirmedRecord]
    """The best first, by the tokens that they were selected by."""
    on: list[str]
    tokens: int
    """How many tokens finalists were confirmed on."""
    seed: int
    versions: dict[str, str]

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        gaining = any(each.interval[0] > 0 for each in self.confirmed)
        return (
            f"{'A gain is confirmed' if gaining else 'No gain shown'}: the best of "
            f"{len(self.windows)} windows and scales, on {self.tokens:,} tokens that they were "
            "not selected by."
        )


def sweep_path(recipe: Path) -> Path:
    """The file of a sweep beside a recipe's file."""
    return recipe.with_suffix(SUFFIX)


def save(sweep: Sweep, path: Path) -> None:
    """Write the file, completely or not at all. Raises FrankenmergeError on failure."""
    save_json(sweep, path, indent=1)


def load(path: Path) -> Sweep:
    """Read the file. Raises FrankenmergeError for anything else."""
    return load_json(path, Sweep, KIND, _EXPECTED)


def parse(content: Any, place: str) -> Sweep:
    """Check parsed JSON, as `load` does. Raises FrankenmergeError, which names `place`."""
    return parse_json(content, place, Sweep, KIND, _EXPECTED)


def is_sweep(content: Any) -> bool:
    """Whether parsed JSON is meant to be such a file, of this version or another."""
    return is_kind(content, KIND)
