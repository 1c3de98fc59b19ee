"""The tokens of a donor and their ids, as in its tokenizer.json; no torch, no transformers."""

from pathlib import Path
from typing import Any

from frankenmerge.errors import fail
from frankenmerge.storage.safetensors_header import read_json

Tokens = dict[str, int]
"""Ids by token."""
ID_LIMIT = 1 << 24
"""Ids are below this; matrices with more rows would not fit into memory."""


def tokens_of(tokenizer: Any, path: Path) -> Tokens:
    """The ids of all tokens of a parsed tokenizer.json, those added to the vocabulary included.

    Args:
        tokenizer: the content of the file.
        path: the file, for messages.

    Raises:
        FrankenmergeError: if it has no list or mapping of tokens, or if an id is not a whole number
            from 0 to `ID_LIMIT`.
    """
    try:
        listed = tokenizer["model"]["vocab"]
        tokens = (
            dict(listed)
            if isinstance(listed, dict)
            else {entry[0]: index for index, entry in enumerate(listed)}
        )
        tokens |= {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []}
        if all(
            isinstance(token, str) and type(index) is int and 0 <= index < ID_LIMIT
            for token, index in tokens.items()
        ):
            return tokens
    except (KeyError, TypeError, IndexError, AttributeError):
        pass
    raise fail(
        str(path),
        "tokens and their ids",
        "none that can be read",
        "save the tokenizer once with a current transformers",
    )


def read_settings(path: Path) -> dict[str, Any]:
    """Read a tokenizer_config.json or a chat_template.json.

    Raises:
        FrankenmergeError: if it is not a JSON object.
    """
    settings = read_json(path, "a tokenizer's settings")
    if not isinstance(settings, dict):
        raise fail(
            str(path),
            "a tokenizer's settings, a JSON object",
            type(settings).__name__,
            "restore the file",
        )
    return settings
