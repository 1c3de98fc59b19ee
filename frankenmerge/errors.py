"""Errors for users: each fault has four parts, and no traceback is shown."""

from collections.abc import Iterable
from typing import NamedTuple


def visible(text: str) -> str:
    """Escape characters that a terminal would interpret or not show.

    Names in a donor's files may contain any character.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


class Fault(NamedTuple):
    """One fault of the input."""

    place: str
    """A file, a key of a recipe, or a tensor."""
    expected: str
    found: str
    remedy: str
    """What the user can do to fix it."""

    def __str__(self) -> str:
        place, expected, found, remedy = map(visible, self)
        return f"{place}\n  expected: {expected}\n  found:    {found}\n  remedy:   {remedy}"


class FrankenmergeError(Exception):
    """Raised for invalid input; contains every fault that was found."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


def fail(place: str, expected: str, found: str, remedy: str) -> FrankenmergeError:
    """Return the error for a single fault; the caller raises it."""
    return FrankenmergeError(Fault(place, expected, found, remedy))


def raise_all(faults: Iterable[Fault]) -> None:
    """Raise one error with all of `faults`, if there are any."""
    if faults := tuple(faults):
        raise FrankenmergeError(*faults)
