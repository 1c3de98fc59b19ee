"""Block by block: all inputs pass a block before the next one is needed, so that every weight is read once.

Memory: one block, and the inputs' hidden states. A model that is in memory goes the same way as one
that is read from disk while it runs, and gives the same bits.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from frankenmerge.donors import checkpoint as stored
from frankenmerge.donors.architecture import Config
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import block_kind, family, head_width, quantity, spliced_config
from frankenmerge.errors import fail
from frankenmerge.models.hooks import Site, attention_of, backbone, blocks_of, embedding_of
from frankenmerge.models.loading import one_device
from frankenmerge.storage.dtypes import torch_dtype

BATCH = 1024
ROWS = 16
"""Batches are filled up to a multiple of this, and all to the same size where there are several:
equal tokens give equal bits.
"""


class Streamed(NamedTuple):
    """A donor whose blocks are read from disk when their turn comes."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    """What comes before the first block has its weights; the blocks and what follows them have
    none.
    """
    device: torch.device
    dtype: torch.dtype


Donor = PreTrainedModel | Streamed


def stream_model(
    checkpoint: Checkpoint, *, dtype: str = "float32", device: str = "cpu"
) -> Streamed:
    """Open a donor to be run block by block; reads what comes before the first block.

    Args:
        checkpoint: what to run; only its safetensors are read and none of its code runs.
        dtype: `float32`, `bfloat16` or `float16`, to compute in.
        device: a torch device, on which the inputs' hidden states and one block must fit; `auto`
            for an accelerator where there is one.

    Raises:
        FrankenmergeError: when its tensors do not fill the model exactly.
    """
    model = _without_weights(checkpoint.config, torch_dtype(dtype))
    donor = Streamed(checkpoint, model, one_device(device), torch_dtype(dtype))
    # Constants such as rotary frequencies are no tensors of the checkpoint: they are made with a
    # model that has one block of each kind and hardly any vocabulary, which takes no memory to
    # speak of.
    kinds = {
        block_kind(checkpoint.config, index): index for index in reversed(range(checkpoint.blocks))
    }
    config = spliced_config(
        checkpoint.config, [(checkpoint.config, index) for index in kinds.values()], tied=False
    )
    nothing = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    small: dict[str, Any] = {**config, checkpoint.architecture.keys.vocabulary: 1, **nothing}
    with init_empty_weights(include_buffers=False):
        made = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**small), dtype=torch_dtype(dtype)
        )
    constants = dict(made.named_buffers())
    for name, _ in list(model.named_buffers()):
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, constants[name].to(donor.device))
    inner = backbone(model)
    for canonical, name in checkpoint.by_role["embedding", None].items():
        path, _, parameter = canonical.removeprefix(checkpoint.architecture.root).rpartition(".")
        _fill(donor, inner.get_submodule(path), {parameter: name})
    return donor


def streamable(checkpoint: Checkpoint) -> bool:
    """Whether blocks have the same tensors on disk and in memory (packed experts do not)."""
    blocks = list(enumerate(blocks_of(_without_weights(checkpoint.config, torch.float32))))
    named = all(
        set(block.state_dict()) == set(_tensors(checkpoint, index)) for index, block in blocks
    )
    return named and not any(list(block.buffers()) for _, block in blocks)


def _without_weights(config: Config, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        return (
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
            .eval()
            .requires_grad_(False)
        )


def model_of(donor: Donor) -> PreTrainedModel:
    """The model, with or without its blocks' weights."""
    return donor.model if isinstance(donor, Streamed) else donor


def each_block(donor: Donor, first: int = 1) -> Iterator[tuple[int, nn.Module]]:
    """The donor's blocks in turn, 1-based, from `first` on; a streamed one has its weights until the next is asked for."""
    for index, block in list(enumerate(blocks_of(model_of(donor))))[first - 1 :]:
        if not isinstance(donor, Streamed):
            yield index + 1, block
            continue
        _announce(donor.checkpoint, index + 1)
        _fill(donor, block, _tensors(donor.checkpoint, index))
        try:
            yield index + 1, block
        finally:
            block.load_state_dict(
                {name: value.to("meta") for name, value in block.state_dict().items()}, assign=True
            )


def _tensors(checkpoint: Checkpoint, index: int) -> dict[str, str]:
    """The tensors of a block: names in the file by names in the block."""
    architecture = checkpoint.architecture
    prefix = architecture.root + architecture.block
    return {
        canonical.removeprefix(prefix): name
        for canonical, name in checkpoint.by_role.get(("block", index), {}).items()
    }


