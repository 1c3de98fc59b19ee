"""Special token ids of a result: in config.json and generation_config.json, from one donor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import fail
from frankenmerge.storage.safetensors_header import read_json

GENERATION_FILE = "generation_config.json"
_LISTS = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "force_words_ids",
        "forced_decoder_ids",
        "sequence_bias",
        "suppress_tokens",
    }
)
"""Keys of generation_config.json whose values are made of token ids, besides `*_token_id`."""


def is_special(key: str) -> bool:
    """Whether a key's value is a token id, or several."""
    return key.endswith("_token_id") or key in _LISTS


def special_ids(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config that are token ids."""
    return {key: value for key, value in settings.items() if is_special(key)}


def with_special_ids(settings: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the token ids of `source` in place of their own."""
    others = {key: value for key, value in settings.items() if not is_special(key)}
    return others | special_ids(source)


def within(
    settings: Mapping[str, Any], rows: int, file: str, donor: str
) -> tuple[dict[str, Any], list[str]]:
    """`settings` without token ids that have no row in the embedding, and remarks on these.

    Args:
        settings: the content of config.json or generation_config.json.
        rows: of the result's embedding.
        file: the file's name, for remarks.
        donor: the donor of the ids, for remarks.
    """
    kept, remarks = dict(settings), []
    for key, value in special_ids(settings).items():
        if key in _LISTS:
            continue
        listed = value if isinstance(value, list) else [value]
        beyond = [index for index in listed if type(index) is int and index >= rows]
        if not beyond:
            continue
        left = [index for index in listed if index not in beyond]
        # Null, and not absent: a family's default may be an id beyond the rows, too.
        kept[key] = left if isinstance(value, list) and left else None
        ids = ", ".join(map(str, beyond))
        remarks.append(
            f"{key} {ids} of {donor} is dropped from {file}: the embedding has {rows:,} rows"
        )
    return kept, remarks


def generation_settings(donor: Checkpoint) -> dict[str, Any] | None:
    """The content of a donor's generation_config.json; None without one.

    Raises:
        FrankenmergeError: for one that is not a JSON object.
    """
    if donor.generation_config is None:
        return None
    path: Path = donor.path / GENERATION_FILE
    settings = read_json(path, "settings of generation")
    if not isinstance(settings, dict):
        expected, found = "settings of generation, a JSON object", type(settings).__name__
        raise fail(str(path), expected, found, "restore or remove the file")
    return settings


def generation_config(
    base: Checkpoint, tokenizer: Checkpoint, rows: int
) -> tuple[bytes | None, list[str]]:
    """The bytes of the result's generation_config.json, and remarks.

    It is the base's, with the token ids of the tokenizer's donor. They come from that donor's
    config.json where it has no generation_config.json, as in transformers.

    Raises:
        FrankenmergeError: for a file that is not a JSON object.
    """
    settings = generation_settings(base)
    changed = dict(settings or {})
    if tokenizer is not base:
        own = generation_settings(tokenizer)
        if settings is not None or own is not None:
            changed = with_special_ids(changed, tokenizer.config if own is None else own)
    changed, remarks = within(changed, rows, GENERATION_FILE, tokenizer.name)
    if changed == (settings or {}):
        return base.generation_config, remarks
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode(), remarks
