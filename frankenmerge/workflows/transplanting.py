"""A model with the tokenizer of another: what becomes of the tokens, and what that costs."""

from collections.abc import Sequence
from typing import NamedTuple

from frankenmerge.errors import fail
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import Text
from frankenmerge.models.loading import CPU, Placement
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.operations import Transplant
from frankenmerge.splicing.resolve import Splice


class Tokens(NamedTuple):
    """How many tokens of the new vocabulary got their rows in which way."""

    exact: int
    """The model had them."""
    composed: int
    """From pieces that the model had."""
    approximated: int
    """From other tokens."""


class Measured(NamedTuple):
    """Bits per byte of a text."""

    text: str
    before: float
    after: float


def tokens_of(splice: Splice) -> Tokens:
    """What becomes of the tokens of a resolved `transplant_recipe`.

    Raises FrankenmergeError for donors that have one vocabulary.
    """
    made = [each for each in splice.operations if isinstance(each, Transplant)]
    if not made:
        place, expected = f"{splice.recipe.base}: tokenizer", "another vocabulary than the donor's"
        raise fail(place, expected, "the same tokens", "splice the two as they are")
    assert splice.vocabulary
    tokens, approximation = made[0].tokens, made[0].approximation
    named = sorted(splice.vocabulary.tokens.values())
    exact = int((tokens.exact[named] >= 0).sum())
    composed = int(tokens.composed[named].sum()) if approximation == "pieces" else 0
    return Tokens(exact, composed, len(named) - exact - composed)


def measured(
    splice: Splice,
    texts: Sequence[Text],
    *,
    placement: Placement = CPU,
    progress: Progress = silent,
) -> list[Measured]:
    """Bits per byte of texts, of the model with its own tokenizer and with the new one."""
    name = splice.recipe.base
    bench = Bench(texts, {name: splice.donors[name]}, placement=placement)
    before = bench.checkpoint(name, progress=progress).losses
    after = bench.splice(str(splice.recipe), splice, progress=progress).losses
    return [
        Measured(text.name, before[text.name].bits_per_byte, after[text.name].bits_per_byte)
        for text in texts
    ]
