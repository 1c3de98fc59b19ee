"""Special token ids of a result: in config.json and generation_config.json, from one donor."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import fail
from frankenmerge.storage.safetensors_header import read_json

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
_NULLABLE = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})
"""Ids that every family's config.json may leave open; others (ModernBERT's `sep_token_id`) must be
numbers there, and no model reads them.
"""
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
        if key in _LISTS or (file == CONFIG_FILE and key not in _NULLABLE):
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


class Settings(NamedTuple):
    """The settings of a result that contain token ids."""

    config: dict[str, Any]
    """The content of config.json."""
    generation: bytes | None
    """The content of generation_config.json; None without one."""
    remarks: list[str]
    """On ids that were dropped."""


def with_token_ids(
    config: Mapping[str, Any],
    base: Checkpoint,
    tokenizer: Checkpoint,
    rows: int,
    turn_ends: Sequence[int] = (),
) -> Settings:
    """The result's settings with the special token ids of its tokenizer.

    They come from the tokenizer's donor: those of generation_config.json from its config.json where
    it has no such file, as in transformers. All other settings of generation are the base's.

    Args:
        config: the content of the result's config.json.
        base: the donor of the config.
        tokenizer: the donor of the tokenizer.
        rows: of the result's embedding.
        turn_ends: ids that end a turn in the recipe's chat template.

    Raises:
        FrankenmergeError: for a generation_config.json that is not a JSON object.
    """
    own = generation_settings(base)
    theirs = own if tokenizer is base else generation_settings(tokenizer)
    changed, generation = dict(config), dict(own or {})
    if tokenizer is not base:
        changed = with_special_ids(changed, tokenizer.config)
        if own is not None or theirs is not None:
            source = tokenizer.config if theirs is None else theirs
            generation = with_special_ids(generation, source)
    changed = _ending(changed, turn_ends)
    generation = _ending(generation, turn_ends) if generation else generation
    changed, remarks = within(changed, rows, CONFIG_FILE, tokenizer.name)
    generation, more = within(generation, rows, GENERATION_FILE, tokenizer.name)
    content = base.generation_config
    if generation != (own or {}):
        content = (json.dumps(generation, indent=2, ensure_ascii=False) + "\n").encode()
    return Settings(changed, content, [*remarks, *more])


def _ending(settings: Mapping[str, Any], turn_ends: Sequence[int]) -> dict[str, Any]:
    """The settings with further ids that end a generated text."""
    ends = settings.get("eos_token_id")
    known = list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
    if not (new := [index for index in turn_ends if index not in known]):
        return dict(settings)
    return {**settings, "eos_token_id": [*known, *new] if known or len(new) > 1 else new[0]}
