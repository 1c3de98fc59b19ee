"""The parts of a recipe as YAML writes them, each with what makes it unsound by itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    Tag,
    model_validator,
)

from frankenmerge.artefacts.recipe_parameters import setting
from frankenmerge.errors import fail
from frankenmerge.storage.hub import is_folder


class Reference(NamedTuple):
    """What `path@revision+lora` names."""

    path: str
    """A checkpoint's folder or a hub id."""
    revision: str | None = None
    lora: str | None = None
    """An adapter to fold in, itself `path` or `path@revision`."""


def reference(name: str) -> Reference:
    """Split a model's name into its parts; the name of an existing folder has none.

    Raises FrankenmergeError for more than one `@` or `+`.
    """
    if is_folder(name):
        return Reference(name)
    model, *loras = name.split("+")
    path, *revisions = model.split("@")
    if len(loras) > 1 or len(revisions) > 1 or not all([path, *revisions, *loras]):
        raise fail(
            name,
            "path, path@revision, path+lora or path@revision+lora",
            "none of these",
            "correct the model's name",
        )
    return Reference(path, *(revisions or [None]), *loras)


def _ordered(value: list[int]) -> list[int]:
    if value[0] < 0:
        raise ValueError("the first block of a range is 0 or more")
    if value[0] >= value[1]:
        raise ValueError("a range [start, stop] holds at least one block: start < stop")
    return value


def _one_name(value: Any) -> Any:
    """A model's name, also from the form {model: {path, revision}, lora: {path, revision}}.

    mergekit writes `override_architecture: null` into it.
    """

    def joined(part: Any) -> Any:
        if (
            isinstance(part, Mapping)
            and set(part) <= {"path", "revision"}
            and isinstance(part.get("path"), str)
        ):
            return part["path"] + (f"@{part['revision']}" if part.get("revision") else "")
        return part

    if isinstance(value, Mapping):
        value = {
            key: part
            for key, part in value.items()
            if key != "override_architecture" or part is not None
        }
    if not isinstance(value, Mapping) or not set(value) <= {"model", "lora"}:
        return joined(value)
    names = [joined(value[key]) for key in ("model", "lora") if value.get(key) is not None]
    return "+".join(names) if names and all(isinstance(name, str) for name in names) else value


def _without_torch(value: Any) -> Any:
    """`torch.bfloat16` is `bfloat16`."""
    names = ("float64", "float32", "float16", "bfloat16")
    return value[6:] if value in [f"torch.{name}" for name in names] else value


class Part(BaseModel):
    """A mapping that holds known keys and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = Annotated[str, BeforeValidator(_one_name), Field(min_length=1)]
"""`path@revision+lora`: a checkpoint's folder or a hub id, or an earlier stage's name."""
Setting = Annotated[Any, AfterValidator(setting)]
"""A parameter: a number or flag, a gradient (list of numbers), or a list of {filter, value} with
such values.
"""
Parameters = dict[str, Setting]
Dtype = Annotated[
    Literal["float64", "float32", "float16", "bfloat16"], BeforeValidator(_without_torch)
]


def _listed(value: Any) -> Any:
    """One filter is a list of one."""
    return [value] if isinstance(value, str) else value


class Source(Part):
    """A run of blocks of one donor, or those of their tensors that a filter selects."""

    model: Model
    layer_range: Annotated[
        list[StrictInt], Field(min_length=2, max_length=2), AfterValidator(_ordered)
    ]
    """`[start, stop]`: 0-based, half-open."""
    filter: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(min_length=1),
            BeforeValidator(_listed),
        ]
        | None
    ) = None
    """Parts of tensor names. In a passthrough the tensors whose names contain one of them come
    from this source instead of the slice's first.
    """
    parameters: Parameters | None = None

    def selects(self, tensor: str) -> bool:
        """Whether the filter names a tensor; a source without a filter names all."""
        return self.filter is None or any(part in tensor for part in self.filter)

    def __str__(self) -> str:
        start, stop = self.layer_range
        chosen = f"({', '.join(self.filter)})" if self.filter else ""
        return f"{Path(self.model).name}[{start}:{stop}]{chosen}"


def _as_rotations(value: Any) -> Any:
    """`turns`, as recipes of version 0.1 have it, is `rotations`."""
    return "rotations" if value == "turns" else value


class Gauge(Part):
    """Into whose basis of the residual stream a slice is rotated, and by what it is fitted."""

    to: Literal["base", "previous"]
    """The base donor's basis, or the one that the slice before is in."""
    fit: Annotated[str, Field(min_length=1)] = "probes"
    """`probes` for random tokens, which need no data, or a text file."""
    refine: Annotated[StrictInt, Field(ge=1)] | None = None
    """Steps of descent that follow the fit, after which every block has a rotation of its own."""
    maps: Annotated[Literal["rotations", "linear"] | None, BeforeValidator(_as_rotations)] = None
    """What refining may reach: rotations, which is the default, or any linear maps, one for what a
    block reads, one for what it writes.
    """

    @model_validator(mode="after")
    def _refined(self) -> Self:
        if self.maps == "linear" and not self.refine:
            raise ValueError("refine beside maps: linear, which only descent can find")
        return self


