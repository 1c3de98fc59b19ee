"""Whether a merge is worse than its best donor: a paired difference, compared with a threshold."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from frankenmerge.artefacts.evaluation import ComparisonRecord, VerdictRecord
from frankenmerge.errors import fail
from frankenmerge.evaluation.bench import Result
from frankenmerge.evaluation.intervals import Interval, difference

RULE = (
    "worse: the whole 95 % interval of the paired difference from the best donor (or the one "
    "named), in bits per byte, lies above the threshold; not worse: none of it does; undecided:"
    " the threshold lies within. It fails when a merge is worse."
)


class Verdict(NamedTuple):
    """A merge compared with a donor."""

    model: str
    donor: str
    bits_per_byte: float
    """Those of the merge minus those of the donor."""
    interval: Interval
    verdict: str
    """`worse`, `undecided` or `not worse`, see `RULE`."""


class Comparison(NamedTuple):
    """All merges, each compared with a donor."""

    threshold: float
    """In bits per byte."""
    verdicts: list[Verdict]

    @property
    def passed(self) -> bool:
        """Whether no merge is worse."""
        return all(entry.verdict != "worse" for entry in self.verdicts)

    def record(self) -> ComparisonRecord:
        """The comparison as it is stored in the evaluation's file."""
        return ComparisonRecord(
            threshold=self.threshold,
            rule=RULE,
            passed=self.passed,
            models=[VerdictRecord(**entry._asdict()) for entry in self.verdicts],
        )

    def as_json(self) -> dict[str, Any]:
        """The comparison as JSON."""
        return self.record().as_json()


def merges(results: Sequence[Result], against: str | None = None) -> dict[str, list[str]]:
    """The merges among the results, each with the models that it is compared with.

    A merge is a model whose donors are known. It is compared with these, and with the one named in
    `against`. If no model has known donors, all are compared with the one that is named.
    """
    measured, named = [result.name for result in results], [against] if against else []
    known: dict[str, tuple[str, ...]] = {
        result.name: result.lineage.donors for result in results if result.lineage
    }
    if against and not known:
        known = {name: () for name in measured}
    return {
        name: [
            donor
            for donor in dict.fromkeys([*donors, *named])
            if donor in measured and donor != name
        ]
        for name, donors in known.items()
        if name != against
    }


def judge(
    results: Sequence[Result], threshold: float, seed: int, against: str | None = None
) -> Comparison:
    """Compare every merge with its best donor on all texts together, or with the one named.

    Raises:
        FrankenmergeError: if there is no merge among the results.
    """
    found = {result.name: result for result in results}
    verdicts = []
    for name, donors in merges(results, against).items():
        if donors:
            best = against or min(donors, key=lambda donor: found[donor].total.bits_per_byte)
            total, _ = difference(found[name].losses, found[best].losses, seed)
            verdicts.append(Verdict(name, best, *total, _verdict(total.interval, threshold)))
    if not verdicts:
        raise fail(
            "--compare",
            "a recipe, or a checkpoint whose donors are known",
            "none",
            "name its donor with --against",
        )
    return Comparison(threshold, verdicts)


def _verdict(interval: Interval, threshold: float) -> str:
    return (
        "worse"
        if interval.low > threshold
        else "not worse"
        if interval.high <= threshold
        else "undecided"
    )
