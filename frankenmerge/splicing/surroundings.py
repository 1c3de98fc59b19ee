"""What reads the parameters outside a model's blocks: parts before, within or after these.

A model without weights is run once, on the meta device, where a pass has shapes and a graph of
gradients but no values. The stream is cut around every block, so the graph says from which
parameters its input comes, what else its blocks get, and what the logits are computed from.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from frankenmerge.donors.architecture import Config
from frankenmerge.models.blank import blank_model
from frankenmerge.models.hooks import blocks_path

_TOKENS = 8


class _WithoutValues(TorchDispatchMode):
    """Records which tensors are used, and answers questions about values with yes or one.

    Meta tensors have no values. Models ask whether nothing is masked, or whether every position is
    counted from zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.used.update(map(id, _tensors((args, kwargs))))
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **kwargs)


def readers(config: Config) -> dict[str, frozenset[str]] | None:
    """By which parts each parameter outside the blocks is read: `before`, `blocks`, `after`.

    None for a model that cannot be run without weights. Parameters that nothing reads have no part.
    Those that are read outside the graph of gradients may be read by the blocks.
    """
    for dtype in (torch.bfloat16, torch.float32):  # experts want the one, some old models the other
        try:
            return _readers(blank_model(config, dtype).to("meta").eval())
        except Exception:  # whatever a pass without values makes code of any family raise
            continue
    return None


def _readers(model: PreTrainedModel) -> dict[str, frozenset[str]]:
    prefix = blocks_path(model)
    blocks: Any = model.get_submodule(prefix)
    outside = {
        name: parameter.requires_grad_(True)
        for name, parameter in model.named_parameters()
        if not name.startswith(f"{prefix}.")
    }
    entering: list[Tensor] = []
    besides: list[Tensor] = []

    def enter(_block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        stream = args[0] if args else kwargs["hidden_states"]
        if not entering:
            entering.append(stream)
        others = {key: value for key, value in kwargs.items() if value is not stream}
        besides.extend(_tensors((args[1:], others)))
        if args:
            return (stream.detach(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": stream.detach()}

    def leave(_block: nn.Module, _args: tuple, output: Any) -> Any:
        return output.detach() if isinstance(output, Tensor) else (output[0].detach(), *output[1:])

    for block in blocks:
        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.register_forward_hook(leave)
    ids = torch.zeros((1, _TOKENS), dtype=torch.long, device="meta")
    with torch.enable_grad(), _WithoutValues() as record:
        logits = model(input_ids=ids, use_cache=False).logits
    parts = {"before": entering, "blocks": besides, "after": [logits]}
    read = {part: _sources(tensors, outside) for part, tensors in parts.items()}
    read["blocks"] |= {
        name
        for name, parameter in outside.items()
        if id(parameter) in record.used and not any(name in names for names in read.values())
    }
    return {
        name: frozenset(part for part, names in read.items() if name in names) for name in outside
    }


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
