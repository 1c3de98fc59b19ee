"""The models of the source document (see docs/method.md), and how cells are scored."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

Verdict = Literal["agrees", "differs", "not comparable"]
Cells = tuple[str | None, ...]
"""One row of a table, a string for each feature; None if the document shows nothing."""
FIRST_NEURON = 2000
"""The neuron that `{0}` in a table's features stands for, `{1}` for the next, and so on."""


@dataclass(frozen=True)
class Table:
    """One table of the source document."""

    name: str
    method: Literal[
        "complete",
        "greedy",
        "gradient",
        "isolated gradient",
        "L1 inversion",
        "cosine inversion",
        "softmax prior",
    ]
    features: str
    """In the document's notation, for `parse_features` once the neurons are filled in."""
    blocks: tuple[int, ...]
    """All blocks in the table of any model, and for isolated blocks two that a small model has."""
    pages: Mapping[str, Mapping[int, Cells]] = field(default_factory=dict)
    """The document's own rows, by model and block."""
    untrained: bool = False
    excuse: str = ""
    """Why a difference from the document would mean nothing."""

    @property
    def artefact(self) -> bool:
        """Whether the document's cells are the decoding artefact."""
        return self.method.endswith("gradient")


MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "gpt2-medium": {
        "model_type": "gpt2",
        "n_layer": 24,
        "n_embd": 1024,
        "n_head": 16,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
} | {
    name: {
        "model_type": "llama",
        "num_hidden_layers": blocks,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
        "vocab_size": 32000,
    }
    for name, blocks, width, heads, inner in [
        ("llama-7b", 32, 4096, 32, 11008),
        ("llama-13b", 40, 5120, 40, 13824),
        ("llama-30b", 60, 6656, 52, 17920),
    ]
}
"""The models that the document used, identified by these fields of their configs.

Llama 2 has 4096 positions.
"""

ARTEFACT = (
    "The document's strings are a decoding artefact: the tokens whose ids are the neurons' indices "
    "(`called` is token 2000 of Llama's). `hidden axis` decodes as the document did, flagged; "
    "the tokens that the embeddings represent are in the rows of `E^+`."
)


def model_of(config: Any) -> str | None:
    """The model of the document that a config belongs to, by its shape; None if of none."""
    matching = (
        name
        for name, shape in MODELS.items()
        if all(getattr(config, key, None) == value for key, value in shape.items())
    )
    return next(matching, None)


def squeezed(text: str) -> str:
    """A text without white space, which the document lost in places."""
    return "".join(text.split())


def split(cell: str, vocabulary: Collection[str], count: int) -> tuple[str, ...] | None:
    """Split a cell into `count` tokens of a vocabulary of squeezed texts, longer ones tried first.

    Returns None where that is not possible.
    """
    text, longest = squeezed(cell), max(map(len, vocabulary), default=0)

    @cache
    def tail(start: int, left: int) -> tuple[str, ...] | None:
        if not left:
            return () if start == len(text) else None
        for stop in range(min(len(text), start + longest), start, -1):
            if text[start:stop] in vocabulary and (rest := tail(stop, left - 1)) is not None:
                return (text[start:stop], *rest)
        return None

    return tail(0, count)


def verdict(
    found: Sequence[str],
    cell: str | None,
    *,
    positions: range | None = None,
    tokens: Sequence[str] | None = None,
    excuse: str = "",
) -> Verdict:
    """Compare the texts of the tokens found with a cell of the document, ignoring white space.

    Args:
        found: the texts, one for each position.
        cell: the document's string; None if it shows none for this model.
        positions: where the feature is; other positions, which the search does not change, are not
            scored. None scores all.
        tokens: the cell as `split` reads it, needed if only some positions are scored.
        excuse: why a difference would mean nothing, if that is so.
    """
    if cell is None or (positions is not None and tokens is None):
        return "not comparable"
    if positions is None or tokens is None:
        same = squeezed("".join(found)) == squeezed(cell)
    else:
        same = all(squeezed(found[position]) == tokens[position] for position in positions)
    return "agrees" if same else "not comparable" if excuse else "differs"
