"""How long work reports its progress: one protocol for the command line, scripts and tests."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
"""Called with the number of units done since the last call."""
Progress = Callable[[str, float | None, str], AbstractContextManager[Advance]]
"""Opens a meter: what is being done, how many units in all (None if unknown), the unit's name."""


def ignore(_done: int) -> None:
    """Advance nothing."""


@contextmanager
def silent(_what: str, _total: float | None, _unit: str) -> Iterator[Advance]:
    """Show no progress."""
    yield ignore
