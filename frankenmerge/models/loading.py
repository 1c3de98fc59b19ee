"""Models in memory: the only place that loads one, runs its blocks, or stacks blocks of several without writing them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_parameters import resolve
from frankenmerge.donors.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from frankenmerge.donors.config import family
from frankenmerge.donors.families import Architecture
from frankenmerge.errors import fail
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.compatibility import result_config, stacked, untied
from frankenmerge.splicing.rotation import Rotation, rotate_all
from frankenmerge.storage.safetensors_header import read_json

if TYPE_CHECKING:
    from frankenmerge.splicing.gauge_fitting import Fit

Site = Literal["block", "attention"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    max_memory: Mapping[int | str, str] | None = None,
    offload: Path | None = None,
    untrained: int | None = None,
) -> PreTrainedModel:
    """Load a checkpoint, ready to run.

    Args:
        checkpoint: what to load; only its safetensors are read and none of its code runs.
        dtype: `float32`, `bfloat16` or `float16`.
        device: a torch device, or `auto` to let accelerate spread the model over what there is.
        max_memory: with `auto`, how much of each device (`0`, `1`, ..., `cpu`) may be used, such as
            `20GiB`.
        offload: with `auto`, a folder for the weights that fit on no device; they are read at every
            pass.
        untrained: take the config alone and draw the weights with this seed, see `untrained_model`;
            on the CPU for `auto`.

    Raises:
        FrankenmergeError: when the weights do not fill the model exactly, or do not fit.
    """
    _check_family(checkpoint)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if device != "auto":
        one_device(device)
        if max_memory or offload:
            raise fail(
                f"device {device}",
                "auto, where memory is shared out",
                device,
                "give --device auto as well",
            )
    if untrained is not None:
        return untrained_model(
            checkpoint, untrained, dtype=dtype, device="cpu" if device == "auto" else device
        )
    _check_index(checkpoint)
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
        raise fail(
            "memory of each device",
            "devices that are there, as 0=20GiB",
            str(error),
            "mend --max-memory",
        ) from error
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[kind])):
            found = f"{kind.replace('_', ' ')}: {', '.join(names[:5])}"
            raise fail(
                str(checkpoint.path),
                "weights that fill the model exactly",
                found,
                "use a complete checkpoint",
            )
    if embedding_of(model).is_meta:
        raise fail(
            str(checkpoint.path), "room for the embedding on a device", "less", "raise --max-memory"
        )
    return model.eval()


def one_device(device: str) -> torch.device:
    """A device by its name; `auto` is an accelerator where there is one. Raises FrankenmergeError for one that is not there."""
    if device == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise fail(
            f"device {device}",
            "a torch device that is there, or auto",
            str(error),
            "choose another --device",
        ) from error


def untrained_model(
    checkpoint: Checkpoint, seed: int, *, dtype: str = "float32", device: str = "cpu"
) -> PreTrainedModel:
    """A model of the checkpoint's config with random weights: the control for what training brings about.

    Args:
        checkpoint: whose config to take; no weight is read.
        seed: draws the weights.
        dtype: what the weights, drawn in float32, are rounded to.
        device: a torch device.
    """
    _check_family(checkpoint)
    config = AutoConfig.for_model(**checkpoint.config)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        return (
            AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            .to(device, DTYPES[dtype])
            .eval()
        )
    finally:
        torch.set_rng_state(state)


def _check_index(checkpoint: Checkpoint) -> None:
    """Refuse an index that transformers cannot read though this package can."""
    path = checkpoint.path / INDEX_NAME
    if (
        not (checkpoint.path / SINGLE_NAME).exists()
        and path.exists()
        and "metadata" not in read_json(path, "a safetensors index")
    ):
        remedy = 'write "metadata": {} into it; inspect, check and merge do without'
        raise fail(str(path), "metadata, without which transformers loads no model", "none", remedy)


def _check_family(checkpoint: Checkpoint) -> None:
    if (name := checkpoint.config["model_type"]) not in CONFIG_MAPPING:
        remedy = "install a transformers that has it; inspect, check and merge do without"
        raise fail(
            str(checkpoint.path / "config.json"),
            "a model_type that transformers can run",
            name,
            remedy,
        )


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer. Raises FrankenmergeError when there is none."""
    if not checkpoint.has_tokenizer:
        raise fail(
            str(checkpoint.path),
            "a tokenizer",
            "none of its files",
            "put the donor's tokenizer.json there",
        )
    return AutoTokenizer.from_pretrained(
        checkpoint.path, local_files_only=True, trust_remote_code=False
    )


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks: the first module list as long as its config says there are blocks."""
    count = model.config.num_hidden_layers
    return next(
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    )


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

    The list holds `l + 1` entries: what enters the first block, then every block's output before
    any final norm. (The library's own `hidden_states[-1]` is taken behind the final norm.)

    Args:
        model: any causal language model; its blocks are hooked, and freed when the context ends.
        site: `block` for the residual stream behind each block, `attention` for the output of its
            attention.
        isolated: whether every block is fed what enters the first one, instead of its predecessor's
            output.
        last: the deepest block wanted, 1-based; the pass ends behind it. Run the pass through
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

    def leaving(_module: nn.Module, _args: tuple, output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    def stopping(_module: nn.Module, _args: tuple, _output: Any) -> None:
        raise _Enough

    handles = [blocks[0].register_forward_pre_hook(entering, with_kwargs=True)]
    if isolated:
        handles += [
            block.register_forward_pre_hook(refeeding, with_kwargs=True) for block in blocks[1:]
        ]
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
    return next(
        module
        for name, module in block.named_children()
        if name in ("self_attn", "attn", "attention", "self_attention")
    )


def forward(model: PreTrainedModel, **inputs: Any) -> None:
    """Run the model without its head, for what `block_outputs` collects; ends early where that asks for it.

    Keys and values are cached only in a cache that is given, `past_key_values=DynamicCache()`: the
    pass appends to it, for the blocks it reaches, and goes on behind what it holds.
    """
    try:
        backbone(model)(**inputs, use_cache="past_key_values" in inputs)
    except _Enough:
        pass


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head, for passes that need no logits."""
    return getattr(model, model.base_model_prefix)


