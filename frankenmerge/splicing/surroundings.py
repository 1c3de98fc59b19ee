"""What reads the parameters outside a model's blocks: parts before, within or after these.

A model without weights is run once, on the meta device, where a pass has shapes and a graph of
gradients but no values. The stream is cut around every block, so the graph says from which
parameters its input comes, what else its blocks get, and what the logits are computed from.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from frankenmerge.donors.architecture import Config
from frankenmerge.models.blank import blank_model
from frankenmerge.models.hooks import blocks_path

_TOKENS = 8


class _WithoutValues(TorchDispatchMode):
    """Records tensors used outside the graph of gradients, and those that blocks make.

    Meta tensors have no values. Models ask whether nothing is masked, or whether every position is
    counted from zero: the answer is yes, or one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden: set[int] = set()
        self.within = False
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or func is torch.ops.aten.detach.default:
            self.hidden.update(map(id, _tensors((args, kwargs))))
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        result = func(*args, **kwargs)
        if self.within:
            self.made |= {id(tensor): tensor for tensor in _tensors(result)}
        return result


class Surroundings(NamedTuple):
    """What is around a model's blocks."""

    read: dict[str, frozenset[str]]
    """By which parts each parameter outside the blocks is read: `before`, `blocks`, `after`.

    Parameters that nothing reads have no part. Those that are read outside the graph of gradients
    may be read by the blocks.
    """
    shared: bool
    """Whether a block gets from an earlier one more than the stream, such as keys and values."""


def surroundings(config: Config) -> Surroundings | None:
    """What is around the blocks of a config's model; None for one that cannot be run blank."""
    for dtype in (torch.bfloat16, torch.float32):  # experts want the one, some old models the other
        try:
            model: Any = blank_model(config, dtype)
            return _surroundings(model.to("meta").eval())
        except Exception:  # whatever a pass without values makes code of any family raise
            continue
    return None


def _surroundings(model: PreTrainedModel) -> Surroundings:
    prefix = blocks_path(model)
    blocks: Any = model.get_submodule(prefix)
    outside = {
        name: parameter.requires_grad_(True)
        for name, parameter in model.named_parameters()
        if not name.startswith(f"{prefix}.")
    }
    entering: list[Tensor] = []
    besides: list[Tensor] = []
    record = _WithoutValues()

    def enter(_block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        stream = args[0] if args else kwargs["hidden_states"]
        if not entering:
            entering.append(stream)
        others = {key: value for key, value in kwargs.items() if value is not stream}
        besides.extend(_tensors((args[1:], others)))
        cut = stream.detach()
        record.within = True
        if args:
            return (cut, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": cut}

    def leave(_block: nn.Module, _args: tuple, output: Any) -> Any:
        record.within = False
        return output.detach() if isinstance(output, Tensor) else (output[0].detach(), *output[1:])

    for block in blocks:
        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.register_forward_hook(leave)
    ids = torch.zeros((1, _TOKENS), dtype=torch.long, device="meta")
    with torch.enable_grad(), record:
        logits = model(input_ids=ids, use_cache=False).logits
    parts = {"before": entering, "blocks": besides, "after": [logits]}
    read = {part: _sources(tensors, outside) for part, tensors in parts.items()}
    read["blocks"] |= {
        name
        for name, parameter in outside.items()
        if id(parameter) in record.hidden and not any(name in names for names in read.values())
    }
    parts_of = {
        name: frozenset(part for part, names in read.items() if name in names) for name in outside
    }
    return Surroundings(parts_of, any(id(tensor) in record.made for tensor in besides))


def _sources(outputs: Collection[Tensor], parameters: Mapping[str, Tensor]) -> set[str]:
    """The names of the parameters that any of these tensors is computed from."""
    asked = [output for output in outputs if output.requires_grad]
    if not asked:
        return set()
    gradients = torch.autograd.grad(
        asked,
        list(parameters.values()),
        [torch.empty_like(output) for output in asked],
        allow_unused=True,
        retain_graph=True,
    )
    return {name for name, found in zip(parameters, gradients, strict=True) if found is not None}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
