"""The parts of a model in memory, and its blocks' outputs, by hooks on a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from frankenmerge.donors.moving import DEPTHS
from frankenmerge.errors import fail

Site = Literal["block", "attention"]
"""Where activations are read: after a block, or at the output of its attention."""
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks. Raises FrankenmergeError for a family that has none, or several lists."""
    return model.get_submodule(blocks_path(model))  # pyright: ignore[reportReturnType]


def body_of(model: PreTrainedModel) -> nn.Module:
    """The module that holds the blocks, and what stands before and after them."""
    return model.get_submodule(blocks_path(model).rpartition(".")[0])


def blocks_path(model: PreTrainedModel) -> str:
    """The path of the only module list whose length is the config's number of blocks.

    Lists within another candidate (such as the experts of a block) do not count, and neither do the
    towers of a multimodal model. Raises FrankenmergeError for a family that has none, or several.
    """
    text = model.config.get_text_config(decoder=True)
    counts = [getattr(text, key, None) for key in DEPTHS]
    count = next((count for count in counts if count), None)
    found = next(filter(None, (_lists_of(model, count) for count in dict.fromkeys(counts))), [])
    if len(found) > 1 and text is not model.config:
        found = [name for name in found if "language_model" in name or "text_model" in name]
    if len(found) != 1:
        place, expected = f"family {model.config.model_type}", f"one list of {count} blocks"
        remedy = "use a donor of another family"
        raise fail(place, expected, ", ".join(found) or "none", remedy)
    return found[0]


def _lists_of(model: PreTrainedModel, count: int | None) -> list[str]:
    """Paths of the outermost module lists of this length."""
    found: list[str] = []
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inner:
            found.append(name)
    return found


def attention_of(block: nn.Module) -> nn.Module:
    """A block's attention, under any of the names that families use.

    Raises FrankenmergeError for a block that has none, or several.
    """
    found = {name: module for name, module in block.named_children() if name in _ATTENTION}
    if len(found) != 1:
        place, expected = type(block).__name__, f"one of {', '.join(_ATTENTION)} in every block"
        remedy = "omit --site attention, or use a donor of another family"
        raise fail(place, expected, ", ".join(found) or "none", remedy)
    return next(iter(found.values()))


def embedding_of(model: PreTrainedModel) -> Tensor:
    """The embedding matrix `[v, d]`."""
    return model.get_input_embeddings().weight  # pyright: ignore[reportReturnType]


class _Enough(Exception):
    """Ends a forward pass when the last block that is needed has run."""


@contextmanager
def block_outputs(
    model: PreTrainedModel, *, site: Site = "block", isolated: bool = False, last: int | None = None
) -> Iterator[list[Tensor]]:
    """Collect the hidden states of the latest forward pass within the context, `[b, s, d]` each.

    The list has `l + 1` entries: the input of the first block, then every block's output before any
    final norm. (The library's own `hidden_states[-1]` is taken after the final norm.)
    The output of a block that the pass skips, as Mllama's cross-attention is without images, is its
    input.

    Args:
        model: any transformer; the hooks are removed when the context ends.
        site: `block` for the residual stream after each block, `attention` for the output of its
            attention.
        isolated: whether every block gets the input of the first one, instead of its predecessor's
            output.
        last: the deepest block to run, 1-based; the pass ends after it. Run the pass with
            `forward`.
    """
    states: list[Tensor] = []
    blocks = list(blocks_of(model))[:last]

    def entering(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.clear()
        states.append(args[0] if args else kwargs["hidden_states"])

    def refeeding(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (
            ((states[0], *args[1:]), kwargs)
            if args
            else (args, kwargs | {"hidden_states": states[0]})
        )

    def padded(count: int) -> None:
        # What a block that the pass skips would have put out: its input.
        skipped = states[:1] if isolated else states[-1:]
        states.extend(skipped * (count - len(states)))

    def leaving(place: int, _module: nn.Module, _args: tuple, output: Any) -> None:
        padded(place)
        states.append(output if isinstance(output, Tensor) else output[0])

    def finishing(_module: nn.Module, _args: tuple, _output: Any) -> None:
        padded(len(blocks) + 1)

    def stopping(_module: nn.Module, _args: tuple, _output: Any) -> None:
        raise _Enough

    handles = [blocks[0].register_forward_pre_hook(entering, with_kwargs=True)]
    if isolated:
        handles += [
            block.register_forward_pre_hook(refeeding, with_kwargs=True) for block in blocks[1:]
        ]
    sites = blocks if site == "block" else [attention_of(block) for block in blocks]
    handles += [
        module.register_forward_hook(partial(leaving, place))
        for place, module in enumerate(sites, 1)
    ]
    handles.append(body_of(model).register_forward_hook(finishing))
    if last is not None:
        handles.append(blocks[-1].register_forward_hook(stopping))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def forward(model: PreTrainedModel, **inputs: Any) -> None:
    """Run the model without its head; ends early if `block_outputs` needs only some blocks.

    Keys and values are cached only with `past_key_values=DynamicCache()`: the pass continues after
    the cached positions, and appends to the cache for the blocks that it reaches.
    """
    try:
        backbone(model)(**inputs, use_cache="past_key_values" in inputs)
    except _Enough:
        pass


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head, for passes that need no logits.

    A wrapper whose head is within its language model, as Llama 4's, is run as it is.
    """
    return getattr(model, model.base_model_prefix, model)
