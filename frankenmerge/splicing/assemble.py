"""Execute a splice in memory: the model that a merge of it would write, without writing it."""

import json
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from frankenmerge.donors.architecture import Architecture
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.models.blank import build, config_object, model_class
from frankenmerge.models.hooks import blocks_of
from frankenmerge.models.loading import (
    CPU,
    Placement,
    check_family,
    explained,
    from_pretrained,
    load_tokenizer,
    tokenizer_in,
)
from frankenmerge.models.quiet import quiet
from frankenmerge.models.streaming import read_tensor
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.computing import (
    Arithmetic,
    Computation,
    arithmetic,
    computed,
    open_files,
    workers,
)
from frankenmerge.splicing.methods import METHODS
from frankenmerge.splicing.operations import (
    Computed,
    Copy,
    Gate,
    Input,
    Operation,
    Perturb,
    Rotate,
    Transplant,
)
from frankenmerge.splicing.resolve import Splice
from frankenmerge.splicing.rotation import Fit
from frankenmerge.splicing.tokenizer import tokenizer_content
from frankenmerge.storage.dtypes import torch_dtype
from frankenmerge.storage.scratch import scratch_folder, write_files

Models = Mapping[str, PreTrainedModel]
"""Donors in memory, by the names in the recipe."""


class ComputedTensors:
    """Computed tensors, shared among splices that compute the same from the same.

    The least recently used are dropped when all take more than `limit` bytes.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit, self.bytes = limit, 0
        self._tensors: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable) -> Tensor | None:
        """A tensor that was computed before."""
        if key in self._tensors:
            self._tensors.move_to_end(key)
        return self._tensors.get(key)

    def add(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a tensor, at the cost of those not used for longest."""
        if key in self._tensors:
            return
        self._tensors[key] = tensor
        self.bytes += tensor.nbytes
        while self.bytes > self.limit:
            self.bytes -= self._tensors.popitem(last=False)[1].nbytes


@torch.no_grad()
def assemble(
    splice: Splice,
    models: Models,
    placement: Placement = CPU,
    *,
    fits: Mapping[int, Fit] | None = None,
    shared: ComputedTensors | None = None,
    progress: Progress = silent,
) -> PreTrainedModel:
    """Build the model of a splice: bit by bit what loading its merged checkpoint would give.

    Tensors that are copied share the memory of `models`; of donors that are not among them, or are
    offloaded, they are read from disk. What is computed is computed from the donors' files.

    Args:
        splice: what to build.
        models: donors in memory, loaded with the same placement.
        placement: type and devices.
        fits: rotations of all slices that have a gauge, see `gauge_fitting.fitted_rotations`.
        shared: computed tensors to reuse, and to add to.
        progress: of computing.

    Raises:
        FrankenmergeError: for NaN and Inf in computed tensors, or too little memory.
    """
    check_family(splice.config, "splice in memory")
    tensors = _tensors(splice, models, placement, fits or {}, shared, progress)
    with explained("splice in memory", "a config"):
        config = config_object(splice.config)
    with torch.device("meta"):
        kind = type(build(model_class(splice.config), config, torch.float32))
    model = from_pretrained(kind, None, placement, config=config, state_dict=tensors)
    _share_blocks(splice, models, model)
    if splice.generation_config is not None:
        with quiet():
            model.generation_config = GenerationConfig.from_dict(
                json.loads(splice.generation_config)
            )
    return model


def prefix_of(splice: Splice) -> tuple[Hashable, ...]:
    """What hidden states depend on: one entry for the embedding, and one for every block.

    Splices whose first entries are equal have equal states after as many of them. A splice with
    gauges shares none: what its rotations are is known only when they are fitted.
    """
    if splice.has_gauges:
        return tuple((splice.key, place) for place in range(len(splice.blocks) + 1))
    parts: list[list[Hashable]] = [[] for _ in range(len(splice.blocks) + 1)]
    parts[0].append(splice.base.fingerprint)  # whose config the model has
    for operation in splice.operations:
        role, position, canonical = splice.base.architecture.role(operation.name)
        if role in ("embedding", "rest", "block"):
            place = 0 if position is None else position + 1
            parts[place].append((canonical, _identity(operation, splice, {})))
    return tuple(map(tuple, parts))


