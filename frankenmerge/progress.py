"""How work that takes long shows its progress."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Meter = Callable[[str, float | None, str], AbstractContextManager[Callable[[int], None]]]
"""Shows progress in something: what it is, how many units it has, what they are called. Gives what
to call with the units done.
"""


@contextmanager
def unseen(_what: str, _total: float | None, _unit: str) -> Iterator[Callable[[int], None]]:
    """Show no progress."""
    yield lambda _done: None
