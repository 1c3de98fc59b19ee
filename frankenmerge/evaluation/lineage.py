"""What a model was made of: the donor and block of each of its blocks. Reads no weights."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from frankenmerge.artefacts.provenance import PROVENANCE, TensorRecord, load_provenance
from frankenmerge.artefacts.recipe import Block
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import FrankenmergeError, fail
from frankenmerge.splicing.resolve import Splice


class Lineage(NamedTuple):
    """What a model was made of."""

    blocks: tuple[Block, ...]
    """Where each block is from; for a block merged from several, its first source."""
    donors: tuple[str, ...]
    """Every donor of tensors, in order of appearance."""


def splice_lineage(splice: Splice) -> Lineage:
    """What the result of a recipe is made of."""
    return Lineage(splice.blocks, tuple(splice.recipe.tensor_donors))


def checkpoint_lineage(checkpoint: Checkpoint, known: Mapping[str, Checkpoint]) -> Lineage | None:
    """What a merged checkpoint is made of, by its `frankenmerge.json`; None if it has none.

    Donors that are among the `known`, by their fingerprints, get their names from there; the others
    have the names under which they were merged.

    Raises:
        FrankenmergeError: for a `frankenmerge.json` that does not describe these weights.
    """
    provenance = load_provenance(checkpoint.path)
    if provenance is None:
        return None
    known_names = {other.fingerprint: name for name, other in known.items()}
    names = {
        donor: known_names.get(record.fingerprint, donor)
        for donor, record in provenance.donors.items()
    }
    blocks = []
    for index in range(checkpoint.blocks):
        canonical, tensor = next(iter(checkpoint.by_role["block", index].items()), ("", ""))
        block = _source_block(provenance.tensors.get(tensor), canonical, names)
        if block is None:
            raise fail(
                f"{checkpoint.path / PROVENANCE}: {tensor or f'block {index}'}",
                "the donor and tensor that this tensor was made from",
                "none, or a donor that the file does not list",
                "merge again",
            )
        blocks.append(block)
    return Lineage(tuple(blocks), tuple(dict.fromkeys(names.values())))


def _source_block(
    origin: TensorRecord | None, canonical: str, names: Mapping[str, str]
) -> Block | None:
    """The donor's block that a tensor is from; None if the record does not say.

    A donor's block may have another prefix than the result's: within it, names are the same.
    """
    if origin is None or origin.source is None:
        return None
    donor, tensor = origin.source
    within = canonical.partition("{}.")[2]
    index = re.search(rf"(\d+)\.{re.escape(within)}$", tensor)
    return Block(names[donor], int(index[1])) if donor in names and index else None


def same_tokens(one: Checkpoint | Splice, other: Checkpoint) -> bool:
    """Whether both have the same token for every id."""
    if one.tokenizer_hash is not None and one.tokenizer_hash == other.tokenizer_hash:
        return True
    try:
        return one.tokens == other.tokens
    except FrankenmergeError:
        return False