def _fill(donor: Streamed, module: nn.Module, names: Mapping[str, str]) -> None:
    """Give a module the tensors of the checkpoint that `names` names, by their names in the module."""
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
    """A tensor's values; read, not mapped, so that they count once and are freed at once."""
    content = torch.empty(
        tensor.bytes, dtype=torch.uint8
    )  # aligned as every tensor is: products depend on that in their last bits
    buffer: Any = content.numpy()
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        if file.readinto(buffer) != tensor.bytes:
            raise fail(
                str(tensor.file),
                f"{tensor.bytes:,} bytes from {tensor.start:,} on",
                "fewer",
                "download the shard again",
            )
    return content.view(torch_dtype(tensor.dtype)).view(tensor.shape)


def _announce(checkpoint: Checkpoint, index: int) -> None:
    """Let the system read the next block ahead into its page cache while this one runs."""
    if not hasattr(os, "posix_fadvise"):
        return
    for name in _tensors(checkpoint, index).values():
        tensor = checkpoint.tensors[name]
        with tensor.file.open("rb") as file:
            os.posix_fadvise(file.fileno(), tensor.start, tensor.bytes, os.POSIX_FADV_WILLNEED)


class Call(NamedTuple):
    """What a block is called with, besides its hidden states."""

    args: tuple
    kwargs: dict[str, Any]

    def behind(self, cache: Cache | None) -> "Call":
        """The same with `cache` in the place of the cache."""
        args = tuple(cache if isinstance(value, Cache) else value for value in self.args)
        return Call(
            args,
            {
                key: cache if isinstance(value, Cache) else value
                for key, value in self.kwargs.items()
            },
        )


class _Enough(Exception):
    """Ends a pass that was for the blocks' calls alone."""


