"""What kind of module each parameter of a model belongs to, as transformers builds the model."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.families import USUAL

Kind = Literal["linear", "transposed", "leaf", "inner"]
"""A linear map, one that is stored `[in, out]`, any other module, or one with modules inside."""


def listed_kind(canonical: str, shape: tuple[int, ...], *, transposed: bool) -> Kind:
    """The kind of a tensor in a family of the table whose blocks have no experts.

    There every matrix is a linear map but for embeddings and gains of norms, and what has one
    dimension is a norm's, or the bias of a map: `weight` decides for both.

    Args:
        canonical: the name of the module's weight.
        shape: of the weight.
        transposed: whether the family stores maps `[in, out]`.
    """
    module = canonical.removesuffix(".weight").rpartition(".")[2]
    if len(shape) != 2 or "norm" in module:
        return "leaf"
    return "transposed" if transposed else "linear"


class Modules(NamedTuple):
    """The modules of a model in memory."""

    kinds: dict[str, Kind]
    """By the names of their tensors; those that are packed in memory are left out."""
    head: str
    """The path of the head."""


def modules_in_memory(donor: Checkpoint) -> Modules:
    """The modules as transformers builds them.

    Raises FrankenmergeError for a config that transformers cannot build.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from frankenmerge.models.blank import blank_model
    from frankenmerge.models.loading import explained

    kinds: dict[str, Kind] = {}
    with explained(str(donor.path / "config.json"), "the config of a model"):
        model = blank_model(donor.config)
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        kind = "inner" if any(module.children()) else "leaf"
        kind = "linear" if isinstance(module, nn.Linear) else kind
        kind = "transposed" if isinstance(module, Conv1D) else kind
        stored = module.state_dict().keys() - {
            f"{name}.{key}" for name, child in module.named_children() for key in child.state_dict()
        }
        kinds |= dict.fromkeys((f"{path}.{name}" for name in stored), kind)
    return Modules(kinds, next((n for n, each in model.named_modules() if each is head), ""))


def modules_of(donor: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Modules:
    """The modules of a donor's family, by the table where it suffices.

    That is a family whose head has transformers' usual name, without experts.

    Args:
        donor: whose family it is.
        shapes: of the tensors, by their names in the donor.
    """
    architecture = donor.architecture
    usual = architecture.listed and architecture.head == USUAL.head
    if not usual or any("experts" in name for name in shapes):
        return modules_in_memory(donor)
    transposed = architecture.stream is not None and architecture.stream.transposed
    kinds: dict[str, Kind] = {}
    for name in shapes:
        weight = f"{name.rpartition('.')[0]}.weight"
        shape = shapes.get(weight, ())
        kinds[name] = listed_kind(weight, shape, transposed=transposed)
    return Modules(kinds, architecture.head.removesuffix("."))
