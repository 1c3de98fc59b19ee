"""The result's tokenizer: a donor's files, with added tokens and the recipe's chat template."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.tokens import Tokens, read_settings
from frankenmerge.errors import fail
from frankenmerge.splicing.vocabulary import Vocabulary

TEMPLATES = {
    path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}
"""The built-in chat templates by name."""
TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"
_ADDED = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}


def tokenizer_files(
    recipe: Recipe, donors: Mapping[str, Checkpoint], vocabulary: Vocabulary | None
) -> dict[str, bytes]:
    """The files of the result's tokenizer by name.

    Raises:
        FrankenmergeError: for tokens that cannot be added, for a chat template that is none, and
            for settings that cannot be read.
    """
    donor = donors[recipe.tokenizer_donor]
    files = {path.name: path.read_bytes() for path in donor.tokenizer_files}
    settings = dict(donor.tokenizer_settings)
    if vocabulary and vocabulary.tokens != donor.tokens:
        # The other files describe the donor's own tokens alone.
        kept = (SETTINGS_FILE, "special_tokens_map.json", TEMPLATE_FILE, "chat_template.json")
        added = _added_tokens(recipe, donors)
        extended = _extended(donor, vocabulary.tokens, added)
        files = {name: content for name, content in files.items() if name in kept} | {
            "tokenizer.json": _json(extended)
        }
        if isinstance(known := settings.get("added_tokens_decoder"), dict):
            listed = {
                str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
                for entry in extended["added_tokens"]
            }
            settings["added_tokens_decoder"] = known | listed
            files[SETTINGS_FILE] = _json(settings)
    if recipe.chat_template:
        files.pop("chat_template.json", None)
        files[TEMPLATE_FILE] = chat_template(recipe, donors).encode()
        if settings.pop("chat_template", None):
            files[SETTINGS_FILE] = _json(settings)
    return files


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _added_tokens(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> dict[str, dict[str, Any]]:
    """How the recipe and donors (the first that has it) describe tokens added to a vocabulary."""
    described: dict[str, dict[str, Any]] = {
        token: {"content": token, **_ADDED}
        for token in (recipe.tokenizer and recipe.tokenizer.tokens) or {}
    }
    for name in reversed(recipe.donors):
        data = donors[name].tokenizer_json
        described |= {entry["content"]: entry for entry in data.get("added_tokens") or []}
    return described


def _extended(
    donor: Checkpoint, tokens: Tokens, added: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """A donor's tokenizer.json with all of `tokens`.

    A token of another donor's vocabulary gets its id and its text; text is still cut by this
    donor's merges, which make no use of it.
    """
    path = donor.path / "tokenizer.json"
    data = dict(donor.tokenizer_json)
    data["model"] = dict(data["model"])
    if data["model"].get("type", "BPE") != "BPE" or not isinstance(data["model"]["vocab"], dict):
        remedy = "set tokenizer_source to base, or to the donor whose tokenizer the result gets"
        raise fail(
            str(path), "a BPE vocabulary, to add tokens to", str(data["model"].get("type")), remedy
        )
    listed: list[dict[str, Any]] = data.get("added_tokens") or []
    known = {entry["content"] for entry in listed}
    new: list[dict[str, Any]] = [
        {**added[token], "id": index}
        for token, index in tokens.items()
        if token in added and token not in known
    ]
    # Ids of added tokens are only kept for those that the vocabulary holds too.
    data["model"] = {**data["model"], "vocab": tokens}
    data["added_tokens"] = sorted([*listed, *new], key=lambda entry: entry["id"])
    return data


def chat_template(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> str:
    """The chat template that a recipe names: built in, written out, or `auto`.

    `auto` is the one that most donors have, the first of equals.

    Raises:
        FrankenmergeError: for a name that is not built in, and for `auto` where no donor has a
            template.
    """
    asked = recipe.chat_template
    assert asked is not None
    if asked == "auto":
        found = [template for name in recipe.donors if (template := _template_of(donors[name]))]
        if not found:
            raise fail(
                "recipe: chat_template",
                "a donor with a chat template",
                "none",
                f"name one of: {', '.join(TEMPLATES)}",
            )
        return Counter(found).most_common(1)[0][0]
    if asked in TEMPLATES:
        return TEMPLATES[asked].read_text(encoding="utf-8")
    if "{" not in asked:
        raise fail(
            "recipe: chat_template",
            f"auto, jinja, or one of: {', '.join(TEMPLATES)}",
            repr(asked)[:200],
            "correct the name",
        )
    _check_jinja(asked)
    return asked


def _check_jinja(template: str) -> None:
    from jinja2 import Environment, TemplateSyntaxError

    # A tag of transformers' own, without effect on the text.
    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateSyntaxError as error:
        raise fail(
            "recipe: chat_template",
            "jinja",
            f"line {error.lineno}: {error.message}",
            "correct the template",
        ) from error


def _template_of(donor: Checkpoint) -> str | None:
    """A donor's chat template; of several the one called default."""
    if (path := donor.path / TEMPLATE_FILE).is_file():
        try:
            return path.read_text(encoding="utf-8").strip()
        except ValueError as error:
            raise fail(
                str(path), "a chat template, a text in UTF-8", str(error), "restore the file"
            ) from error
    for name in ("chat_template.json", SETTINGS_FILE):
        if (path := donor.path / name).is_file():
            settings = donor.tokenizer_settings if name == SETTINGS_FILE else read_settings(path)
            written = settings.get("chat_template")
            if isinstance(written, list):
                named = [
                    entry
                    for entry in written
                    if isinstance(entry, dict) and entry.get("name") == "default"
                ]
                written = named[0].get("template") if named else None
            if isinstance(written, str):
                return written.strip()
    return None
