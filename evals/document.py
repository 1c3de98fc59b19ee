"""What the document, the page "Language Model Features", shows: its models and the cells of its tables, and how a cell is scored."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

Verdict = Literal["agrees", "differs", "not comparable"]
Cells = tuple[str | None, ...]
"""One row of the page, a string a feature; None where it shows nothing."""

FIRST_NEURON = 2000
"""The neuron that `{0}` in a table's features stands for, `{1}` for the next, and so on."""


@dataclass(frozen=True)
class Table:
    """One table of the document."""

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
    """In the document's notation, read by `parse_features` once the neurons are put in."""
    blocks: tuple[int, ...]
    """All that some model's table has, and for the isolated blocks two that a small model has."""
    pages: Mapping[str, Mapping[int, Cells]] = field(default_factory=dict)
    """The page's own rows, by model and block."""
    untrained: bool = False
    excuse: str = ""
    """Why a difference from the page would tell nothing."""

    @property
    def artefact(self) -> bool:
        """Whether the page's cells are the decoding artefact."""
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
"""The models the document used, told by these fields of their configs. (Llama 2 has 4096
positions.)
"""

ARTEFACT = (
    "The page's strings are a decoding artefact: the tokens whose ids are the neurons' indices (`called` is token 2000 of Llama's). "
    "`hidden axis` decodes as the page did and is flagged; what the embeddings stand for is in the rows of `E^+`."
)
_RANDOM = "the weights are random, and the page's seed is unknown"
_NO_TARGET = "the page names neither the block nor the output to be reached; here the output of the best token at this block"
_NO_STEP = "the page gives no step size, and the softmax needs a temperature that it does not have"
_SECOND_THOUSAND = (
    "called called called called called",
    "ItemItemItemItemItem",
    "urauraurauraura",
    "vecvecvecvecvec",
    "emeemeemeemeeme",
)
_THIRTEEN_AT_4 = ("tamb would си]{da", "column tamb mar marity", "cal would tambIONils")

