"""Recipe files: YAML read safely, every fault of a file reported at once, paths resolved."""

import os
from collections.abc import Hashable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from frankenmerge.artefacts.mixture import Expert, Mixture, mixture_faults
from frankenmerge.artefacts.recipe import BESIDE_EXPERTS, Recipe, changed, is_mixture, renamed
from frankenmerge.artefacts.recipe_schema import (
    Gauge,
    Module,
    Row,
    Slice,
    Source,
    Token,
    Tokenizer,
    Whole,
    Zero,
)
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.storage.hub import is_folder


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key occurs once, and merge keys (`<<`) add at most `_LARGEST` keys."""

    merging = keys = 0
    """How deep in merge keys it is, and how many keys they brought so far."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} occurs twice", key_node.start_mark
                )
            seen |= (
                {key} if isinstance(key, Hashable) else set()
            )  # PyYAML refuses the others itself
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        self.merging += 1
        super().flatten_mapping(
            node
        )  # which calls this for what is merged, before it takes over the keys
        self.merging -= 1
        self.keys += len(node.value) if self.merging else 0
        if self.keys > _LARGEST:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {_LARGEST:,} keys by way of merge keys", node.start_mark
            )


_LARGEST = 1_000_000
"""Values of a recipe file, aliases written out."""


def _extent(value: Any, known: dict[int, int]) -> int:
    """The number of values, aliases expanded; above `_LARGEST` for one that holds itself."""
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = _LARGEST + 1  # until it is counted: met again, it holds itself
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_extent(part, known) for part in parts)
    return known[id(value)]


def parse_recipes(text: str, place: str) -> list[Recipe]:
    """Read the stages of a YAML text: one recipe, a list of them, or one in each document.

    Raises FrankenmergeError with every fault found in any of them.
    """
    try:
        documents = [document for document in yaml.load_all(text, _Loader) if document is not None]  # noqa: S506 - a SafeLoader
        if _extent(documents, {}) > _LARGEST:
            raise ValueError(
                f"more than {_LARGEST:,} values, or values that hold themselves, by way of aliases"
            )
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:  # PyYAML lets scalars' own errors out
        raise fail(place, "YAML", " ".join(str(error).split()), "correct the file") from error
    if (
        len(documents) == 1
        and isinstance(documents[0], list)
        and documents[0]
        and all(isinstance(part, Mapping) for part in documents[0])
    ):
        documents = documents[0]
    recipes, faults = [], []
    for number, document in enumerate(documents or [None], 1):
        try:
            recipes.append(
                _recipe(document, place if len(documents) <= 1 else f"{place}: stage {number}")
            )
        except FrankenmergeError as error:
            faults += error.faults
    raise_all(faults)
    return recipes


def parse_recipe(text: str, place: str) -> Recipe:
    """Read a single recipe from YAML. Raises FrankenmergeError with every fault found."""
    return _single(parse_recipes(text, place), place)


def _single(recipes: list[Recipe], place: str) -> Recipe:
    if len(recipes) > 1:
        raise fail(
            place,
            "a single recipe",
            f"{len(recipes)} stages",
            "merge them: only check and merge take stages",
        )
    return recipes[0]


def _recipe(data: Any, place: str) -> Recipe:
    if not isinstance(data, Mapping):
        raise fail(
            place,
            "a recipe: slices, models or modules, and merge_method",
            type(data).__name__,
            "see recipes/ for examples",
        )
    if is_mixture(data):
        return _mixture(data, place)
    faults = []
    for keys, remedy in (
        (("slices", "models", "modules"), "keep one"),
        (("tokenizer", "tokenizer_source"), "remove tokenizer_source"),
    ):
        given = [key for key in keys if data.get(key) is not None]
        if len(given) > 1 or (not given and "slices" in keys):
            faults.append(
                Fault(
                    place,
                    f"one of {', '.join(keys)}",
                    " and ".join(given) or "none of them",
                    remedy,
                )
            )
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        faults += [_fault(place, detail) for detail in error.errors()]
    raise_all(faults)
    return recipe  # pyright: ignore[reportPossiblyUnbound] - unless it raised


