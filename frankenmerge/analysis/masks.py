"""Tokens without information about what a donor has learned: special and untrained ones."""

import torch

from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import fail
from frankenmerge.models.loading import load_tokenizer


def meaningless_tokens(checkpoint: Checkpoint, embedding: torch.Tensor) -> list[int]:
    """Token ids to leave out of a search, ascending.

    They are the tokenizer's special tokens, the ids that it assigns to no text (rows that only pad
    the matrix), and those whose embedding equals another one bit for bit: training moves every row
    in use by its own gradient, so equal rows were never in use. Untrained rows that were
    initialised differently are not recognised.

    Args:
        checkpoint: the donor, for its tokenizer.
        embedding: the donor's embedding matrix `[v, d]`.

    Raises:
        FrankenmergeError: if no token would be left.
    """
    tokenizer = load_tokenizer(checkpoint)
    special = {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    } | set(tokenizer.all_special_ids)
    nameless = set(range(len(tokenizer), len(embedding)))
    _, groups, sizes = (
        embedding.detach().cpu().unique(dim=0, return_inverse=True, return_counts=True)
    )
    doubled = (sizes[groups] > 1).nonzero()[:, 0].tolist()
    left_out = sorted(
        {index for index in special if index < len(embedding)} | nameless | set(doubled)
    )
    if len(left_out) == len(embedding):
        raise fail(
            checkpoint.name,
            "tokens that are neither special nor equal to others",
            "none",
            "search without a mask",
        )
    return left_out
