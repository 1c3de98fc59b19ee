"""Which of its donors' features a merged model preserves.

A feature is a neuron after a block and its top-activating token (complete search). It is preserved
if the same neuron after the corresponding block of the merged model has the same token.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from frankenmerge.artefacts.atlas import TopTokens
from frankenmerge.artefacts.recipe import Block
from frankenmerge.artefacts.token_overlap import token_agreement


class KeptBlock(NamedTuple):
    """The features of a donor's block in a merged model."""

    block: int
    """1-based, of the merged model."""
    donor_block: int
    """0-based, of the donor."""
    kept: float
    """The share of the neurons whose feature is preserved."""


class Retention(NamedTuple):
    """The features of a donor in a merged model."""

    donor: str
    blocks: list[KeptBlock]
    kept: float
    """The mean over the blocks from this donor."""
    chance: float
    """The share under permuted neurons: how often any two neurons have the same token."""


def retained(
    merged: TopTokens, donors: Mapping[str, TopTokens], blocks: Sequence[Block]
) -> list[Retention]:
    """Compare a merged model's features, block by block, with those of its donors' blocks.

    Args:
        merged: complete search in the merged model.
        donors: complete search in each donor, of the same width and the same tokens.
        blocks: where each block of the merged model is from; those of other donors are ignored.
    """
    result = []
    for name, top in donors.items():
        own = [
            (number, block.index) for number, block in enumerate(blocks, 1) if block.model == name
        ]
        found = [
            token_agreement(
                merged.tokens[number : number + 1, :, :1], top.tokens[index + 1 : index + 2, :, :1]
            )
            for number, index in own
        ]
        if found:
            kept = [
                KeptBlock(number, index, float(agreed.matrix[0, 0]))
                for (number, index), agreed in zip(own, found, strict=True)
            ]
            chance = float(np.mean([agreed.permuted[0, 0] for agreed in found]))
            result.append(
                Retention(name, kept, float(np.mean([block.kept for block in kept])), chance)
            )
    return result
