"""Whether one model can hold blocks of several donors. Reads configs and headers alone."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import NamedTuple

from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import block_kind, differences, language, quantity
from frankenmerge.donors.quantisation import names_blocks, title
from frankenmerge.donors.views import seen_as

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by canonical name."""


class Compatibility(NamedTuple):
    """What prevents splicing donors, and what is only worth knowing."""

    reasons: list[str]
    """Each forbids a splice."""
    remarks: list[str]
    """Each forbids nothing."""


def compatibility(donors: list[Checkpoint], *, based: bool = False) -> Compatibility:
    """Compare donors pair by pair: could one model hold blocks of all of them?

    With `based`, every block is merged with one of a base model, whose rotary positions apply.
    """
    reasons = []
    remarks = [remark for donor in donors for remark in donor.remarks]
    for first, other in combinations(donors, 2):
        pair = f"{first.name} | {other.name}"
        forbidding, harmless = differences(first.config, other.config, based=based)
        # Other sizes mean other shapes in every tensor: the sizes are reason enough.
        forbidding = [*forbidding, *_quantisation_reasons(first, other)]
        forbidding = forbidding or _tensor_differences(first, seen_as(other, first))
        harmless += _remarks(first, other)
        reasons += [f"{pair}: {reason}" for reason in forbidding]
        remarks += [f"{pair}: {remark}" for remark in harmless]
    return Compatibility(reasons, remarks)


def _quantisation_reasons(first: Checkpoint, other: Checkpoint) -> Iterator[str]:
    if first.quantisation != other.quantisation:
        titles = (title(donor.quantisation) for donor in (first, other))
        yield f"quantization_config: not the same ({', '.join(titles)})"
    elif names_blocks(first.quantisation):
        yield "quantization_config: names single blocks by their index"


def _remarks(first: Checkpoint, other: Checkpoint) -> Iterator[str]:
    if first.quantisation and other.quantisation:
        kind = title(first.quantisation)
        yield f"quantised ({kind}): only passthrough copies them, with their scales"
    elif set(first.dtypes) != set(other.dtypes):
        types = f"{', '.join(first.dtypes)} and {', '.join(other.dtypes)}"
        yield f"types {types}; the recipe has to set dtype"
    if first.tokenizer_hash != other.tokenizer_hash:
        yield (
            "tokenizer: not the same; the result gets one of them, and transplant-tokenizer gives "
            "one the other's"
        )
    for key in ("vocabulary", "positions"):
        sizes = quantity(first.config, key), quantity(other.config, key)
        if sizes[0] != sizes[1]:
            yield f"{key}: {sizes[0]} and {sizes[1]}; the result has the base donor's"


def _tensor_differences(first: Checkpoint, other: Checkpoint) -> list[str]:
    """Compare names and shapes of the donors' blocks: the first of each kind that both have."""
    if language(first.config)["model_type"] != language(other.config)["model_type"]:
        return []
    firsts = [_first_of_kind(donor) for donor in (first, other)]
    lines: list[str] = []
    for kind in (kind for kind in firsts[0] if kind in firsts[1]):
        shapes = [
            shapes_of(donor, "block", own[kind])
            for donor, own in zip((first, other), firsts, strict=True)
        ]
        found = shape_differences(shapes, (first.name, other.name))
        lines += [line.format(firsts[0][kind]) for line in found]
    return lines


def _first_of_kind(donor: Checkpoint) -> dict[tuple, int]:
    return {block_kind(donor.config, index): index for index in reversed(range(donor.blocks))}


def shape_differences(shapes: Iterable[Shapes], names: tuple[str, str]) -> Iterator[str]:
    """Describe where two tables of shapes differ; `names` are what they are shapes of."""
    first, other = shapes
    for canonical in sorted(set(first) | set(other)):
        a, b = first.get(canonical), other.get(canonical)
        if a is None or b is None:
            yield f"{canonical}: only in {names[0] if b is None else names[1]}"
        elif a != b:
            yield f"{canonical}: shapes {list(a)} and {list(b)}"


def shapes_of(donor: Checkpoint, role: str, index: int | None = None) -> Shapes:
    """Shapes of a donor's tensors of one role."""
    names = tensor_names(donor, role, index)
    return {canonical: donor.tensors[name].shape for canonical, name in names.items()}


def tensor_names(donor: Checkpoint, role: str, index: int | None = None) -> dict[str, str]:
    """Names in a donor's file by canonical name, of a block, `embedding`, `final` or `head`.

    The head of a tied donor is its embedding matrix under the head's name (and, in some families,
    its bias another one under that of the map to the vocabulary): a tied checkpoint may
    store a head too, but loaders use the embedding, and so does this.
    """
    names = donor.by_role.get((role, index), {})
    if role == "head" and donor.tied:
        stored = {
            **donor.by_role.get(("embedding", None), {}),
            **names,
        }
        ties = donor.architecture.tied_names.items()
        names = {**names, **{name: stored[same] for name, same in ties if same in stored}}
    return dict(sorted(names.items()))