def _mixture(data: Mapping[str, Any], place: str) -> Recipe:
    """The recipe of a mixture of experts; its places are those in mergekit-moe's YAML."""
    faults = []
    if not data.get("base_model"):
        remedy = "name the donor of everything but the experts"
        faults.append(Fault(f"{place}: base_model", "a model", "nothing", remedy))
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        details = [detail for detail in error.errors() if detail["loc"][:1] != ("models",)]
        faults += [_fault(place, detail) for detail in details if detail["loc"] != ("base_model",)]
        raise FrankenmergeError(*faults) from error
    assert recipe.mixture
    raise_all([*faults, *mixture_faults(recipe.mixture, place)])
    return recipe


_HOLDERS = {
    "mixture": Mixture,
    "experts": Expert,
    "shared_experts": Expert,
    "slices": Slice,
    "gauge": Gauge,
    "sources": Source,
    "models": Whole,
    "modules": Module,
    "tokenizer": Tokenizer,
    "tokens": Token,
    "model_token": Row,
    "zero": Zero,
}


def _fault(place: str, detail: Any) -> Fault:
    loc = detail["loc"]
    shown = loc[1:] if loc[:1] == ("mixture",) else loc
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in shown).lstrip(
        "."
    )
    where = f"{place}: {where}" if where else place
    found = "nothing" if detail["type"] == "missing" else repr(detail["input"])[:200]
    if detail["type"] == "extra_forbidden":
        # A holder stands one step above the key where it is one, two above where it is one of a
        # list or mapping.
        known = list(
            next(
                (_HOLDERS[part] for part in loc[-2:-4:-1] if part in _HOLDERS), Recipe
            ).model_fields
        )
        known = [*BESIDE_EXPERTS, *known] if loc[:1] == ("mixture",) and len(loc) == 2 else known
        near = get_close_matches(str(loc[-1]), known, 1)
        if loc[-1] == "revision" and "model" in known:
            remedy = f"write it into the model's name: model@{detail['input']}"
            return Fault(where, f"one of: {', '.join(known)}", "an unknown key", remedy)
        return Fault(
            where,
            f"one of: {', '.join(known)}",
            "an unknown key",
            f"write {near[0]}" if near else "remove the key",
        )
    return Fault(where, detail["msg"].removeprefix("Value error, "), found, "correct the recipe")


def load_recipes(path: str | Path) -> list[Recipe]:
    """Read a recipe file's stages.

    Relative paths are looked up in the working directory first, then in the file's folder.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise fail(
            str(path), "a recipe file", str(error), "give the path of a YAML recipe"
        ) from error
    recipes = parse_recipes(text, str(path))
    stages = {recipe.name for recipe in recipes}

    def found(name: str) -> str:
        if name in stages:
            return name
        parts = (
            part.partition("@")
            for part in (
                [name] if is_folder(name) or is_folder(str(path.parent / name)) else name.split("+")
            )
        )
        return "+".join(
            _beside(path.parent, model) + at + revision for model, at, revision in parts
        )

    def beside(key: str, value: str) -> str:
        is_text = (
            key == "fit"
            and value != "probes"
            and not Path(value).is_file()
            and (path.parent / value).is_file()
        )
        return str(path.parent / value) if is_text else value

    return one_spelling([changed(renamed(recipe, found), beside) for recipe in recipes])


def one_spelling(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The same recipes, each folder under the first of its names: `a`, `./a`, `a/`, `/tmp/a`.

    Methods recognise their base model among the sources by its name.
    """
    stages = {recipe.name for recipe in recipes}
    spellings: dict[str, str] = {}

    def first(folder: str) -> str:
        if not is_folder(folder):
            return folder
        return spellings.setdefault(os.path.realpath(os.path.expanduser(folder)), folder)

    def spelled(name: str) -> str:
        if name in stages or is_folder(name):
            return name if name in stages else first(name)
        parts = (part.partition("@") for part in name.split("+"))
        return "+".join(first(model) + at + revision for model, at, revision in parts)

    return [renamed(recipe, spelled) for recipe in recipes]


def load_recipe(path: str | Path) -> Recipe:
    """Read a file of a single recipe, as `load_recipes` does."""
    return _single(load_recipes(path), str(path))


def _beside(folder: Path, name: str) -> str:
    return (
        str(folder / name)
        if name and not is_folder(name) and is_folder(str(folder / name))
        else name
    )
