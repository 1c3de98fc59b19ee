"""Outputs of every block: block by block, and by transformers' own pass from end to end."""

import torch

from frankenmerge.models.hooks import block_outputs, forward
from frankenmerge.models.passes import Passage
from frankenmerge.models.streaming import each_block

IDS = torch.tensor([[0, 7, 30, 7, 12, 41], [5, 5, 2, 47, 19, 1], [9, 8, 7, 6, 5, 4]])


def outputs_of(donor, ids, **options) -> list[torch.Tensor]:
    """Every block's outputs, that of block 0 first, `[n, s, d]` each."""
    passage = Passage(donor, ids, **options)
    found = [torch.cat([states.clone() for _, states in passage.entering()])]
    for index, block in each_block(donor):
        found.append(torch.cat([states for _, states in passage.through(index, block)]))
    return found


@torch.no_grad()
def whole(model, ids, prefix=(), **options) -> list[torch.Tensor]:
    """The same by passes through the whole model."""
    before = torch.tensor(prefix, dtype=torch.long).expand(len(ids), -1)
    with block_outputs(model, **options) as states:
        forward(model, input_ids=torch.cat([before, ids], dim=1))
        return [state[:, len(prefix) :].clone() for state in states]


def assert_close(found, expected) -> None:
    assert len(found) == len(expected)
    for state, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            state, other, rtol=1e-4, atol=1e-5 * max(1.0, other.abs().max().item())
        )
