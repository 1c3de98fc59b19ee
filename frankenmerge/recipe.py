"""The recipe: which blocks of which donors, in what order. YAML in mergekit's terms."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, ValidationError

from frankenmerge.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all


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


def _ordered(value: list[int]) -> list[int]:
    if value[0] < 0:
        raise ValueError("the first block of a range is 0 or more")
    if value[0] >= value[1]:
        raise ValueError("a range [start, stop] holds at least one block: start < stop")
    return value


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Part):
    """A run of blocks of one donor."""

    model: Annotated[str, Field(min_length=1)]
    """A checkpoint's folder or a hub id."""
    layer_range: Annotated[list[StrictInt], Field(min_length=2, max_length=2), AfterValidator(_ordered)]
    """`[start, stop]`: 0-based, half-open."""


class Gauge(_Part):
    """Into whose basis of the residual stream a slice is turned, and by what it is fitted. No key of mergekit's."""

    to: Literal["base", "previous"]
    """The base donor's basis, or the one that the slice before is in."""
    fit: Annotated[str, Field(min_length=1)] = "probes"
    """`probes` for random tokens, which need no data, or a text file."""


class Slice(_Part):
    """A run of blocks of the result; in a passthrough it has one source."""

    sources: Annotated[list[Source], Field(min_length=1, max_length=1)]
    gauge: Gauge | None = None


class Recipe(_Part):
    """A whole frankenmodel."""

    slices: Annotated[list[Slice], Field(min_length=1)]
    merge_method: Literal["passthrough"]
    base_model: str | None = None
    """The donor of config, tokenizer and generation config; the first slice's when absent.

    The embedding is always the first slice's donor's, final norm and head the last one's.
    """
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """The type of the result's tensors; a passthrough copies bytes, so it must be the donors' own."""
    tokenizer_source: str | None = None
    """`base`, or the donor whose tokenizer the result gets."""

    @property
    def sources(self) -> list[Source]:
        """The slices' sources in order."""
        return [part.sources[0] for part in self.slices]

    @property
    def base(self) -> str:
        """The donor of config and tokenizer."""
        return self.base_model or self.sources[0].model

    @property
    def tokenizer(self) -> str:
        """The donor of the tokenizer."""
        return self.base if self.tokenizer_source in (None, "base") else self.tokenizer_source

    @property
    def donors(self) -> list[str]:
        """Every donor once, in order of appearance."""
        return list(dict.fromkeys([*(source.model for source in self.sources), self.base, self.tokenizer]))

    @property
    def blocks(self) -> list[Block]:
        """The result's blocks in order."""
        return [Block(source.model, index) for source in self.sources for index in range(*source.layer_range)]

    @property
    def seams(self) -> list[Seam]:
        """Where the block that follows is not the one that followed in the donor."""
        pairs = zip(self.blocks, self.blocks[1:], strict=False)
        return [Seam(after, before) for after, before in pairs if before != (after.model, after.index + 1)]

    def dump(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False)

    def __str__(self) -> str:
        """One line: donor[start:stop] for every slice."""
        return " ".join(f"{Path(source.model).name}[{source.layer_range[0]}:{source.layer_range[1]}]" for source in self.sources)


def recipe_of(blocks: list[Block], **fields: Any) -> Recipe:
    """Make the passthrough recipe that yields `blocks`, its slices as long as they can be."""
    slices: list[dict] = []
    for block in blocks:
        if slices and slices[-1]["model"] == block.model and slices[-1]["layer_range"][1] == block.index:
            slices[-1]["layer_range"][1] += 1
        else:
            slices.append({"model": block.model, "layer_range": [block.index, block.index + 1]})
    return Recipe.model_validate({"slices": [{"sources": [part]} for part in slices], "merge_method": "passthrough", **fields})


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in nodes]
        for key, key_node in zip(keys, nodes, strict=True):
            if keys.count(key) > 1:
                mark = f"key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, mark, key_node.start_mark)
        return super().construct_mapping(node, deep)


def parse_recipe(text: str, place: str) -> Recipe:
    """Read a recipe from YAML. Raises FrankenmergeError with every fault found."""
    try:
        data = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # PyYAML lets scalars' own errors out
        raise fail(place, "YAML", " ".join(str(error).split()), "mend the file") from error
    if not isinstance(data, Mapping):
        raise fail(place, "a recipe with slices and merge_method", f"{type(data).__name__}", "see recipes/ for examples")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise FrankenmergeError(*(_fault(place, detail) for detail in error.errors())) from error


def _fault(place: str, detail: Any) -> Fault:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).lstrip(".")
    found = "nothing" if detail["type"] == "missing" else repr(detail["input"])[:200]
    if detail["type"] == "extra_forbidden":
        part = Gauge if "gauge" in detail["loc"] else {1: Recipe, 3: Slice}.get(len(detail["loc"]), Source)
        return Fault(f"{place}: {where}", f"one of: {', '.join(part.model_fields)}", "an unknown key", "correct or remove the key")
    return Fault(f"{place}: {where}", detail["msg"].removeprefix("Value error, "), found, "correct the recipe")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file; donors' relative paths are taken from the working directory first, then from the file's folder."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise fail(str(path), "a recipe file", str(error), "give the path of a YAML recipe") from error
    recipe = parse_recipe(text, str(path))
    return _with_paths(recipe, path.parent)


def _with_paths(recipe: Recipe, folder: Path) -> Recipe:
    def found(name: str) -> str:
        beside = folder / name
        return str(beside) if not Path(name).is_dir() and beside.is_dir() else name

    data = recipe.model_dump(exclude_none=True)
    for part in data["slices"]:
        part["sources"][0]["model"] = found(part["sources"][0]["model"])
        if (gauge := part.get("gauge")) and not Path(gauge["fit"]).is_file() and (folder / gauge["fit"]).is_file():
            gauge["fit"] = str(folder / gauge["fit"])
    for key in ("base_model", "tokenizer_source"):
        if key in data:
            data[key] = found(data[key])
    return Recipe.model_validate(data)


def open_donors(recipe: Recipe, *, download: bool = False) -> dict[str, Checkpoint]:
    """Open every donor of a recipe. Raises FrankenmergeError with the faults of all of them."""
    donors, faults = {}, []
    for name in recipe.donors:
        try:
            donors[name] = open_checkpoint(name, download=download)
        except FrankenmergeError as error:
            faults += error.faults
    raise_all(faults)
    return donors