class Slice(Part):
    """A run of blocks of the result, each merged from the corresponding blocks of all sources."""

    sources: Annotated[list[Source], Field(min_length=1)]
    base_model: Model | None = None
    """In place of the recipe's, in this slice."""
    parameters: Parameters | None = None
    gauge: Gauge | None = None

    @property
    def length(self) -> int:
        """How many blocks it gives."""
        start, stop = self.sources[0].layer_range
        return stop - start

    @property
    def by_filter(self) -> bool:
        """Whether filters say which source gives a tensor."""
        return any(source.filter for source in self.sources)

    @model_validator(mode="after")
    def _one_without_filter(self) -> Self:
        filtered = [source.filter is not None for source in self.sources]
        if any(filtered) and filtered != [False] + [True] * (len(filtered) - 1):
            raise ValueError("the first source without a filter, and every other one with a filter")
        return self

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        if (
            len(
                lengths := {
                    stop - start for start, stop in (source.layer_range for source in self.sources)
                }
            )
            > 1
        ):
            raise ValueError(
                f"sources of one length, not of {' and '.join(map(str, sorted(lengths)))} blocks"
            )
        return self


class Whole(Part):
    """A donor that gives all of its blocks."""

    model: Model
    parameters: Parameters | None = None


class Module(Part):
    """What is merged, where it is written under a module's name."""

    slices: Annotated[list[Slice], Field(min_length=1)] | None = None
    models: Annotated[list[Whole], Field(min_length=1)] | None = None
    parameters: Parameters | None = None

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.slices is None) == (self.models is None):
            raise ValueError("either slices or models")
        return self


class Row(Part):
    """The embedding of one token of one donor."""

    kind: Literal["model_token"]
    model: Model
    token: str | None = None
    token_id: Annotated[StrictInt, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("either token or token_id")
        return self


class Zero(Part):
    """An embedding of zeros."""

    kind: Literal["zero"]


def _kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) else "model"


Origin = Annotated[
    Annotated[Row, Tag("model_token")]
    | Annotated[Zero, Tag("zero")]
    | Annotated[Model, Tag("model")],
    Discriminator(_kind),
]


class Token(Part):
    """Where the embedding of one token comes from in the donors that lack it."""

    source: Origin | None = None
    force: StrictBool = False
    """Whether it replaces the embedding also in the donors that have the token."""


Approximation = Literal["pieces", "omp", "barycentric", "nearest"]
"""How the row of a token that a model lacks is made: the mean of pieces that it knows, or a
combination of rows of tokens that both vocabularies have.
"""
APPROXIMATIONS: tuple[Approximation, ...] = get_args(Approximation)
ANCHORS = 16


class Tokenizer(Part):
    """The result's tokenizer, where its name alone does not tell it."""

    source: Model = "union"
    """`base`, `union`, or the donor whose tokenizer it is."""
    tokens: dict[str, Token] | None = None
    pad_to_multiple_of: Annotated[StrictInt, Field(ge=1, le=1 << 16)] | None = None
    """The embedding's rows are padded with zeros up to a multiple of it."""
    approximate: Approximation | None = None
    """How rows are made for tokens of `source` that a donor lacks, from its own rows. Without it
    they are other donors' rows, or zeros.
    """
    anchors: Annotated[StrictInt, Field(ge=1, le=1024)] | None = None
    """The most tokens that one is approximated by; `ANCHORS` when absent."""

    @model_validator(mode="after")
    def _of_one_donor(self) -> Self:
        if self.anchors is not None and self.approximate in (None, "pieces"):
            raise ValueError("anchors belong to approximate: omp, barycentric or nearest")
        if self.approximate is None:
            return self
        if self.source == "union":
            raise ValueError("approximate needs a source: base, or the donor of the tokenizer")
        if self.tokens:
            raise ValueError("approximate leaves no tokens to be set one by one")
        return self