class Passage:
    """Inputs on their way through a donor's blocks: block after block, batch after batch.

    Every batch has the same shape, the last filled up with rows that are dropped, so that an
    input's bits do not depend on how many others there are.
    """

    states: Tensor
    """What the next block is given, `[n, s, d]`."""

    @torch.no_grad()
    def __init__(
        self,
        donor: Donor,
        ids: Tensor,
        *,
        prefix: Sequence[int] = (),
        site: Site = "block",
        isolated: bool = False,
        batch: int = BATCH,
        shortcut: bool = True,
    ) -> None:
        """Take the inputs to the first block.

        Args:
            donor: whose blocks they pass.
            ids: token ids `[n, s]`.
            prefix: tokens before every input, run once for all of them.
            site: what is collected, the blocks' outputs or their attention's.
            isolated: whether every block is given what enters the first one.
            batch: the most inputs that are run at once.
            shortcut: whether, for inputs of one token without a prefix, queries and keys are left
                out. Attention to a single position is the value there whatever they are: a softmax
                over one score is exactly 1.
        """
        self.model, self.site, self.isolated = model_of(donor), site, isolated
        self.count, self.size = len(ids), min(batch, math.ceil(len(ids) / ROWS) * ROWS)
        self.alone = shortcut and ids.shape[1] == 1 and not prefix
        ids = ids.to(embedding_of(self.model).device)
        held = None
        self.before: Tensor | None = None
        if prefix:
            self.before, self.calls_before = enter(
                self.model, torch.tensor([prefix], device=ids.device), DynamicCache()
            )
            unknown = torch.zeros(
                1, 1, len(prefix), 1, device=ids.device
            )  # positions and masks come from its length alone
            held = _cache(len(self.calls_before), unknown, unknown)
        entered = []
        for rows in ids.split(self.size):
            states, self.calls = enter(
                self.model, pad(rows, (0, 0, 0, self.size - len(rows))), held
            )
            entered.append(states[: len(rows)])
        self.states = torch.cat(entered)

    @property
    def state(self) -> dict[str, Tensor]:
        """All that changes on the way: given to another passage of the same inputs, it goes on from here."""
        return {"states": self.states} | ({} if self.before is None else {"before": self.before})

    @state.setter
    def state(self, state: dict[str, Tensor]) -> None:
        self.states, self.before = state["states"], state.get("before")

    def entering(self) -> Iterator[tuple[slice, Tensor]]:
        """What enters the first block, as `through` gives what leaves a block; to be asked for before any block."""
        yield from ((rows, self.states[rows]) for rows in self._batches())

    @torch.no_grad()
    def through(self, index: int, block: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        """Take the inputs through a block, 1-based, the one behind the last they passed.

        Yields:
            Rows and what the block, or its attention, makes of them, `[b, s, d]`. To be exhausted
            before the next block.
        """
        shared = None
        if self.before is not None:
            passed = DynamicCache()
            before = run_block(block, self.before, self.calls_before[index - 1].behind(passed))
            self.before = self.before if self.isolated else before
            layer: Any = passed.layers[index - 1]
            shared = layer.keys, layer.values
        with (
            _collecting(block if self.site == "block" else attention_of(block)) as collected,
            self._shortened(block),
        ):
            for rows in self._batches():
                states = self.states[rows]
                # The prefix's keys and values are the same for all rows: expanded, never computed
                # again.
                cache = (
                    _cache(index, *(part.expand(self.size, -1, -1, -1) for part in shared))
                    if shared
                    else None
                )
                call = self.calls[index - 1].behind(cache)
                output = run_block(
                    block, pad(states, (0, 0, 0, 0, 0, self.size - len(states))), call
                )
                if not self.isolated:
                    self.states[rows] = output[: len(states)].to(self.states.device)
                yield rows, collected.pop()[: len(states)]

    def _batches(self) -> list[slice]:
        return [
            slice(start, min(start + self.size, self.count))
            for start in range(0, self.count, self.size)
        ]

    def _shortened(self, block: nn.Module) -> AbstractContextManager:
        return values_only(block, self.model.config.to_dict()) if self.alone else nullcontext()


def enter(
    model: PreTrainedModel, ids: Tensor, cache: Cache | None = None
) -> tuple[Tensor, list[Call]]:
    """What enters the first block, and what every block would be called with: a pass in which no block runs."""
    entered, calls = [], []
    blocks = list(blocks_of(model))

    def passed(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        entered.append(hidden_states)
        calls.append(Call(args, kwargs))
        if len(calls) == len(blocks):
            raise _Enough
        return hidden_states

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_replaced(block, passed))
        stack.enter_context(suppress(_Enough))
        backbone(model)(input_ids=ids, use_cache=cache is not None, past_key_values=cache)
    return entered[0], calls


def leave(model: PreTrainedModel, ids: Tensor, states: Tensor) -> Tensor:
    """The logits that a model's final norm and head make of `states` `[b, s, d]`, as if its last block had left them."""
    with ExitStack() as stack:
        for block in blocks_of(model):
            stack.enter_context(_replaced(block, lambda *_args, **_kwargs: states))
        return model(input_ids=ids, use_cache=False).logits


@contextmanager
def values_only(block: nn.Module, config: Config) -> Iterator[None]:
    """Leave out a block's queries and keys, for inputs of one position, while the context lasts: they are taken as zero."""
    attention, architecture = attention_of(block), family(config)
    with ExitStack() as stack:
        for name in architecture.queries_keys:
            projection: Any = attention.get_submodule(name)
            stack.enter_context(_replaced(projection, partial(_zeros, len(projection.weight))))
        if architecture.fused:
            projection: Any = attention.get_submodule(architecture.fused)
            weight = (
                projection.weight if isinstance(projection, nn.Linear) else projection.weight.T
            )  # GPT-2's is transposed
            outputs, head = torch.arange(len(weight), device=weight.device), head_width(config) or 0
            behind = len(weight) - head * (quantity(config, "kv_heads") or 0)
            values = outputs // head % 3 == 2 if architecture.fused_by_head else outputs >= behind
            bias = None if projection.bias is None else projection.bias[values]
            stack.enter_context(_replaced(projection, partial(_some, weight[values], bias, values)))
        yield


def _zeros(size: int, states: Tensor) -> Tensor:
    return states.new_zeros(1).expand(*states.shape[:-1], size)


def _some(weight: Tensor, bias: Tensor | None, chosen: Tensor, states: Tensor) -> Tensor:
    """A linear map of which some outputs are computed, the others zero."""
    outputs = states.new_zeros(*states.shape[:-1], len(chosen))
    outputs[..., chosen] = linear(states, weight, bias)
    return outputs


def run_block(block: nn.Module, states: Tensor, call: Call) -> Tensor:
    """What a block makes of hidden states `[b, s, d]`."""
    return _first(block(states, *call.args, **call.kwargs))


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _cache(count: int, keys: Tensor, values: Tensor) -> DynamicCache:
    """A cache whose `count` layers all hold the same, for a pass of one block to append to."""
    cache, layer = DynamicCache(), DynamicLayer()
    layer.update(keys, values)
    cache.layers.extend([layer] * count)
    return cache


@contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let a module compute `forward` while the context lasts."""
    own = module.__dict__.get("forward")  # where accelerate has wrapped it
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def _collecting(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a module's outputs while the context lasts."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda _module, _args, output: outputs.append(_first(output))
    )
    try:
        yield outputs
    finally:
        handle.remove()