class Assembly(NamedTuple):
    """A splice whose tensors have been gathered, and scaled where the recipe says so, but not rotated."""

    model: PreTrainedModel
    """Empty, but for its constants."""
    tensors: dict[str, Tensor]
    """The donors' own, by their names in the model."""
    places: dict[tuple[int, int], dict[str, str]]
    """Of slices that have a gauge, by slice and place in it (`Fit.at`): names in the model by
    canonical names.
    """

    def rotated(self, rotations: Mapping[tuple[int, int], Rotation]) -> dict[str, Tensor]:
        """The tensors of some places, rotated, in the rotations' type."""
        made: dict[str, Tensor] = {}
        for place, rotation in rotations.items():
            names = self.places[place]
            architecture = family(self.model.config.to_dict())
            result = rotate_all(
                {canonical: self.tensors[name] for canonical, name in names.items()},
                architecture,
                rotation,
            )
            made |= {name: result[canonical] for canonical, name in names.items()}
        return made


@torch.no_grad()
def virtual_splice(
    recipe: Recipe,
    donors: Mapping[str, Checkpoint],
    models: Mapping[str, PreTrainedModel],
    fits: "Mapping[int, Fit] | None" = None,
    *,
    progress: Progress = silent,
) -> PreTrainedModel:
    """Stack the donors' blocks in memory as `recipe` says, sharing their weights: only what is rotated or scaled is made anew.

    The same model as the checkpoint that a merge of the recipe writes: it is built empty from the
    result's config, then filled with the donors' own tensors.

    Args:
        recipe: what to stack.
        donors: the donors' headers, by name.
        models: the donors' models, by name.
        fits: of the slices that have a gauge; fitted where they are not given.
        progress: shows how far that is.

    Raises:
        FrankenmergeError: for a recipe that cannot become a model, or does more than stack the
            donors' own tensors.
    """
    recipe = stacked(recipe, donors)
    assembly = assembled(recipe, donors, models)
    model, tensors = assembly.model, assembly.tensors
    if assembly.places:
        from frankenmerge.splicing.gauge_fitting import (
            fitted_rotations,
        )  # which runs models, and so imports this

        fits = fits or fitted_rotations(recipe, donors, progress)
        stored = _stored(recipe, donors)
        for (
            number,
            place,
        ) in (
            assembly.places
        ):  # one at a time: they are in float64 until they are rounded as a merge stores them
            made = assembly.rotated({(number, place): fits[number].at(place)})
            tensors = tensors | {
                name: value.to(stored).to(tensors[name].dtype) for name, value in made.items()
            }
    model.load_state_dict(tensors, strict=True, assign=True)
    if not untied(recipe, donors):
        model.tie_weights()
    model.generation_config = models[recipe.embedding_donors[0]].generation_config
    return model.eval()