TABLES: tuple[Table, ...] = (
    Table(
        "complete search",
        "complete",
        "[:, :, 0-3]",
        (1, 2, 4, 8, 12),
        {
            "gpt2": {
                1: ("Pwr", "Claud", "Peb", "View"),
                2: ("ItemTracker", "watched", "Peb", "(@"),
                4: ("ItemTracker", "watched", "Peb", "(@"),
                8: ("ItemTracker", "watched", "Peb", "(@"),
            },
            "gpt2-medium": {
                1: ("Ender", "pmwiki", "Cass", "catentry"),
                4: ("refres", "Flavoring", "carbohyd", "assetsadobe"),
                8: ("refres", "Flavoring", "carbohyd", "assetsadobe"),
                12: ("refres", "Flavoring", "carbohyd", "assetsadobe"),
            },
        },
    ),
    Table(
        "inversion, L1",
        "L1 inversion",
        "[:, :, 0-3]",
        (1,),
        {"gpt2": {1: ("for", "im", "G", "$")}},
        excuse=_NO_TARGET,
    ),
    Table(
        "inversion, cosine",
        "cosine inversion",
        "[:, :, 0-3]",
        (1,),
        {"gpt2": {1: ("!", '"', "qu", "$")}},
        excuse=_NO_TARGET,
    ),
    Table(
        "softmax prior",
        "softmax prior",
        "[:, :, 0-3]",
        (1, 4, 8),
        {
            "gpt2": {
                1: ("cris", "Cola", "Cass", "Holt"),
                4: ("Geh", "20439", "og"),
                8: ("Geh", "20439", "expend", "assetsadobe"),
            }
        },
        excuse=_NO_STEP,
    ),
    Table(
        "greedy search",
        "greedy",
        "[:, :, 0-3]",
        (1, 4, 8, 12, 16, 20, 24),
        {
            "gpt2": {
                1: (
                    " Pwr PwrItemTrackerItemTracker",
                    " Claud Lara Lara Lara",
                    " Peb Peb Peb Peb",
                    "Viewtnctnctnc",
                ),
                4: (
                    "ItemTracker interf interfItemTracker",
                    "watched watched watched watched",
                    "Peb Peb Peb Peb",
                    ' (@"></ guiName"></',
                ),
                8: (
                    "ItemTracker interf interf interf",
                    "watched watched watched watched",
                    " Peb Peb Peb Peb",
                    '(@ guiName"></ guiName',
                ),
                12: (
                    "ItemTracker interf interf interf",
                    " hostages herpes herpes herpes",
                    " Kenn Peb Peb Peb",
                    "(@rawdownloadcloneembedreportprintrawdownloadcloneembedreportprintrawdownloadcloneembedreportprint",
                ),
            },
            "llama-7b": {
                1: (
                    "Hein Hein mang Hein",
                    "cyl szere Woj cyl",
                    "inf inf char inf",
                    "travers travers assim feb",
                ),
                4: (
                    "</s></s>",
                    "cylнциклоuvud Externe",
                    "character postgresql mysqliAppData",
                    "</s>Q</s>l",
                ),
                8: ("</s></s>", "cyllista Which Peru", "</s></s></s></s>", "</s>Q</s>Q"),
                12: ("</s></s>", "cyl которой|чення", "characterparameters\\ \\", "</s>武²)."),
                16: (
                    "1!--puésugo",
                    " dataframe Broad Mediabestanden",
                    "</s> rép оп нап",
                    "</s>武性ktiv",
                ),
                20: (
                    "</s> thor webpack winter",
                    " Cés That roughly",
                    " .= Repub",
                    "� traject traject traject",
                ),
                24: ("</s>CURCURCUR", "aussianclar circuit", "</s> rép оп §", "1) traject/"),
            },
        },
    ),
    Table(
        "gradient, first neurons",
        "gradient",
        "[:, :, 0-2]",
        (1,),
        {"llama-7b": {1: (None, None, None)}},
    ),
    Table(
        "gradient, single neurons",
        "gradient",
        "[:, :, {0}-{4}]",
        (1, 4, 8),
        {
            "llama-7b": dict.fromkeys((1, 4, 8), _SECOND_THOUSAND),
            "llama-13b": {1: _SECOND_THOUSAND},
            "llama-30b": {1: _SECOND_THOUSAND},
        },
    ),
    Table(
        "gradient, deeper in 30b",
        "gradient",
        "[:, :, {0}-{2}]",
        (1, 4, 32),
        {
            "llama-30b": {
                1: _SECOND_THOUSAND[:3],
                4: _SECOND_THOUSAND[:3],
                32: (
                    "called planlearason current",
                    "******** doesn())ason current",
                    "ura statlearason current",
                ),
            }
        },
    ),
    Table(
        "gradient, one position at a time",
        "gradient",
        "[:, 0-4, {0}]",
        (1,),
        {
            "llama-7b": {
                1: (
                    "called Iger Alsolass",
                    "are calledger Alsolass",
                    "are I called Alsolass",
                    "are Iger calledlass",
                    "are Iger Also called",
                )
            }
        },
    ),
    Table(
        "gradient, first neurons combined",
        "gradient",
        "[:, :, 0:4]",
        (1,),
        {"llama-7b": {1: (None,)}},
    ),
    Table(
        "gradient, neurons combined",
        "gradient",
        "[:, :, {0}:{4}]",
        (1,),
        {"llama-7b": {1: ("vec calledura calledvec",)}},
    ),
    Table(
        "gradient, all neurons at one position",
        "gradient",
        "[:, 0-2, :]",
        (1, 4, 8, 12),
        {
            "llama-13b": {
                1: ("ther� year раreturn", "therige year раreturn", "ther� year раreturn"),
                4: _THIRTEEN_AT_4,
                8: ("ports mar mar user more", "endports marре user", "tamb marports Elie"),
                12: ("ports mar tamb El mar", "ports mar cды", "tamb marportsiche mar"),
            },
            "llama-30b": {4: ("osseringering How", "oss yearsering yearsoss", "estooss� yearsoss")},
        },
    ),
    Table(
        "gradient, isolated block",
        "isolated gradient",
        "[:, :, {0}-{3}]",
        (2, 4, 32),
        {"llama-13b": {32: _SECOND_THOUSAND[:4]}},
    ),
    Table(
        "untrained, complete search",
        "complete",
        "[:, :, 0-3]",
        (1, 4, 8, 12),
        {
            "gpt2": {
                1: ("Yan", "criticizing", "policy", "Pont"),
                4: ("inski", "Giants", "consuming", "Bert"),
                8: ("distruptions", "erie", "N", "Aut"),
                12: ("video", "collection", "wipe", "EngineDebug"),
            }
        },
        untrained=True,
        excuse=_RANDOM,
    ),
    Table(
        "untrained, greedy search",
        "greedy",
        "[:, :, 0-3]",
        (1, 4, 8),
        {
            "gpt2": {
                1: (
                    "Officers ii Denis variability",
                    "onductASE Media tissue",
                    " Comp accusationShiftShift",
                    " separated activekef patented",
                ),
                4: (
                    " Abortion contention variability variability",
                    ' one 185 (" Ic',
                    " coin Foss multiplied multiplied",
                    " Ae archetype faded faded",
                ),
                8: (
                    " Preferencesstrip Installation Installation",
                    " one logosAmy sheet",
                    "coin tiles unique backstory",
                    " active MDMA incentiv thirst",
                ),
            }
        },
        untrained=True,
        excuse=_RANDOM,
    ),
    Table(
        "untrained, gradient, first neurons",
        "gradient",
        "[:, :, 0-2]",
        (1,),
        {"llama-7b": {1: ("<unk><unk><unk><unk><unk>", "<s><s><s><s><s>", "</s></s></s></s></s>")}},
        untrained=True,
    ),
    Table(
        "untrained, gradient, single neurons",
        "gradient",
        "[:, :, {0}-{4}]",
        (1,),
        {"llama-7b": {1: _SECOND_THOUSAND}},
        untrained=True,
    ),
    Table(
        "untrained, gradient, one position at a time",
        "gradient",
        "[:, 0-4, {0}]",
        (1,),
        {
            "llama-7b": {
                1: (
                    "calledremger partlass",
                    "are calleddata Alsolass",
                    "are I calledamplelass",
                    "are Idata calledlass",
                    "are Idataample called",
                )
            }
        },
        untrained=True,
    ),
    Table(
        "untrained, gradient, deeper",
        "gradient",
        "[:, :, {0}-{3}]",
        (4,),
        {
            "llama-7b": {
                4: (
                    "are calleddata called met",
                    "Item larItemItem met",
                    "uraFieldurauraura",
                    "vecvecvec reallypha",
                )
            }
        },
        untrained=True,
    ),
    Table(
        "untrained, gradient, all neurons at one position",
        "gradient",
        "[:, 0-2, :]",
        (4,),
        {"llama-7b": {4: ("ypearchárodyause", "ci helriesiти", "haromenIndoz és")}},
        untrained=True,
    ),
)
"""All tables, the untrained controls last. (The page heads the single positions of the untrained 7b
with `0-2` and shows five.)
"""


