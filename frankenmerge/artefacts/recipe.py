"""The recipe: which tensors of which donors make the result, and how. YAML in mergekit's terms.

docs/recipes.md tells what every key means. Those that mergekit does not know are `embedding`,
`final_norm`, `head`, `seed` and `gauge`.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import Field, StrictInt, ValidationError

from frankenmerge.artefacts.recipe_schema import (
    Dtype,
    Gauge,
    Model,
    Module,
    Parameters,
    Part,
    Row,
    Slice,
    Source,
    Token,
    Tokenizer,
    Whole,
    Zero,
    reference,
)
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.models.lora import find_adapter, folded
from frankenmerge.storage.hub import is_folder


class Block(NamedTuple):
    """One block of one donor."""

    model: str
    index: int
    """0-based, as in `layer_range`."""


class Seam(NamedTuple):
    """The place where two slices meet."""

    after: Block
    """The last block before the seam."""
    before: Block
    """The first block behind it."""


class Recipe(Part):
    """A whole result: exactly one of `slices`, `models` and `modules` tells what it is merged from."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None = None
    """What other stages of the same file call it."""
    slices: Annotated[list[Slice], Field(min_length=1)] | None = None
    models: Annotated[list[Whole], Field(min_length=1)] | None = None
    modules: Annotated[dict[str, Module], Field(min_length=1, max_length=1)] | None = None
    """`slices` or `models` under the name of the family's one module."""
    merge_method: Annotated[str, Field(min_length=1)]
    base_model: Model | None = None
    """What the methods that need one start from; donor of config, tokenizer and generation config.
    The first source's when absent.
    """
    parameters: Parameters | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    """The type of the result's tensors; `dtype` when absent, and the donors' own when that is
    absent too.
    """
    tokenizer_source: Model | None = None
    """Short for `tokenizer: {source: ...}`."""
    tokenizer: Tokenizer | None = None
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """`auto`, a built-in template's name, or jinja."""
    embedding: Model | None = None
    """The donor whose embedding the result gets as it is; merged from the first slice's sources
    when absent.
    """
    final_norm: Model | None = None
    """The same for the final norm; merged from the last slice's sources when absent."""
    head: Model | None = None
    """The same for the head; merged from the last slice's sources when absent."""
    seed: Annotated[StrictInt, Field(ge=0, lt=1 << 63)] | None = None
    """Draws what the methods that drop at random drop; 0 when absent."""

    @property
    def stack(self) -> "Recipe | Module":
        """What holds `slices` or `models`: the recipe, or its module."""
        return next(iter(self.modules.values())) if self.modules else self

    @property
    def parts(self) -> list[Slice]:
        """The slices; a recipe of whole models must be spelled out first."""
        assert self.stack.slices is not None, "spell the recipe out first"
        return self.stack.slices

    @property
    def has_gauges(self) -> bool:
        """Whether any slice is rotated to another basis."""
        return any(part.gauge for part in self.stack.slices or [])

    @property
    def sources(self) -> Sequence[Source | Whole]:
        """Everything that blocks are taken from, in order."""
        return self.stack.models or [source for part in self.parts for source in part.sources]

    @property
    def base(self) -> str:
        """The donor of config and generation config."""
        return self.base_model or self.sources[0].model

    @property
    def vocabulary(self) -> str | None:
        """What the tokenizer is asked to be: `base`, `union`, a donor, or None where nothing is said."""
        source = self.tokenizer.source if self.tokenizer else self.tokenizer_source
        return source.removeprefix("model:") if source else None

    @property
    def tokenizer_donor(self) -> str:
        """The donor of the tokenizer's files; a union begins with the base's."""
        return self.base if self.vocabulary in (None, "base", "union") else self.vocabulary

    @property
    def tensor_donors(self) -> list[str]:
        """Every donor of tensors or config once, in order of appearance."""
        bases = [part.base_model for part in self.stack.slices or []]
        tokens = (
            [token.source for token in (self.tokenizer.tokens or {}).values()]
            if self.tokenizer
            else []
        )
        rows = [
            token.model if isinstance(token, Row) else token
            for token in tokens
            if not isinstance(token, Zero)
        ]
        names = [
            *(source.model for source in self.sources),
            *bases,
            self.base,
            self.embedding,
            self.final_norm,
            self.head,
            *rows,
        ]
        return list(dict.fromkeys(name for name in names if name))

    @property
    def donors(self) -> list[str]:
        """Every donor once, in order of appearance."""
        return list(dict.fromkeys([*self.tensor_donors, self.tokenizer_donor]))

    @property
    def embedding_donors(self) -> list[str]:
        """What the embedding is merged from."""
        return [self.embedding] if self.embedding else self._models_of(0)

    @property
    def final_donors(self) -> list[str]:
        """What the final norm is merged from."""
        return [self.final_norm] if self.final_norm else self._models_of(-1)

    @property
    def head_donors(self) -> list[str]:
        """What the head is merged from."""
        return [self.head] if self.head else self._models_of(-1)

    def _models_of(self, number: int) -> list[str]:
        return [source.model for source in self.stack.models or self.parts[number].sources]

    @property
    def blocks(self) -> list[Block]:
        """The result's blocks in order, each as its slice's first source has it."""
        firsts = [part.sources[0] for part in self.parts]
        return [
            Block(source.model, index) for source in firsts for index in range(*source.layer_range)
        ]

    @property
    def seams(self) -> list[Seam]:
        """Where the block that follows is not the one that followed in the donor."""
        pairs = zip(self.blocks, self.blocks[1:], strict=False)
        return [
            Seam(after, before)
            for after, before in pairs
            if before != (after.model, after.index + 1)
        ]

    @property
    def plain(self) -> bool:
        """Whether it only puts blocks one behind the other, as their donors have them."""
        levels = [self, self.stack, *(self.stack.slices or []), *self.sources]
        single = not self.stack.models and all(
            len(part.sources) == 1 and part.gauge is None for part in self.parts
        )
        return (
            self.merge_method == "passthrough"
            and single
            and not any(level.parameters for level in levels)
        )

    def dump(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False)

    def __str__(self) -> str:
        """One line: donor[start:stop] for every slice, sources of one slice joined by +."""
        if self.stack.models:
            return f"{self.merge_method}: " + "+".join(
                Path(whole.model).name for whole in self.stack.models
            )
        told = [
            "+".join(
                f"{Path(source.model).name}[{source.layer_range[0]}:{source.layer_range[1]}]"
                for source in part.sources
            )
            for part in self.parts
        ]
        return " ".join(
            told if self.merge_method == "passthrough" else [f"{self.merge_method}:", *told]
        )