def assembled(
    recipe: Recipe, donors: Mapping[str, Checkpoint], models: Mapping[str, PreTrainedModel]
) -> Assembly:
    """Gather the tensors of a splice from the donors' models. Raises FrankenmergeError where they are not all in memory."""
    config = AutoConfig.for_model(**result_config(recipe, donors))
    ends = {
        "embedding": recipe.embedding_donors,
        "final": recipe.final_donors,
        "head": recipe.head_donors,
    }
    first = models[recipe.embedding_donors[0]]
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=first.dtype, attn_implementation=first.config._attn_implementation
        )
    if not untied(recipe, donors):
        model.tie_weights()
    prefix = _blocks_name(model)
    states = {name: donor.state_dict() for name, donor in models.items()}
    tensors: dict[str, Tensor] = {}
    for position, block in enumerate(recipe.blocks):
        source = f"{prefix}{block.index}."
        found = {
            name.removeprefix(source): value
            for name, value in states[block.model].items()
            if name.startswith(source)
        }
        tensors |= {f"{prefix}{position}.{name}": value for name, value in found.items()}
    architecture = donors[recipe.base].architecture
    # In memory the head may have another name than in the file (GPT-NeoX: lm_head, embed_out).
    head = (
        next(
            name
            for name, module in model.named_modules()
            if module is model.get_output_embeddings()
        )
        + "."
    )
    for name in model.state_dict():
        role = "head" if name.startswith(head) else architecture.role(name)[0]
        if role in ends:
            tensors[name] = states[ends[role][0]][name]
    if any(value.is_meta for value in tensors.values()):
        remedy = "merge the recipe, then evaluate the checkpoint; or raise --max-memory"
        raise fail(
            "splice in memory",
            "donors whose weights are all in memory",
            "some are offloaded",
            remedy,
        )
    if any(level.parameters for level in [recipe, recipe.stack, *recipe.parts, *recipe.sources]):
        tensors = _scaled(tensors, head, recipe, architecture, _stored(recipe, donors))
    return Assembly(model, tensors, _places(tensors, head, recipe, architecture))


def _stored(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> torch.dtype:
    """The type that a merge stores tensors in."""
    settings = result_config(recipe, donors)
    return getattr(torch, settings.get("dtype") or settings["torch_dtype"])


def _scaled(
    tensors: Mapping[str, Tensor],
    head: str,
    recipe: Recipe,
    architecture: Architecture,
    stored: torch.dtype,
) -> dict[str, Tensor]:
    """A splice's tensors, each by its `scale` in the recipe and rounded as a merge stores it; `head` is the head's prefix in memory."""
    places = []
    for number, part in enumerate(recipe.parts):
        start, stop = part.sources[0].layer_range
        places += [
            (number, index, (index - start) / (stop - start - 1) if stop - start > 1 else 1.0)
            for index in range(start, stop)
        ]
    ends = {
        "embedding": (0, recipe.embedding),
        "final": (-1, recipe.final_norm),
        "head": (-1, recipe.head),
    }
    made = dict(tensors)
    for name, value in tensors.items():
        role, position, canonical = architecture.role(
            architecture.head + name.removeprefix(head) if name.startswith(head) else name
        )
        number, index, t = places[position] if position is not None else (ends[role][0], 0, 0.0)
        if position is None and ends[role][1]:
            continue  # an end whose donor is named is taken as it is
        part = recipe.parts[number]
        levels = [
            part.sources[0].parameters,
            part.parameters,
            recipe.stack.parameters,
            recipe.parameters,
        ]
        scale = resolve("scale", levels, canonical.format(index), t)
        if scale is not None and scale != 1:
            made[name] = (value.float() * scale).to(stored).to(value.dtype)
    return made


def _places(
    names: Iterable[str], head: str, recipe: Recipe, architecture: Architecture
) -> dict[tuple[int, int], dict[str, str]]:
    """`Assembly.places` of a splice's tensors; `head` is the head's prefix in memory."""
    at = [
        (number, offset)
        for number, part in enumerate(recipe.parts)
        for offset in range(part.length)
    ]
    ends = {"embedding": (0, 0), "final": (len(recipe.parts) - 1, -1)}
    places: dict[tuple[int, int], dict[str, str]] = {}
    for name in names:
        is_head = name.startswith(head)
        role, position, canonical = architecture.role(
            architecture.head + name.removeprefix(head) if is_head else name
        )
        # The head takes in the final norm's gain: they are rotated together.
        place = at[position] if position is not None else ends["final" if is_head else role]
        if recipe.parts[place[0]].gauge:
            places.setdefault(place, {})[canonical] = name
    return places


def _blocks_name(model: PreTrainedModel) -> str:
    blocks = blocks_of(model)
    return next(name for name, module in model.named_modules() if module is blocks) + "."
