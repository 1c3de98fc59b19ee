"""Donors whose token ids mean other tokens, in recipes that say nothing about the tokenizer."""

from collections.abc import Iterator
from typing import NamedTuple

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import quantity
from frankenmerge.errors import Fault, FrankenmergeError
from frankenmerge.splicing.methods import METHODS
from frankenmerge.splicing.result import Donors

TOLERATED = 0.01
"""Share of ids that may mean other tokens where embeddings or heads are merged row by row."""


class TokenDifference(NamedTuple):
    """Ids that mean one token in one tokenizer and another token in the other."""

    shared: int
    """Ids that both tokenizers have."""
    different: int
    """How many of them mean other tokens."""
    example: tuple[int, str, str] | None
    """The first such id, and what it means in each."""

    @property
    def share(self) -> float:
        """The share of the shared ids that mean other tokens."""
        return self.different / max(1, self.shared)


def token_difference(first: Checkpoint, other: Checkpoint) -> TokenDifference:
    """Compare two tokenizers id by id.

    Raises:
        FrankenmergeError: for a donor whose tokens cannot be read.
    """
    tables = [{index: token for token, index in donor.tokens.items()} for donor in (first, other)]
    shared = tables[0].keys() & tables[1].keys()
    unlike = sorted(index for index in shared if tables[0][index] != tables[1][index])
    example = (unlike[0], tables[0][unlike[0]], tables[1][unlike[0]]) if unlike else None
    return TokenDifference(len(shared), len(unlike), example)


class TokenFindings(NamedTuple):
    """What forbids a merge, and what is only worth knowing."""

    faults: list[Fault]
    remarks: list[str]


def token_findings(recipe: Recipe, donors: Donors, place: str) -> TokenFindings:
    """Compare every donor's tokens with those of the donor that gives the tokenizer.

    A recipe that names the tokenizer has its rows matched by their tokens, and needs no comparison.

    Args:
        recipe: spelled out.
        donors: by name.
        place: where faults are.
    """
    found = TokenFindings([], [])
    chosen = recipe.tokenizer_donor
    if recipe.vocabulary is not None or not donors[chosen].has_tokenizer:
        return found
    merged = set(_merged_ends(recipe))
    seen = {donors[chosen].tokenizer_hash}
    for name in sorted(recipe.tensor_donors, key=lambda name: name not in merged):
        donor = donors[name]
        if not donor.has_tokenizer or donor.tokenizer_hash in seen:
            continue
        seen.add(donor.tokenizer_hash)
        try:
            difference = token_difference(donors[chosen], donor)
        except FrankenmergeError as error:
            found.remarks.append(
                f"the tokenizers of {chosen} and {name} are different files, and their tokens "
                f"cannot be compared ({error.faults[0].place}: {error.faults[0].found}); "
                f"the result has that of {chosen}"
            )
            continue
        # Matrices of other sizes are refused as such.
        sizes = {quantity(each.config, "vocabulary") for each in (donors[chosen], donor)}
        if len(sizes) == 1 and name in merged and difference.share > TOLERATED:
            found.faults.append(_fault(chosen, name, difference, place))
        elif difference.different:
            found.remarks.append(_remark(recipe, chosen, name, difference))
    return found


def _merged_ends(recipe: Recipe) -> Iterator[str]:
    """Donors whose embedding or head is merged with that of another donor, row by row."""
    uses_base = METHODS[recipe.merge_method].base != "none"
    for explicit, names, part in (
        (recipe.embedding, recipe.embedding_donors, recipe.parts[0]),
        (recipe.head, recipe.head_donors, recipe.parts[-1]),
    ):
        base = part.base_model or recipe.base_model
        inputs = {*names, base} if base and uses_base and not explicit else set(names)
        if len(inputs) > 1:
            yield from inputs


def _fault(chosen: str, name: str, difference: TokenDifference, place: str) -> Fault:
    return Fault(
        f"{place}: tokenizer_source",
        "donors whose ids mean the same tokens, to merge their embeddings and heads row by row",
        f"different tokenizers of {chosen} and {name}: {_counted(chosen, name, difference)}",
        f"set tokenizer_source: union (the tokens of all donors) or base (those of {chosen}): "
        "both match rows by their tokens",
    )


def _remark(recipe: Recipe, chosen: str, name: str, difference: TokenDifference) -> str:
    ends = {"embedding": recipe.embedding_donors, "head": recipe.head_donors}
    from_other = [end for end, names in ends.items() if name in names]
    rows = f", but rows of its {' and its '.join(from_other)} are from {name}" if from_other else ""
    return (
        f"{chosen} and {name} have different tokenizers: {_counted(chosen, name, difference)}; "
        f"the result has the tokenizer of {chosen}{rows}"
    )


def _counted(chosen: str, name: str, difference: TokenDifference) -> str:
    assert difference.example is not None
    index, *tokens = difference.example
    meanings = f"{tokens[0]!r} in {chosen} and {tokens[1]!r} in {name}"
    counts = f"{difference.different:,} of {difference.shared:,} shared ids mean other tokens"
    return f"{counts} (id {index} is {meanings})"
