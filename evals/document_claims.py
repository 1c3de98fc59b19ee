"""What a table of the source document claims, and whether it is true of another model.

Where a model is not the document's own, cells cannot be compared, but the claim that they support
can. Every claim is a share, with a 95 % interval (Wilson) and the share that chance explains.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Literal, NamedTuple

import numpy as np
from document import Table

from frankenmerge.analysis.features import Feature
from frankenmerge.artefacts.atlas import TopTokens
from frankenmerge.artefacts.token_overlap import token_agreement

Truth = Literal["true", "in part", "not shown", "false"]
Found = Mapping[str, Sequence[Sequence[int]]]
"""Token ids, one input for each feature, by the way they were found."""


class Claim(NamedTuple):
    """A claim, and what this model has to say to it."""

    claim: str
    share: float
    interval: tuple[float, float]
    null: float
    """The share by chance; of permuted neurons or features, or of random tokens."""
    count: int
    """Of what the share is."""
    verdict: Truth


def claim(text: str, share: float, count: int, null: float, *, of_nothing: bool = False) -> Claim:
    """Judge a claim.

    Args:
        text: the claim.
        share: that supports it.
        count: of what.
        null: the share by chance.
        of_nothing: whether the claim is that there is no more than chance.
    """
    low, high = wilson(share, count)
    verdict: Truth = "not shown"
    if of_nothing:
        verdict = "true" if low <= null else "false"
    elif low > null:
        verdict = "true" if share >= 0.5 else "in part"
    return Claim(text, share, (low, high), null, count, verdict)


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson, 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def claims(
    table: Table,
    specs: Sequence[Feature],
    found: Found,
    best: Callable[[], TopTokens],
    vocabulary: int,
) -> list[Claim]:
    """The claims of a table.

    Args:
        table: one of the document's.
        specs: the features that were searched.
        found: their inputs; see the searches for the ways.
        best: gives the best token of every feature, from complete search.
        vocabulary: number of tokens in it.
    """
    if not specs:
        return []
    if table.method == "complete":
        return _aligned(table, specs, best())
    if table.method == "greedy":
        return _greedy(table, specs, found)
    if table.artefact:
        return _gradient(specs, found["E^+"], vocabulary)
    top = best().tokens
    right = [
        tokens[0] == top[spec.block, spec.neurons.start, 0]
        for spec, tokens in zip(specs, found[""], strict=True)
    ]
    text = "the search finds the neuron's top-activating token"
    return [claim(text, float(np.mean(right)), len(right), 1 / vocabulary)]


def _aligned(table: Table, specs: Sequence[Feature], best: TopTokens) -> list[Claim]:
    """Of all neurons, not only those of the table."""
    blocks = list(dict.fromkeys(spec.block for spec in specs))
    if len(blocks) < 2:
        return []
    tokens = best.tokens[blocks, :, :1]
    overlap = token_agreement(tokens, tokens)
    pairs = list(pairwise(range(len(blocks))))
    share = float(np.mean([overlap.matrix[pair] for pair in pairs]))
    null = float(np.mean([overlap.permuted[pair] for pair in pairs]))
    text = "the best token of a neuron is the same in neighbouring blocks of the table"
    if table.untrained:
        text = "untrained, the best tokens of a neuron are unrelated between blocks"
    return [claim(text, share, tokens.shape[1], null, of_nothing=table.untrained)]


def _greedy(table: Table, specs: Sequence[Feature], found: Found) -> list[Claim]:
    blocks = list(dict.fromkeys(spec.block for spec in specs))
    last, every = (np.array(found[way]) for way in ("last position", "all positions"))
    same = (last == every).all(axis=1)
    made = [
        claim(
            "the last position and all positions choose the same", float(same.mean()), len(same), 0
        )
    ]
    if len(blocks) < 2:
        return made
    inputs = last.reshape(len(blocks), -1, last.shape[1])
    parts = {"the first token": inputs[..., :1], "later tokens": inputs[..., 1:]}
    for name, tokens in parts.items():
        overlap = token_agreement(tokens, tokens)
        pairs = list(pairwise(range(len(blocks))))
        share = float(np.mean([overlap.matrix[pair] for pair in pairs]))
        null = float(np.mean([overlap.permuted[pair] for pair in pairs]))
        count = len(pairs) * tokens.shape[1]
        if table.untrained:
            text = f"untrained, {name} of a feature are unrelated between blocks"
            made.append(claim(text, share, count, null, of_nothing=True))
        else:
            text = f"{name} of a feature: the same in neighbouring blocks of the table"
            made.append(claim(text, share, count, null))
    return made


def _gradient(
    specs: Sequence[Feature], inputs: Sequence[Sequence[int]], vocabulary: int
) -> list[Claim]:
    """Of inputs decoded over the vocabulary, where the document decoded over the neurons."""
    made = []
    single = [
        (spec, tokens) for spec, tokens in zip(specs, inputs, strict=True) if len(spec.neurons) == 1
    ]
    own = [
        tokens[position] == spec.neurons.start
        for spec, tokens in single
        for position in spec.positions or range(len(tokens))
    ]
    if own:
        text = "the token of a neuron is the one whose id is the neuron's index"
        made.append(claim(text, float(np.mean(own)), len(own), 1 / vocabulary))
    whole = [tokens for spec, tokens in single if spec.positions is None]
    if len(whole) > 1:
        within = [a == b for tokens in whole for a, b in combinations(tokens, 2)]
        across = [a == b for x, y in combinations(whole, 2) for a in x for b in y]
        text = "all positions of an input have the same token"
        made.append(claim(text, float(np.mean(within)), len(within), float(np.mean(across))))
    return made
