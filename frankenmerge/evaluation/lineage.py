"""What a model was made of: of which donor's which block every one of its blocks is. Reads no weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from frankenmerge.artefacts.provenance import PROVENANCE
from frankenmerge.artefacts.recipe import Block, Recipe
from frankenmerge.donors.checkpoint import Checkpoint, read_json
from frankenmerge.errors import FrankenmergeError, fail
from frankenmerge.splicing.compatibility import spelled_out


class Lineage(NamedTuple):
    """What a model was made of."""

    blocks: tuple[Block, ...]
    """Where each block is from; one that was merged from several, its first source."""
    donors: tuple[str, ...]
    """Every donor of tensors, in order of appearance."""


def recipe_lineage(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> Lineage:
    """What the result of a recipe is made of."""
    return Lineage(tuple(spelled_out(recipe, donors).blocks), tuple(recipe.tensor_donors))


def checkpoint_lineage(checkpoint: Checkpoint, known: Mapping[str, Checkpoint]) -> Lineage | None:
    """What a merged checkpoint is made of, by the `frankenmerge.json` beside its weights; None where there is none.

    Donors that are among the `known`, by their fingerprints, are called as they are there; the
    others as when they were merged.

    Raises:
        FrankenmergeError: for a `frankenmerge.json` that does not tell of these weights.
    """
    path = checkpoint.path / PROVENANCE
    if not path.is_file():
        return None
    told = read_json(path, "the provenance that a merge writes")
    try:
        called = {other.fingerprint: name for name, other in known.items()}
        names = {
            donor: called.get(given["fingerprint"], str(donor))
            for donor, given in told["donors"].items()
        }
        origins = [
            _first(told["tensors"][next(iter(checkpoint.by_role["block", index].values()))])
            for index in range(checkpoint.blocks)
        ]
        places = [checkpoint.architecture.role(origin["tensor"])[1] for origin in origins]
        blocks = tuple(
            Block(names[origin["donor"]], place or 0)
            for origin, place in zip(origins, places, strict=True)
        )
        return Lineage(blocks, tuple(dict.fromkeys(names.values())))
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise fail(
            str(path),
            "the origin of every tensor of these weights",
            f"{error!r} missing or broken",
            "merge again",
        ) from error


def _first(origin: dict[str, Any]) -> dict[str, Any]:
    return origin if "donor" in origin else origin["inputs"][0]


def same_tokens(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether both read the same token under every id."""
    if one.tokenizer_hash == other.tokenizer_hash:
        return True
    try:
        return one.tokens == other.tokens
    except FrankenmergeError:
        return False
