"""Passes of inputs through a model's blocks, one block at a time, so that each is read once."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from frankenmerge.donors.architecture import Config
from frankenmerge.donors.config import family, head_width, quantity
from frankenmerge.models.hooks import Site, attention_of, backbone, blocks_of, embedding_of
from frankenmerge.models.streaming import Donor, model_of

BATCH = 1024
ROWS = 16
"""Batches are padded to a multiple of this, and all to the same size: equal tokens give equal bits.
"""


class Call(NamedTuple):
    """The arguments of a block, besides its hidden states."""

    args: tuple
    kwargs: dict[str, Any]

    def with_cache(self, cache: Cache | None) -> "Call":
        """The same with another cache."""
        args = tuple(cache if isinstance(value, Cache) else value for value in self.args)
        return Call(
            args,
            {
                key: cache if isinstance(value, Cache) else value
                for key, value in self.kwargs.items()
            },
        )


class _Enough(Exception):
    """Ends a pass when all blocks' arguments are known."""


class _Output(Tensor):
    """Hidden states in the place of a block's output: a tensor, and its own first element.

    Some families' blocks return hidden states, others a tuple that begins with them.
    Computing with it gives plain tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    def __getitem__(self, key: Any) -> Any:
        return self if isinstance(key, int) and key == 0 else super().__getitem__(key)


class Passage:
    """Inputs that pass a donor's blocks: block after block, batch after batch.

    Every batch has the same shape, the last one padded with rows that are dropped, so that an
    input's bits do not depend on the number of others. Memory: the inputs' hidden states.
    """

    states: Tensor
    """The input of the next block, `[n, s, d]`."""

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
        """Compute the input of the first block.

        Args:
            donor: the donor whose blocks they pass.
            ids: token ids `[n, s]`.
            prefix: tokens before every input, run once for all of them if the model can cache them.
            site: whether to collect the outputs of blocks or of their attention.
            isolated: whether every block gets the input of the first one.
            batch: most inputs to run at once.
            shortcut: whether to omit queries and keys for inputs of one token without a prefix.
                Attention to a single position is the value there, whatever they are: a softmax over
                one score is exactly 1.
        """
        self.model, self.site, self.isolated = model_of(donor), site, isolated
        self.count, self.size = len(ids), min(batch, math.ceil(len(ids) / ROWS) * ROWS)
        self.alone = shortcut and ids.shape[1] == 1 and not prefix
        ids = ids.to(embedding_of(self.model).device)
        before = None
        self.before: Tensor | None = None
        self.skipped = 0
        """Positions of the prefix at the start of `states`, where it is run with every input."""
        if prefix and not caches_keys(self.model):
            self.skipped = len(prefix)
            ids = torch.cat([ids.new_tensor(prefix).expand(len(ids), -1), ids], dim=1)
        elif prefix:
            self.before, self.calls_before = enter(
                self.model, torch.tensor([prefix], device=ids.device), DynamicCache()
            )
            # Positions and masks depend on the cache's length alone.
            unknown = torch.zeros(1, 1, len(prefix), 1, device=ids.device)
            before = _cache(len(self.calls_before), unknown, unknown)
        entered = []
        for rows in ids.split(self.size):
            states, self.calls = enter(
                self.model, pad(rows, (0, 0, 0, self.size - len(rows))), before
            )
            entered.append(states[: len(rows)])
        if self.before is not None:
            # A cache of the prefix in every layer looks as if no block had been skipped.
            pairs = zip(self.calls, self.calls_before, strict=True)
            self.calls = [call if before else None for call, before in pairs]
        self.states = torch.cat(entered)

    @property
    def state(self) -> dict[str, Tensor]:
        """All that blocks change; another passage of the same inputs continues from it."""
        return {"states": self.states} | ({} if self.before is None else {"before": self.before})

    @state.setter
    def state(self, state: dict[str, Tensor]) -> None:
        self.states, self.before = state["states"], state.get("before")

    @property
    def skipped_blocks(self) -> list[int]:
        """Blocks that text alone does not pass, 1-based: their output is their input."""
        return [index for index, call in enumerate(self.calls, 1) if call is None]

    def entering(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the input of the next block in the form of `through`."""
        yield from ((rows, self.states[rows, self.skipped :]) for rows in self._batches())

    @torch.no_grad()
    def through(self, index: int, block: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        """Run the next block, 1-based.

        Yields:
            Rows and their outputs of the block, or of its attention, `[b, s, d]`. Exhaust it before
            the next block.
        """
        if (call := self.calls[index - 1]) is None:
            for rows, states in self.entering():
                yield rows, states if self.site == "block" else torch.zeros_like(states)
            return
        shared = None
        if self.before is not None and (call_before := self.calls_before[index - 1]):
            passed = DynamicCache()
            before = run_block(block, self.before, call_before.with_cache(passed))
            self.before = self.before if self.isolated else before
            layer: Any = passed.layers[index - 1]
            shared = layer.keys, layer.values
        with (
            _collecting(block if self.site == "block" else attention_of(block)) as collected,
            self._shortened(block),
        ):
            for rows in self._batches():
                states = self.states[rows]
                # The prefix's keys and values are the same for all rows.
                cache = (
                    _cache(index, *(part.expand(self.size, -1, -1, -1) for part in shared))
                    if shared
                    else None
                )
                output = run_block(
                    block,
                    pad(states, (0, 0, 0, 0, 0, self.size - len(states))),
                    call.with_cache(cache),
                )
                if not self.isolated:
                    self.states[rows] = output[: len(states)].to(self.states.device)
                yield rows, collected.pop()[: len(states), self.skipped :]

    def _batches(self) -> list[slice]:
        return [
            slice(start, min(start + self.size, self.count))
            for start in range(0, self.count, self.size)
        ]

    def _shortened(self, block: nn.Module) -> AbstractContextManager:
        config = self.model.config.to_dict()
        architecture = family(config)
        known = architecture.queries_keys or architecture.fused
        return values_only(block, config) if self.alone and known else nullcontext()


def caches_keys(model: PreTrainedModel) -> bool:
    """Whether all that a model caches of earlier positions are keys and values of attention.

    Not so if blocks have linear attention or another state, or if the family has its own cache.
    """
    library: Any = model  # generation decides by the same properties
    if library._is_stateful or not library._supports_default_dynamic_cache():
        return False
    layers = DynamicCache(config=model.config).layers
    return all(isinstance(layer, DynamicLayer) for layer in layers)


def enter(
    model: PreTrainedModel, ids: Tensor, cache: Cache | None = None
) -> tuple[Tensor, list[Call | None]]:
    """The input of the first block, and the arguments of every block; no block is run.

    A block that a pass of text alone skips, as Mllama's cross-attention, has no arguments.
    """
    entered: list[Tensor] = []
    blocks = list(blocks_of(model))
    calls: list[Call | None] = [None] * len(blocks)

    def passed(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        entered.append(hidden_states)
        calls[index] = Call(args, kwargs)
        if index == len(blocks) - 1:
            raise _Enough
        return hidden_states.as_subclass(_Output)

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(replaced(block, partial(passed, index)))
        stack.enter_context(suppress(_Enough))
        backbone(model)(input_ids=ids, use_cache=cache is not None, past_key_values=cache)
    return entered[0], calls


def leave(model: PreTrainedModel, ids: Tensor, states: Tensor) -> Tensor:
    """Apply a model's final norm and head to `states` `[b, s, d]`; returns logits."""
    output = states.as_subclass(_Output)
    with ExitStack() as stack:
        for block in blocks_of(model):
            stack.enter_context(replaced(block, lambda *_args, **_kwargs: output))
        return model(input_ids=ids, use_cache=False).logits


@contextmanager
def values_only(block: nn.Module, config: Config) -> Iterator[None]:
    """Set a block's queries and keys to zero within the context, for inputs of one position."""
    attention, architecture = attention_of(block), family(config)
    with ExitStack() as stack:
        for name in architecture.queries_keys:
            projection: Any = attention.get_submodule(name)
            stack.enter_context(replaced(projection, partial(_zeros, len(projection.weight))))
        if architecture.fused:
            projection: Any = attention.get_submodule(architecture.fused)
            transposed = not isinstance(projection, nn.Linear)  # GPT-2's
            weight = projection.weight.T if transposed else projection.weight
            outputs, head = torch.arange(len(weight), device=weight.device), head_width(config) or 0
            first = len(weight) - head * (quantity(config, "kv_heads") or 0)
            values = outputs // head % 3 == 2 if architecture.fused_by_head else outputs >= first
            bias = None if projection.bias is None else projection.bias[values]
            stack.enter_context(replaced(projection, partial(_some, weight[values], bias, values)))
        yield


def _zeros(size: int, states: Tensor) -> Tensor:
    return states.new_zeros(1).expand(*states.shape[:-1], size)


def _some(weight: Tensor, bias: Tensor | None, chosen: Tensor, states: Tensor) -> Tensor:
    """A linear map of which some outputs are computed and the others are zero."""
    outputs = states.new_zeros(*states.shape[:-1], len(chosen))
    outputs[..., chosen] = linear(states, weight, bias)
    return outputs


def run_block(block: nn.Module, states: Tensor, call: Call | None) -> Tensor:
    """The output of a block for hidden states `[b, s, d]`; of a skipped one, these themselves."""
    if call is None:
        return states
    return _first(block(states, *call.args, **call.kwargs))


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _cache(count: int, keys: Tensor, values: Tensor) -> DynamicCache:
    """A cache of `count` equal layers, to which a pass of one block appends."""
    cache, layer = DynamicCache(), DynamicLayer()
    layer.update(keys, values)
    cache.layers.extend([layer] * count)
    return cache


@contextmanager
def replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Replace a module's `forward` within the context."""
    own = module.__dict__.get("forward")  # set by accelerate
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def _collecting(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a module's outputs within the context."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda _module, _args, output: outputs.append(_first(output))
    )
    try:
        yield outputs
    finally:
        handle.remove()