def model_of(config: Any) -> str | None:
    """Which of the document's models a config is of, by its shape."""
    matching = (
        name
        for name, shape in MODELS.items()
        if all(getattr(config, key, None) == value for key, value in shape.items())
    )
    return next(matching, None)


def squeezed(text: str) -> str:
    """A text without white space, which the page lost in places."""
    return "".join(text.split())


def split(cell: str, vocabulary: Collection[str], count: int) -> tuple[str, ...] | None:
    """A page's string as `count` tokens of a vocabulary of squeezed texts, longer ones tried first; None where that cannot be."""
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
    """Score the texts of the tokens found against a page's cell, white space apart.

    Args:
        found: the texts, one a position.
        cell: the page's string; None where it shows none for this model.
        positions: where the feature is; the other positions, which it leaves as they began, are not
            scored. None scores all.
        tokens: the cell as `split` reads it, needed where only some positions are scored.
        excuse: why a difference would tell nothing, if it would not.
    """
    if cell is None or (positions is not None and tokens is None):
        return "not comparable"
    if positions is None or tokens is None:
        same = squeezed("".join(found)) == squeezed(cell)
    else:
        same = all(squeezed(found[position]) == tokens[position] for position in positions)
    return "agrees" if same else "not comparable" if excuse else "differs"
