"""The searches that find the inputs of a neuron: what each is called, does and costs.

One entry per search. `workflows.searches` has the function of every entry; the command line takes
its choices, its help and the options of each search from here.
"""

from typing import NamedTuple


class SearchInfo(NamedTuple):
    """The words for a search, and the options that apply to it."""

    title: str
    explanation: str
    """What it does."""
    cost: str
    """What it runs."""
    options: tuple[str, ...]
    """Fields of `workflows.searches.SearchOptions` that not all searches have."""


SEARCHES: dict[str, SearchInfo] = {
    "complete": SearchInfo(
        "Complete search",
        "rank all single tokens; for vision transformers, all images",
        "one pass of the vocabulary",
        ("neurons", "notation", "tokens", "bos", "bottom", "mask_special", "images"),
    ),
    "greedy": SearchInfo(
        "Greedy search",
        "build an input token by token",
        "one pass of the vocabulary per distinct prefix",
        ("neurons", "notation", "tokens", "bos", "beam", "candidates", "positions"),
    ),
    "ascent": SearchInfo(
        "Ascent",
        "exchange single tokens of inputs for better ones",
        "8 to 10 passes of the vocabulary per feature; with --candidates N about 50 N inputs",
        ("neurons", "notation", "tokens", "bos", "candidates", "positions", "starts", "fluent")
        + ("steps",),
    ),
    "gradient": SearchInfo(
        "Gradient search",
        "descend on the embeddings of an input",
        "--steps passes per feature",
        ("neurons", "notation", "tokens", "optimizer", "steps", "target", "decode"),
    ),
    "softmax-prior": SearchInfo(
        "Search with a softmax prior",
        "descend on weights over the vocabulary",
        "--steps passes per feature",
        ("neurons", "notation", "tokens", "steps", "target"),
    ),
    "pixels": SearchInfo(
        "Gradient ascent on pixels",
        "optimise an image, for vision transformers",
        "--steps passes per 16 features",
        ("neurons", "notation", "steps"),
    ),
    "inversion": SearchInfo(
        "Inversion",
        "recover a text from block outputs",
        "--steps passes per block",
        ("optimizer", "steps", "text", "distance"),
    ),
}


def searches_with(option: str) -> tuple[str, ...]:
    """The searches that an option applies to; empty for an option of all."""
    return tuple(name for name, info in SEARCHES.items() if option in info.options)
