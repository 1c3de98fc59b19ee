"""Several processes at one task, as `accelerate launch` starts them: each does its part."""

import atexit
import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Rank(NamedTuple):
    """Which process this is, and of how many."""

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process reports and writes the result."""
        return self.number == 0


def own_rank() -> Rank:
    """This process's rank as the launcher set it; the only process where there was no launcher."""
    return Rank(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def gathered(value: "Tensor", rank: Rank) -> list["Tensor"]:
    """All processes' values in rank order; shapes and dtypes are the same in all of them."""
    if rank.count == 1:
        return [value]
    import torch.distributed as group

    if not group.is_initialized():
        group.init_process_group("gloo")
        atexit.register(group.destroy_process_group)
    parts = [value.new_empty(value.shape) for _ in range(rank.count)]
    group.all_gather(parts, value.contiguous())
    return parts
