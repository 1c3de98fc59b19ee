"""Donors whose blocks are read from disk one at a time, while they run.

Memory: one block. A streamed donor gives the same bits as one that is loaded whole.
"""

import ctypes
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from frankenmerge.donors import checkpoint as stored
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import fail
from frankenmerge.models.blank import blank_model
from frankenmerge.models.hooks import blocks_of, body_of
from frankenmerge.models.loading import explained, one_device
from frankenmerge.storage.dtypes import torch_dtype


class Streamed(NamedTuple):
    """A donor whose blocks are read from disk when they are run."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    """Only the modules before the first block have their weights."""
    device: torch.device
    dtype: torch.dtype


Donor = PreTrainedModel | Streamed


def stream_model(
    checkpoint: Checkpoint,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    embedding: Tensor | None = None,
) -> Streamed:
    """Open a donor to be run block by block; reads the modules before the first block.

    Args:
        checkpoint: what to run; only its safetensors are read and none of its code runs.
        dtype: `float32`, `bfloat16` or `float16`, to compute in.
        device: a torch device, on which the inputs' hidden states and one block must fit; `auto`
            for an accelerator, if there is one.
        embedding: in the place of its embedding matrix, which is then not read; token ids are rows
            of it.

    Raises:
        FrankenmergeError: if its tensors do not fill the model exactly.
    """
    model = _without_weights(checkpoint, torch_dtype(dtype))
    donor = Streamed(checkpoint, model, one_device(device), torch_dtype(dtype))
    for name, constant in list(model.named_buffers()):
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, constant.to(donor.device))
    if embedding is not None:
        table: Any = model.get_input_embeddings()
        table.weight = nn.Parameter(embedding.to(donor.device, donor.dtype), requires_grad=False)
        table.padding_idx = None  # another row here
        return donor
    inner = body_of(model)
    for canonical, name in checkpoint.by_role["embedding", None].items():
        path, _, parameter = canonical.removeprefix(checkpoint.architecture.root).rpartition(".")
        _fill(donor, inner.get_submodule(path), {parameter: name})
    return donor


def streamable(checkpoint: Checkpoint) -> bool:
    """Whether blocks have the same tensors on disk and in memory.

    Packed experts and quantised weights do not.
    """
    if checkpoint.quantisation:
        return False
    blocks = list(enumerate(blocks_of(_without_weights(checkpoint, torch.float32))))
    named = all(
        set(block.state_dict()) == set(_tensors(checkpoint, index)) for index, block in blocks
    )
    return named and not any(list(block.buffers()) for _, block in blocks)


def _without_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose weights take no memory.

    Its constants, such as rotary frequencies, are those that the library computes; the checkpoint
    has no tensors for them.
    """
    place = str(checkpoint.path / "config.json")
    with explained(place, "a config"):
        return blank_model(checkpoint.config, dtype).eval().requires_grad_(False)


def model_of(donor: Donor) -> PreTrainedModel:
    """The model, with or without its blocks' weights."""
    return donor.model if isinstance(donor, Streamed) else donor


def each_block(donor: Donor, first: int = 1) -> Iterator[tuple[int, nn.Module]]:
    """Yield the donor's blocks, 1-based, from `first`; streamed ones are freed after use."""
    for index, block in list(enumerate(blocks_of(model_of(donor))))[first - 1 :]:
        if not isinstance(donor, Streamed):
            yield index + 1, block
            continue
        _prefetch(donor.checkpoint, index + 1)
        _fill(donor, block, _tensors(donor.checkpoint, index))
        try:
            yield index + 1, block
        finally:
            block.load_state_dict(
                {name: value.to("meta") for name, value in block.state_dict().items()}, assign=True
            )
            _give_back()


def _give_back() -> None:
    """Return freed memory to the system, where the C library is glibc.

    It keeps what was freed between smaller allocations, which may add up to several blocks.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _tensors(checkpoint: Checkpoint, index: int) -> dict[str, str]:
    """The tensors of a block: names in the file by names in the block."""
    architecture = checkpoint.architecture
    prefix = architecture.root + architecture.block
    return {
        canonical.removeprefix(prefix): name
        for canonical, name in checkpoint.by_role.get(("block", index), {}).items()
    }


def _fill(donor: Streamed, module: nn.Module, names: Mapping[str, str]) -> None:
    """Load tensors into a module: `names` maps names in the module to names in the checkpoint."""
    values = {
        name: read_tensor(donor.checkpoint.tensors[stored]).to(donor.device, donor.dtype)
        for name, stored in names.items()
    }
    try:
        module.load_state_dict(values, strict=True, assign=True)
    except RuntimeError as error:
        found = " ".join(str(error).split())
        raise fail(
            str(donor.checkpoint.path),
            "tensors that fill the model exactly",
            found,
            "use a complete checkpoint",
        ) from error
    module.requires_grad_(False)


def read_tensor(tensor: stored.Tensor) -> Tensor:
    """A tensor's values. They are read, not mapped: they count once and are freed at once."""
    # Aligned as every tensor: the last bits of products depend on alignment.
    content = torch.empty(tensor.bytes, dtype=torch.uint8)
    buffer: Any = content.numpy()
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        if file.readinto(buffer) != tensor.bytes:
            raise fail(
                str(tensor.file),
                f"{tensor.bytes:,} bytes from offset {tensor.start:,}",
                "fewer",
                "download the shard again",
            )
    return content.view(torch_dtype(tensor.dtype)).view(tensor.shape)


def _prefetch(checkpoint: Checkpoint, index: int) -> None:
    """Ask the system to read the next block into its page cache while this one runs."""
    if not hasattr(os, "posix_fadvise"):
        return
    for name in _tensors(checkpoint, index).values():
        tensor = checkpoint.tensors[name]
        with tensor.file.open("rb") as file:
            os.posix_fadvise(file.fileno(), tensor.start, tensor.bytes, os.POSIX_FADV_WILLNEED)
