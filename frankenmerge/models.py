"""Models in memory: the only place that loads one, runs its blocks, or stacks blocks of several without writing them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from frankenmerge.architectures import FAMILIES, Architecture
from frankenmerge.checkpoint import Checkpoint
from frankenmerge.errors import fail
from frankenmerge.gauge import Turn, turned_all
from frankenmerge.recipe import Recipe
from frankenmerge.splice import result_config, untied, validated

Site = Literal["block", "attention"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    max_memory: Mapping[int | str, str] | None = None,
    offload: Path | None = None,
) -> PreTrainedModel:
    """Load a checkpoint, ready to run.

    Args:
        checkpoint: what to load; only its safetensors are read and none of its code runs.
        dtype: `float32`, `bfloat16` or `float16`.
        device: a torch device, or `auto` to let accelerate spread the model over what there is.
        max_memory: with `auto`, how much of each device (`0`, `1`, ..., `cpu`) may be used, such as `20GiB`.
        offload: with `auto`, a folder for the weights that fit on no device; they are read at every pass.

    Raises:
        FrankenmergeError: when the weights do not fill the model exactly, or do not fit.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if device != "auto":
        one_device(device)
        if max_memory or offload:
            raise fail(f"device {device}", "auto, where memory is shared out", device, "give --device auto as well")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=DTYPES[dtype],
            device_map=device,
            max_memory=dict(max_memory) if max_memory else None,
            offload_folder=offload,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except (ValueError, RuntimeError) as error:
        if not max_memory:
            raise
        raise fail("memory of each device", "devices that are there, as 0=20GiB", str(error), "mend --max-memory") from error
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[kind])):
            found = f"{kind.replace('_', ' ')}: {', '.join(names[:5])}"
            raise fail(str(checkpoint.path), "weights that fill the model exactly", found, "use a complete checkpoint")
    if embedding_of(model).is_meta:
        raise fail(str(checkpoint.path), "room for the embedding on a device", "less", "raise --max-memory")
    return model.eval()


def one_device(device: str) -> torch.device:
    """A device by its name; `auto` is an accelerator where there is one. Raises FrankenmergeError for one that is not there."""
    if device == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise fail(f"device {device}", "a torch device that is there, or auto", str(error), "choose another --device") from error


def untrained_model(checkpoint: Checkpoint, seed: int, *, device: str = "cpu") -> PreTrainedModel:
    """A model of the checkpoint's config with random weights, float32: the control for what training brings about.

    Args:
        checkpoint: whose config to take; no weight is read.
        seed: draws the weights.
        device: a torch device.
    """
    config = AutoConfig.for_model(**checkpoint.config)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()
    finally:
        torch.set_rng_state(state)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer. Raises FrankenmergeError when there is none."""
    if not checkpoint.has_tokenizer:
        raise fail(str(checkpoint.path), "a tokenizer", "none of its files", "put the donor's tokenizer.json there")
    return AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks: the first module list as long as its config says there are blocks."""
    count = getattr(model.config, FAMILIES[model.config.model_type].keys.blocks)
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)


def embedding_of(model: PreTrainedModel) -> Tensor:
    """The embedding matrix `[v, d]`."""
    return model.get_input_embeddings().weight  # pyright: ignore[reportReturnType]


class _Enough(Exception):
    """Ends a forward pass when the last block that is needed has run."""


