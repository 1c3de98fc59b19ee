"""Find out which blocks of which language models fit together, then splice them."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Find the functions of `frankenmerge.api` here, so that importing the package alone stays instant."""
    if name.startswith("_"):  # what the import system asks for
        raise AttributeError(name)
    api = import_module("frankenmerge.api")
    if name not in api.__all__:
        raise AttributeError(f"module 'frankenmerge' has no attribute {name!r}; it has {', '.join(api.__all__)}")
    return getattr(api, name)


def __dir__() -> list[str]:
    """What can be asked for, for completion in a notebook."""
    return sorted([*globals(), *import_module("frankenmerge.api").__all__])