def splice_tokenizer(splice: Splice) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a merge of the splice would write."""
    donor = splice.tokenizer_donor
    # Some tokenizers are chosen by the model's type, which a mixture changes.
    changed = bool(splice.recipe.mixture) and splice.config["model_type"] in CONFIG_MAPPING
    if splice.tokenizer == tokenizer_content(donor) and not changed:
        return load_tokenizer(donor)
    with scratch_folder() as folder:
        write_files(folder, splice.tokenizer)
        config = json.dumps(splice.config).encode() if changed else None
        stored = config or (donor.path / "config.json").read_bytes()
        (folder / "config.json").write_bytes(stored)
        return tokenizer_in(folder)


def _tensors(
    splice: Splice,
    models: Models,
    placement: Placement,
    fits: Mapping[int, Fit],
    shared: ComputedTensors | None,
    progress: Progress,
) -> dict[str, Tensor]:
    """The result's tensors by name: copied ones shared with `models`, the others computed."""
    dtype = placement.torch_dtype
    loaded = {name: dict(_by_file_name(splice.donors[name], models[name])) for name in models}
    tensors: dict[str, Tensor] = {}
    missing: dict[str, tuple[Hashable, Computed]] = {}
    for operation in splice.operations:
        if isinstance(operation, Copy):
            found = loaded.get(operation.donor, {}).get(operation.source)
            if found is None:
                found = read_tensor(operation.tensor).to(dtype)
            tensors[operation.name] = found
            continue
        key = (_identity(operation, splice, fits), dtype)
        if shared is not None and (found := shared.get(key)) is not None:
            tensors[operation.name] = found
        else:
            missing[operation.name] = key, operation
    for name, made in computed_tensors([each for _, each in missing.values()], fits, progress):
        tensors[name] = made.to(dtype)
        if shared is not None:
            shared.add(missing[name][0], tensors[name])
    return tensors