@contextmanager
def block_outputs(
    model: PreTrainedModel, *, site: Site = "block", isolated: bool = False, last: int | None = None
) -> Iterator[list[Tensor]]:
    """Collect, while the context lasts, what each block makes of the latest forward pass, `[b, s, d]` each.

    The list holds `l + 1` entries: what enters the first block, then every block's output before any final norm. (The
    library's own `hidden_states[-1]` is taken behind the final norm.)

    Args:
        model: any causal language model; its blocks are hooked, and freed when the context ends.
        site: `block` for the residual stream behind each block, `attention` for the output of its attention.
        isolated: whether every block is fed what enters the first one, instead of its predecessor's output.
        last: the deepest block wanted, 1-based; the pass ends behind it. Run the pass through `forward`.
    """
    states: list[Tensor] = []
    blocks = list(blocks_of(model))[:last]

    def entering(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.clear()
        states.append(args[0] if args else kwargs["hidden_states"])

    def refeeding(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return ((states[0], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states[0]})

    def leaving(_module: nn.Module, _args: tuple, output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    def stopping(_module: nn.Module, _args: tuple, _output: Any) -> None:
        raise _Enough

    handles = [blocks[0].register_forward_pre_hook(entering, with_kwargs=True)]
    if isolated:
        handles += [block.register_forward_pre_hook(refeeding, with_kwargs=True) for block in blocks[1:]]
    sites = blocks if site == "block" else [attention_of(block) for block in blocks]
    handles += [module.register_forward_hook(leaving) for module in sites]
    if last is not None:
        handles.append(blocks[-1].register_forward_hook(stopping))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def attention_of(block: nn.Module) -> nn.Module:
    """A block's attention, whatever its family calls it."""
    return next(module for name, module in block.named_children() if name in ("self_attn", "attn", "attention"))


def forward(model: PreTrainedModel, **inputs: Any) -> None:
    """Run the model without its head, for what `block_outputs` collects; ends early where that asks for it.

    Keys and values are cached only in a cache that is given, `past_key_values=DynamicCache()`: the pass appends to it, for the
    blocks it reaches, and goes on behind what it holds.
    """
    try:
        backbone(model)(**inputs, use_cache="past_key_values" in inputs)
    except _Enough:
        pass


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head, for passes that need no logits."""
    return getattr(model, model.base_model_prefix)


@torch.no_grad()
def virtual_splice(recipe: Recipe, donors: Mapping[str, Checkpoint], models: Mapping[str, PreTrainedModel]) -> PreTrainedModel:
    """Stack the donors' blocks in memory as `recipe` says, sharing their weights: only those of turned slices are made anew.

    The same model as the checkpoint that a merge of the recipe writes: it is built empty from the result's config, then
    filled with the donors' own tensors.

    Raises:
        FrankenmergeError: for a recipe that cannot become a model.
    """
    validated(recipe, donors)
    settings = result_config(recipe, donors)
    config = AutoConfig.for_model(**settings)
    first, last = models[recipe.sources[0].model], models[recipe.sources[-1].model]
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=first.dtype, attn_implementation=first.config._attn_implementation)
    if not untied(recipe, donors):
        model.tie_weights()
    prefix = _blocks_name(model)
    states = {name: donor.state_dict() for name, donor in models.items()}
    parts: dict[str, Tensor] = {}
    architecture = FAMILIES[settings["model_type"]]
    turns, stored = _turns(recipe, donors), getattr(torch, settings.get("dtype") or settings["torch_dtype"])
    position = 0
    for number, source in enumerate(recipe.sources):
        for index in range(*source.layer_range):
            start = f"{prefix}{index}."
            found = {name.removeprefix(start): value for name, value in states[source.model].items() if name.startswith(start)}
            found = _turned(found, architecture.root + architecture.block, architecture, turns.get(number), stored)
            parts |= {f"{prefix}{position}.{name}": value for name, value in found.items()}
            position += 1
    # In memory the head may have another name than in the file (GPT-NeoX: lm_head, embed_out).
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings()) + "."
    ends: dict[str, dict[str, Tensor]] = {"embedding": {}, "behind": {}}
    for name in model.state_dict():
        is_head = name.startswith(head)
        role = "head" if is_head else architecture.role(name)[0]
        canonical = architecture.head + name.removeprefix(head) if is_head else name
        if role == "embedding":
            ends["embedding"][canonical] = first.state_dict()[name]
        elif role in ("final", "head"):
            ends["behind"][canonical] = last.state_dict()[name]
    ends["embedding"] = _turned(ends["embedding"], "", architecture, turns.get(0), stored)
    ends["behind"] = _turned(ends["behind"], "", architecture, turns.get(len(recipe.slices) - 1), stored)
    for name, value in (ends["embedding"] | ends["behind"]).items():
        parts[head + name.removeprefix(architecture.head) if name.startswith(architecture.head) else name] = value
    model.load_state_dict(parts, strict=True, assign=True)
    if not untied(recipe, donors):
        model.tie_weights()
    model.generation_config = first.generation_config
    return model.eval()


def _turns(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> Mapping[int, Turn]:
    """The turns of the slices that have a gauge, by slice."""
    from frankenmerge.fitting import fitted_turns  # which runs models, and so imports this

    return {part: fit.turn for part, fit in fitted_turns(recipe, donors).items()} if any(part.gauge for part in recipe.slices) else {}


def _turned(
    tensors: dict[str, Tensor], prefix: str, architecture: Architecture, turn: Turn | None, stored: torch.dtype
) -> dict[str, Tensor]:
    """Tensors by name behind `prefix`, turned and rounded as a merge stores them; as they are where there is no turn."""
    if turn is None:
        return tensors
    result = turned_all({prefix + name: value for name, value in tensors.items()}, architecture, turn)
    return {name: result[prefix + name].to(stored).to(value.dtype) for name, value in tensors.items()}


def _blocks_name(model: PreTrainedModel) -> str:
    blocks = blocks_of(model)
    return next(name for name, module in model.named_modules() if module is blocks) + "."
