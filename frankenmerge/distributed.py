"""Several processes at one task, as `accelerate launch` starts them: each takes its share, the first one has the result."""

import atexit
import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Share(NamedTuple):
    """Which part of the work is this process's."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that tells and writes the result."""
        return self.rank == 0


def own_share() -> Share:
    """The share that the launcher gave this process, all of the work where there is none."""
    return Share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def gathered(value: "Tensor", share: Share) -> list["Tensor"]:
    """What every process calls this with, in their order; shapes and types are the same in all of them."""
    if share.count == 1:
        return [value]
    import torch.distributed as group

    if not group.is_initialized():
        group.init_process_group("gloo")
        atexit.register(group.destroy_process_group)
    parts = [value.new_empty(value.shape) for _ in range(share.count)]
    group.all_gather(parts, value.contiguous())
    return parts
