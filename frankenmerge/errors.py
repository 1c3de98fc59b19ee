"""A user's mistake, told in four parts and never as a traceback."""

from collections.abc import Iterable
from typing import NamedTuple


def visible(text: str) -> str:
    """`text` with what a terminal would obey, or not show, written out: names in a donor's files may hold anything."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


class Fault(NamedTuple):
    """One thing that is wrong with what the user gave."""

    place: str
    """Where: a file, a key of a recipe, a tensor."""
    expected: str
    found: str
    remedy: str
    """What the user can do about it."""

    def __str__(self) -> str:
        place, expected, found, remedy = map(visible, self)
        return f"{place}\n  expected: {expected}\n  found:    {found}\n  remedy:   {remedy}"


class FrankenmergeError(Exception):
    """Raised for input that cannot be used; carries every fault that was found."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


def fail(place: str, expected: str, found: str, remedy: str) -> FrankenmergeError:
    """Return the error for a single fault, ready to be raised."""
    return FrankenmergeError(Fault(place, expected, found, remedy))


def raise_all(faults: Iterable[Fault]) -> None:
    """Raise one error that holds all of `faults`, if there are any."""
    if faults := tuple(faults):
        raise FrankenmergeError(*faults)