def _by_file_name(donor: Checkpoint, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a loaded donor by their names in its file.

    Left out is what has no counterpart there (packed experts), or is offloaded.
    """
    state = model.state_dict()
    for name, named in names_as_stored(model, donor.architecture).items():
        role, index, canonical = donor.architecture.role(named)
        stored = donor.by_role.get((role, index), {}).get(canonical)
        if stored and not state[name].is_meta:
            yield stored, state[name]


def names_as_stored(model: PreTrainedModel, architecture: Architecture) -> dict[str, str]:
    """Names in files by names in memory: the head may have another (GPT-NeoX: `embed_out`)."""
    output = model.get_output_embeddings()
    head = next(name for name, module in model.named_modules() if module is output)
    return {
        name: architecture.head + name.removeprefix(f"{head}.")
        if name.startswith(f"{head}.")
        else name
        for name in model.state_dict()
    }


def unpacked(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of the file that a tensor in memory packs, such as all experts of a block.

    Args:
        model: what `assemble` returned.
        name: of one of its parameters.
        tensor: of that parameter's shape.

    Returns:
        Tensors by their names in the file.
    """
    with quiet():
        return revert_weight_conversion(model, {name: tensor})


def separated(model: PreTrainedModel, names: Collection[str]) -> dict[str, nn.Parameter]:
    """Parameters of an assembled model to be trained, no longer shared with donors in memory.

    Args:
        model: what `assemble` returned.
        names: of the parameters, in memory.
    """
    chosen = {name: parameter for name, parameter in model.named_parameters() if name in names}
    for parameter in chosen.values():
        parameter.data = parameter.data.clone()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # whose row would have no gradient
    return chosen


def computed_tensors(
    operations: Sequence[Computed],
    fits: Mapping[int, Fit] | None = None,
    progress: Progress = silent,
) -> Iterator[tuple[str, Tensor]]:
    """Compute tensors, several at a time, in the type in which a merge would store them.

    Yields names and tensors, in the order of the operations.
    """
    if not operations:
        return
    total = sum(operation.bytes for operation in operations)
    arithmetics: set[Arithmetic] = {arithmetic(operation, "cpu") for operation in operations}
    with (
        open_files() as files,
        workers(arithmetics) as pool,
        progress("computing tensors", total, "bytes") as advance,
    ):
        how = Computation(files, fits or {})
        futures = [pool.submit(_computed_tensor, operation, how) for operation in operations]
        try:
            for operation, future in zip(operations, futures, strict=True):
                yield operation.name, future.result()
                advance(operation.bytes)
        finally:
            for future in futures:
                future.cancel()


def _computed_tensor(operation: Computed, how: Computation) -> Tensor:
    content = torch.empty(operation.bytes, dtype=torch.uint8)
    view, position = content.numpy().data, 0
    for chunk in computed(operation, how):
        view[position : position + len(chunk)] = chunk
        position += len(chunk)
    return content.view(torch_dtype(operation.dtype)).view(operation.shape)


def _identity(operation: Operation, splice: Splice, fits: Mapping[int, Fit]) -> Hashable:
    """Equal for operations that make the same of the same tensors, whatever they are named."""

    def part(given: Input | None) -> Hashable:
        if given is None:
            return None
        origin = (given.tensor, splice.donors[given.donor].fingerprint)
        rows = given.rows and (
            given.rows.tensors,
            given.rows.origin.tobytes(),
            given.rows.row.tobytes(),
        )
        return origin, tuple(sorted(given.parameters.items())), rows

    if isinstance(operation, Copy):
        return operation.tensor, splice.donors[operation.donor].fingerprint
    if isinstance(operation, Rotate):
        rotation = fits[operation.part].at(operation.place).hash
        return part(operation.given), part(operation.gain), operation.use, rotation, operation.dtype
    if isinstance(operation, Gate):
        return operation.content, operation.shape, operation.dtype
    if isinstance(operation, Transplant):
        numbers = operation.approximation, operation.anchors, operation.dtype
        maps = operation.tokens.exact.tobytes(), operation.tokens.pieces.tobytes()
        return part(operation.given), part(operation.reference), maps, numbers
    if isinstance(operation, Perturb):
        numbers = operation.deviation, operation.scale, operation.seed
        return part(operation.given), operation.name, operation.dtype, numbers
    seed = (operation.seed, operation.name) if METHODS[operation.method].random else None
    parameters = tuple(sorted(operation.parameters.items()))
    inputs = tuple(part(given) for given in operation.inputs)
    return operation.method, operation.dtype, inputs, part(operation.base), parameters, seed


def _share_blocks(splice: Splice, models: Models, model: PreTrainedModel) -> None:
    """Give blocks that are copied whole the very tensors of their donor.

    Most have them already; those whose experts are packed in memory were packed anew.
    """
    blocks: dict[int, list[Operation]] = {}
    for operation in splice.operations:
        role, position, _ = splice.base.architecture.role(operation.name)
        if role == "block" and position is not None:
            blocks.setdefault(position, []).append(operation)
    for position, operations in blocks.items():
        origin = splice.blocks[position]
        copied = all(isinstance(each, Copy) and each.donor == origin.model for each in operations)
        if not copied or origin.model not in models:
            continue
        block = blocks_of(model)[position]
        state: dict[str, Any] = blocks_of(models[origin.model])[origin.index].state_dict()
        # Where models are spread over devices, a block may run elsewhere than its donor's.
        devices = _devices(state)
        if torch.device("meta") not in devices and devices == _devices(block.state_dict()):
            block.load_state_dict(state, assign=True)


def _devices(state: Mapping[str, Tensor]) -> set[torch.device]:
    return {tensor.device for tensor in state.values()}
