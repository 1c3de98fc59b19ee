"""The result's tokenizer: a donor's files, with added tokens and the recipe's chat template."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.shards import TEMPLATES_FOLDER
from frankenmerge.donors.tokens import Tokens, read_settings
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.splicing.vocabulary import Vocabulary

TEMPLATES = {
    path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}
"""The built-in chat templates by name."""
TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|END_OF_TURN_TOKEN|>",
    "[|endofturn|]",
)
"""Tokens that end a turn in the chat templates of common families."""
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
            for files that cannot be read.
    """
    donor = donors[recipe.tokenizer_donor]
    files = tokenizer_content(donor)
    settings = dict(donor.tokenizer_settings)
    if vocabulary and vocabulary.tokens != donor.tokens:
        # The other files describe the donor's own tokens alone.
        kept = {SETTINGS_FILE, "special_tokens_map.json", TEMPLATE_FILE, "chat_template.json"}
        kept |= {name for name in files if name.startswith(TEMPLATES_FOLDER)}
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
        # It replaces all of the donor's templates.
        others = [name for name in files if name.startswith(TEMPLATES_FOLDER)]
        for name in ("chat_template.json", *others):
            files.pop(name, None)
        files[TEMPLATE_FILE] = chat_template(recipe, donors).encode()
        if settings.pop("chat_template", None):
            files[SETTINGS_FILE] = _json(settings)
    return files


def tokenizer_content(donor: Checkpoint) -> dict[str, bytes]:
    """The content of a donor's tokenizer files, by their names within its folder.

    Raises:
        FrankenmergeError: for files that are not what their names say, such as pointers that git
            has in place of a large file.
    """
    contents: dict[str, bytes] = {}
    faults: list[Fault] = []
    for path in donor.tokenizer_files:
        content = path.read_bytes()
        contents[path.relative_to(donor.path).as_posix()] = content
        try:
            _check_content(donor, path, content)
        except FrankenmergeError as error:
            faults += error.faults
    raise_all(faults)
    return contents


_POINTER = b"version https://git-lfs.github.com/spec/"


def _check_content(donor: Checkpoint, path: Path, content: bytes) -> None:
    expected = f"the content of {path.name}"
    if content.startswith(_POINTER):
        found, remedy = "a pointer of git-lfs to it", "fetch the file: git lfs pull"
        raise fail(str(path), expected, found, remedy)
    if not content.strip():
        raise fail(str(path), expected, "an empty file", "restore the file")
    if path.suffix == ".model":
        return
    expected += ", a JSON object" if path.suffix == ".json" else ", a text in UTF-8"
    try:
        text = content.decode()
        if path.suffix == ".json":
            data = donor.tokenizer_json if path.name == "tokenizer.json" else json.loads(text)
            if not isinstance(data, dict):
                raise fail(str(path), expected, type(data).__name__, "restore the file")
    except (ValueError, RecursionError) as error:
        raise fail(str(path), expected, str(error), "restore the file") from error


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
    words = [token for token in tokens.keys() - data["model"]["vocab"].keys() if token not in added]
    listed: list[dict[str, Any]] = data.get("added_tokens") or []
    known = {entry["content"] for entry in listed}
    new: list[dict[str, Any]] = [
        {**added[token], "id": index}
        for token, index in tokens.items()
        if token in added and token not in known
    ]
    if words and data["model"].get("ignore_merges"):
        found = f"ignore_merges, with which {len(words):,} more, such as {min(words)!r}, would"
        expected = (
            "a vocabulary to which tokens can be added that change nothing in how text is cut"
        )
        remedy = "set tokenizer_source to base, or base_model to a donor without ignore_merges"
        raise fail(str(path), expected, found, remedy)
    # Ids of added tokens are only kept for those that the vocabulary holds too.
    data["model"] = {**data["model"], "vocab": tokens}
    data["added_tokens"] = sorted([*listed, *new], key=lambda entry: entry["id"])
    return data


class TurnEnds(NamedTuple):
    """The tokens that end a turn in a chat template."""

    ids: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()
    """On those that the tokenizer does not have."""


def turn_ends(files: Mapping[str, bytes], tokens: Tokens) -> TurnEnds:
    """Find the tokens that end a turn in the chat template among a tokenizer's files.

    Args:
        files: their contents by name.
        tokens: the tokenizer's; empty where they are not known.
    """
    template = files[TEMPLATE_FILE].decode()
    ends = [token for token in TURN_ENDS if token in template]
    missing = [token for token in ends if tokens and token not in tokens]
    remarks = (
        f"the chat template ends a turn with {token}, which is no token of the result: "
        "generation does not stop there"
        for token in missing
    )
    return TurnEnds(tuple(tokens[token] for token in ends if token in tokens), tuple(remarks))


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