def recipe_of(blocks: list[Block], **fields: Any) -> Recipe:
    """Make the passthrough recipe that yields `blocks`, its slices as long as they can be."""
    slices: list[dict] = []
    for block in blocks:
        if (
            slices
            and slices[-1]["model"] == block.model
            and slices[-1]["layer_range"][1] == block.index
        ):
            slices[-1]["layer_range"][1] += 1
        else:
            slices.append({"model": block.model, "layer_range": [block.index, block.index + 1]})
    return Recipe.model_validate(
        {
            "slices": [{"sources": [part]} for part in slices],
            "merge_method": "passthrough",
            **fields,
        }
    )


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand once, and merge keys (`<<`) cannot make more of a file than `_LARGEST` keys."""

    merging = keys = 0
    """How deep in merge keys it is, and how many keys they brought so far."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
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
    """How many values there are with all aliases written out, beyond `_LARGEST` for one that holds itself; each is counted once."""
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
        raise fail(place, "YAML", " ".join(str(error).split()), "mend the file") from error
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


_HOLDERS = {
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
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(
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
        near = get_close_matches(str(loc[-1]), known, 1)
        return Fault(
            where,
            f"one of: {', '.join(known)}",
            "an unknown key",
            f"write {near[0]}" if near else "remove the key",
        )
    return Fault(where, detail["msg"].removeprefix("Value error, "), found, "correct the recipe")


def load_recipes(path: Path) -> list[Recipe]:
    """Read a recipe file's stages; relative paths are taken from the working directory first, then from the file's folder."""
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

    return [_changed(renamed(recipe, found), beside) for recipe in recipes]


def load_recipe(path: Path) -> Recipe:
    """Read a file of a single recipe, as `load_recipes` does."""
    return _single(load_recipes(path), str(path))


def _beside(folder: Path, name: str) -> str:
    return (
        str(folder / name)
        if name and not is_folder(name) and is_folder(str(folder / name))
        else name
    )


_NAMES = ("model", "base_model", "tokenizer_source", "source", "embedding", "final_norm", "head")


def renamed(recipe: Recipe, rename: Callable[[str], str]) -> Recipe:
    """The same recipe with every model's name put through `rename`."""
    return _changed(
        recipe,
        lambda key, value: rename(value.removeprefix("model:")) if _is_name(key, value) else value,
    )


def _changed(recipe: Recipe, change: Callable[[str, str], str]) -> Recipe:
    """The same recipe with every text put through `change`, together with its key."""

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        return {
            key: change(key, entry) if isinstance(entry, str) else walk(entry)
            for key, entry in value.items()
        }

    return Recipe.model_validate(walk(recipe.model_dump(exclude_none=True)))


def _is_name(key: str, value: str) -> bool:
    return key in _NAMES and not (
        key in ("source", "tokenizer_source") and value in ("base", "union")
    )


def open_donors(
    recipe: Recipe,
    *,
    download: bool = False,
    allow_pickle: bool = False,
    weights: bool = True,
    opened: Mapping[str, Checkpoint] | None = None,
) -> dict[str, Checkpoint]:
    """Open every donor of a recipe, but for those that are `opened` already. Raises FrankenmergeError with the faults of all."""
    options = {"download": download, "allow_pickle": allow_pickle, "weights": weights}
    donors, faults = {}, []
    for name in recipe.donors:
        try:
            donors[name] = (
                opened[name] if opened and name in opened else open_donor(name, **options)
            )
        except FrankenmergeError as error:
            faults += error.faults
    raise_all(faults)
    return donors


def open_donor(
    name: str, *, download: bool = False, allow_pickle: bool = False, weights: bool = True
) -> Checkpoint:
    """Open a donor by the name that a recipe gives it, `path@revision+lora`.

    Args:
        name: the donor's; what is opened keeps it.
        download: whether it may be fetched from the hub.
        allow_pickle: whether weights that are there as pickles alone are converted.
        weights: whether they will be read. Without, headers are enough of a donor on the hub, and a
            LoRA is looked for and not folded in: what is opened is its base, whose names, shapes
            and types are the same.

    Raises:
        FrankenmergeError: for a donor or a LoRA that is not there or cannot be used.
    """
    path, revision, lora = reference(name)
    model = name if lora is None else path + (f"@{revision}" if revision else "")
    base = open_checkpoint(model, download=download, allow_pickle=allow_pickle, weights=weights)
    if lora is None:
        return base
    adapter = find_adapter(lora, download=download, weights=weights)
    return (
        replace(folded(base, adapter), name=name)
        if weights
        else replace(base, name=name, whole=False)
    )
