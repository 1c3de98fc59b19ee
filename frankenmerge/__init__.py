"""Find out which blocks of which language models fit together, then splice them."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_OFFERED = (
    "align",
    "analyze",
    "check",
    "compare_donors",
    "evaluate",
    "heal",
    "load_alignment",
    "load_atlas",
    "load_recipe",
    "load_recipes",
    "merge",
    "open_donor",
    "plan",
    "plan_gains",
    "report",
    "routing",
    "save_alignment",
    "save_atlas",
    "transplant_recipe",
    "tune",
    "verify",
    "write_adapter",
    "write_plans",
)
"""Names of `frankenmerge.api`. Listed, so that no other name makes Python import it."""


def __getattr__(name: str) -> Any:
    """Import a function when it is first used: importing the package alone is instant."""
    if name in _OFFERED:
        return getattr(import_module("frankenmerge.api"), name)
    raise AttributeError(
        f"module 'frankenmerge' has no attribute {name!r}; it offers {', '.join(_OFFERED)}"
    )


def __dir__() -> list[str]:
    """What can be asked for, for completion in a notebook."""
    return sorted([*globals(), *_OFFERED])
