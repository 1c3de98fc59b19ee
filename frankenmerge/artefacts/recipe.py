"""The recipe: which tensors of which donors make the result, and how. YAML in mergekit's terms.

docs/recipes.md tells what every key means. Those that mergekit does not know are `embedding`,
`final_norm`, `head`, `towers`, `filter` in a source, `seed` and `gauge`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import Field, StrictInt, model_validator

from frankenmerge.artefacts.mixture import Mixture
from frankenmerge.artefacts.recipe_schema import (
    ANCHORS,
    Approximation,
    Dtype,
    Model,
    Module,
    Parameters,
    Part,
    Row,
    Slice,
    Source,
    Tokenizer,
    Whole,
    Zero,
)

_AMONG_PARAMETERS = "it is read under parameters alone"
WITHOUT_EFFECT = {
    "random_seed": "the seed of the random methods is the key seed",
    "embed_slerp": "embeddings are merged as all other tensors are",
    "residual_weight": "no method has it",
    "int8_mask": "no mask is larger than a chunk",
    "normalize": _AMONG_PARAMETERS,
    "weight": _AMONG_PARAMETERS,
    "density": _AMONG_PARAMETERS,
}
"""Top-level keys of published recipes that mergekit does not read either, and why they have no
effect here.
"""


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
    """A whole result, merged from exactly one of `slices`, `models` and `modules`."""

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
    towers: Literal["base", "merge"] | None = None
    """Whether the towers and projectors of multimodal donors are the base's, which is the default,
    or merged as the language model is.
    """
    seed: Annotated[StrictInt, Field(ge=0, lt=1 << 63)] | None = None
    """Draws what the methods that drop at random drop; 0 when absent."""
    mixture: Mixture | None = None
    """Experts that replace the MLPs of the base model; see `of_mixture`."""
    without_effect: dict[str, Any] | None = None
    """Keys of published recipes that mergekit does not read either, with their values."""

    @model_validator(mode="before")
    @classmethod
    def _set_apart(cls, data: Any) -> Any:
        """Move keys that have no effect into a mapping of their own."""
        if is_mixture(data):
            return of_mixture(data)
        if not isinstance(data, Mapping) or not (found := data.keys() & WITHOUT_EFFECT.keys()):
            return data
        apart = {key: data[key] for key in data if key in found}
        kept = {key: value for key, value in data.items() if key not in found}
        return kept | {"without_effect": (data.get("without_effect") or {}) | apart}

    @property
    def dense(self) -> "Recipe":
        """The recipe without experts: of what a mixture has besides them."""
        return self.model_copy(update={"mixture": None})

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
        """The tokenizer that is asked for: `base`, `union`, a donor, or None where none is."""
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
            *(each.source_model for each in (self.mixture.all_experts if self.mixture else ())),
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
        if self.stack.models:
            return [whole.model for whole in self.stack.models]
        part = self.parts[number]
        # Filters select among the tensors of blocks alone.
        sources = part.sources[:1] if part.by_filter else part.sources
        return [source.model for source in sources]

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
    def key(self) -> str:
        """SHA-256 of everything in it, donors by the names that it gives them."""
        return hashlib.sha256(self.dump().encode()).hexdigest()

    def dump(self) -> str:
        """The recipe as YAML, that of a mixture as mergekit-moe reads it."""
        data = self.model_dump(exclude_none=True, exclude={"without_effect"})
        if mixture := data.pop("mixture", None):
            kept = {key: value for key, value in data.items() if key in BESIDE_EXPERTS}
            data = kept | mixture
        return yaml.safe_dump(data | (self.without_effect or {}), sort_keys=False)

    def __str__(self) -> str:
        """One line: donor[start:stop] for every slice, sources of one slice joined by +."""
        if self.mixture:
            names = (Path(each.source_model).name for each in self.mixture.experts)
            return f"moe: {Path(self.base).name} with experts {', '.join(names)}"
        if self.stack.models:
            return f"{self.merge_method}: " + "+".join(
                Path(whole.model).name for whole in self.stack.models
            )
        told = ["+".join(map(str, part.sources)) for part in self.parts]
        return " ".join(
            told if self.merge_method == "passthrough" else [f"{self.merge_method}:", *told]
        )


def transplant_recipe(
    model: str, donor: str, approximate: Approximation = "nearest", anchors: int = ANCHORS
) -> Recipe:
    """The recipe of `model` with the tokenizer of `donor`.

    Args:
        model: keeps all its tensors but embedding and head.
        donor: of the tokenizer.
        approximate: how rows are made for tokens that the model lacks.
        anchors: the most tokens that one is approximated by.
    """
    return Recipe(
        merge_method="passthrough",
        models=[Whole(model=model)],
        tokenizer=Tokenizer(
            source=donor,
            approximate=approximate,
            anchors=None if approximate == "pieces" else anchors,
        ),
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


BESIDE_EXPERTS = ("name", "base_model", "dtype", "seed")
"""Keys of a recipe that a mixture of experts has, too."""


def is_mixture(data: Any) -> bool:
    """Whether YAML describes a mixture of experts, as mergekit-moe's does."""
    return isinstance(data, Mapping) and "experts" in data


def of_mixture(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's fields from mergekit-moe's: all blocks of the base, and the experts apart."""
    inner = {key: value for key, value in data.items() if key not in BESIDE_EXPERTS}
    whole = {"models": [{"model": data.get("base_model")}], "merge_method": "passthrough"}
    return whole | {key: data[key] for key in data if key in BESIDE_EXPERTS} | {"mixture": inner}


_NAMES = (
    *("model", "base_model", "tokenizer_source", "source", "embedding", "final_norm", "head"),
    "source_model",
)


def renamed(recipe: Recipe, rename: Callable[[str], str]) -> Recipe:
    """The same recipe with every model's name put through `rename`."""
    return changed(
        recipe,
        lambda key, value: rename(value.removeprefix("model:")) if _is_name(key, value) else value,
    )


def key_of(
    recipe: Recipe, fingerprints: Mapping[str, str], texts: Mapping[str, str] | None = None
) -> str:
    """Identify a recipe together with its donors, whatever names and paths these have.

    Args:
        recipe: any; its name as a stage does not count.
        fingerprints: of its donors, by the names in it.
        texts: hashes of the texts that its gauges are fitted to, by their paths.

    Returns:
        32 hexadecimal digits: equal for recipes that make the same result of the same donors.
    """
    named = renamed(recipe, lambda name: fingerprints.get(name, name))
    hashed = changed(
        named, lambda key, value: (texts or {}).get(value, value) if key == "fit" else value
    )
    content = json.dumps(
        hashed.model_dump(exclude_none=True, exclude={"name", "without_effect"}), sort_keys=True
    )
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def changed(recipe: Recipe, change: Callable[[str, str], str]) -> Recipe:
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
