"""How much memory healing takes, from shapes alone."""

import os
from collections.abc import Mapping
from typing import NamedTuple

from frankenmerge.errors import fail
from frankenmerge.healing.scopes import SCOPES, Scope

PARAMETER = 4
"""Bytes of a parameter that is trained: float32."""


class Sizes(NamedTuple):
    """What the memory depends on."""

    weights: int
    """Bytes of the tensors that are in memory and not trained: donors, and what was computed."""
    trained: Mapping[Scope, int]
    """Parameters that each scope trains, on the device that has most of them."""
    width: int
    blocks: int
    inner: int
    vocabulary: int
    rows: int
    """Rows in one pass."""
    length: int
    """Tokens in a row."""
    teachers: int
    """How many run."""
    probabilities: int = 0
    """Bytes of the teachers' and donors' probabilities that are computed once."""
    devices: int = 1
    """Over which the models of a process are spread."""


class Memory(NamedTuple):
    """Bytes of one process, by use; of one of its devices, where there are several."""

    weights: int
    trained: int
    """The trained parameters in float32, and those of the best check."""
    gradients: int
    optimiser: int
    activations: int
    """An estimate: the inputs of every map that the backward pass needs."""
    logits: int
    """Of the model and its gradient, and of each teacher."""
    probabilities: int
    """Kept from the beginning on."""

    @property
    def total(self) -> int:
        """All together."""
        return sum(self)


def memory_of(
    sizes: Sizes, scope: Scope, *, checkpointing: bool = False, offload: bool = False
) -> Memory:
    """The memory of one process; under `accelerate launch` every process takes as much.

    With several devices that of one: blocks are spread evenly, and logits are on one device. With
    `offload` that of the accelerator: the parameters and their gradient, and activations of one
    block at a time.
    """
    trained = PARAMETER * sizes.trained[scope]
    tokens = sizes.rows * sizes.length
    per_block = sizes.width if checkpointing else 10 * sizes.width + 4 * sizes.inner
    return Memory(
        weights=-(-sizes.weights // sizes.devices),
        trained=trained if offload else 2 * trained,
        gradients=trained,
        optimiser=0 if offload else 2 * trained,
        activations=4 * tokens * (1 if offload else -(-sizes.blocks // sizes.devices)) * per_block,
        logits=4 * tokens * sizes.vocabulary * (3 + 2 * sizes.teachers),
        probabilities=sizes.probabilities,
    )


def check_memory(
    sizes: Sizes,
    scope: Scope,
    available: int | None,
    *,
    checkpointing: bool = False,
    offload: bool = False,
) -> Memory:
    """The plan of a scope; raises FrankenmergeError, with a scope that fits, if it does not."""
    saving = {"checkpointing": checkpointing, "offload": offload}
    plan = memory_of(sizes, scope, **saving)
    if available is None or plan.total <= available:
        return plan
    plans = {each: memory_of(sizes, each, **saving).total for each in SCOPES}
    smaller: list[Scope] = [
        each for each in SCOPES if plans[each] <= available and sizes.trained[each]
    ]
    remedy = "compute in --dtype bfloat16, on a larger device, or on several with --device auto"
    if smaller:
        chosen = max(smaller, key=lambda each: sizes.trained[each])
        remedy = f"--scope {chosen} fits, with {_size(plans[chosen])}"
    elif not checkpointing and (
        memory_of(sizes, scope, checkpointing=True, offload=offload).total <= available
    ):
        remedy = "--checkpointing makes it fit"
    each = f" on each of {sizes.devices} devices" if sizes.devices > 1 else ""
    expected = f"{_size(plan.total)} of memory{each}"
    raise fail(f"--scope {scope}", expected, f"{_size(available)} available", remedy)


def available_memory(device: str) -> int | None:
    """Bytes that are free on a device, with `auto` on every GPU; None where that is not known."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if device == "auto":
        import torch

        count = torch.cuda.device_count()
        return min((torch.cuda.mem_get_info(number)[0] for number in range(count)), default=None)
    if device != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
