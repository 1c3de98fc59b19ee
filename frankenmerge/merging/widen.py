"""Widen a donor to the shape of a wider one, padded with zeros: it computes what it did before.

A head of zeros attends to all positions alike and adds nothing, nor does a neuron of zeros, so the
directions of the stream that the narrow donor lacks stay zero. Only norms change: they divide by
the root of the mean square over all `D` directions instead of the donor's `d`. Gains times
`sqrt(d / D)` and a small constant times `d / D` compensate for that.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from operator import gt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frankenmerge.donors.architecture import Architecture
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import differences, head_width, quantity
from frankenmerge.donors.shards import INDEX_NAME
from frankenmerge.errors import Fault, raise_all
from frankenmerge.merging.output import check_output
from frankenmerge.splicing.rotation import stream_use
from frankenmerge.storage.atomic import new_folder
from frankenmerge.storage.dtypes import BYTES_OF, COMPUTED
from frankenmerge.storage.scratch import write_files

if TYPE_CHECKING:
    from torch import Tensor

SIZES = ("width", "heads", "kv_heads", "inner")
_OTHER_FILES = ("generation_config.json", "README.md")


def widened(tensor: "Tensor", shape: tuple[int, ...], factor: float = 1.0) -> "Tensor":
    """The tensor times `factor`, padded with zeros to `shape`; in float64 and rounded once."""
    made = tensor.new_zeros(shape)
    made[tuple(map(slice, tensor.shape))] = tensor if factor == 1 else tensor.double() * factor
    return made


def widened_config(narrow: Checkpoint, wide: Checkpoint) -> dict[str, Any]:
    """The narrow donor's config with the wide one's sizes, its norms' small constant adjusted."""
    sizes = {getattr(narrow.architecture.keys, size): quantity(wide.config, size) for size in SIZES}
    heads = {"head_dim": wide.config["head_dim"]} if "head_dim" in wide.config else {}
    return (
        narrow.config | sizes | heads | {"rms_norm_eps": _constant(narrow) * _share(narrow, wide)}
    )


def _constant(donor: Checkpoint) -> Any:
    """What its norms add to the mean square."""
    return {**donor.architecture.defaults, **donor.config}["rms_norm_eps"]


def _share(narrow: Checkpoint, wide: Checkpoint) -> float:
    return narrow.config[narrow.architecture.keys.width] / wide.config[wide.architecture.keys.width]


def widening_faults(narrow: Checkpoint, wide: Checkpoint) -> Iterator[Fault]:
    """What prevents writing `narrow` in the shape of `wide`, for blocks of both in one model."""
    families = [donor.config["model_type"] for donor in (narrow, wide)]
    if families[0] != families[1]:
        yield Fault(
            narrow.name,
            f"a donor of the family {families[1]}, as {wide.name} is",
            families[0],
            "use donors of one family",
        )
        return
    if reason := _inexact(narrow.architecture):
        remedy = "splice it with donors of its own width"
        yield Fault(
            narrow.name,
            "a family in which zeros change nothing",
            f"{families[0]}, with {reason}",
            remedy,
        )
        return
    if wrong := [*_size_faults(narrow, wide)]:
        yield from wrong
        return
    if not isinstance(constant := _constant(narrow), int | float):
        yield Fault(
            f"{narrow.name}: rms_norm_eps", "a number", repr(constant), "correct config.json"
        )
        return
    for reason in differences(widened_config(narrow, wide), wide.config)[0]:
        yield Fault(
            narrow.name,
            f"blocks that one config can describe with those of {wide.name}",
            reason,
            "use other donors",
        )
    own, others = _block_shapes(narrow), _block_shapes(wide)
    for name in sorted(set(own) | set(others)):
        a, b = own.get(name), others.get(name)
        if a is None or b is None or len(a) != len(b) or any(map(gt, a, b)):
            expected, found = (f"shape {list(shape)}" if shape else "none" for shape in (b, a))
            yield Fault(
                f"{narrow.name}: {name}",
                f"{expected} or less, as in {wide.name}",
                found,
                "use other donors",
            )
    for dtype in sorted(set(narrow.dtypes) - set(COMPUTED)):
        yield Fault(narrow.name, "tensors of floating types", dtype, "use an unquantised donor")


def _size_faults(narrow: Checkpoint, wide: Checkpoint) -> Iterator[Fault]:
    """Sizes in config.json that prevent it."""
    sizes = {
        size: (quantity(narrow.config, size) or 0, quantity(wide.config, size) or 0)
        for size in SIZES
    }
    for size, (own, other) in sizes.items():
        place = f"{narrow.name}: {getattr(narrow.architecture.keys, size)}"
        if not (type(own) is int and type(other) is int and own > 0 and other > 0):
            yield Fault(
                place,
                f"positive whole numbers, here and in {wide.name}",
                f"{own!r} and {other!r}",
                "correct config.json",
            )
            return
        if own > other:
            yield Fault(
                place,
                f"{other} or less, as {wide.name} has",
                str(own),
                "widen the other donor, or one smaller in every size",
            )
    widths, ratios = (
        (head_width(narrow.config), head_width(wide.config)),
        [sizes["heads"][at] / sizes["kv_heads"][at] for at in (0, 1)],
    )
    if widths[0] != widths[1]:
        remedy = (
            "use donors with heads of one width: rotary positions rotate heads of other widths by "
            "other angles"
        )
        yield Fault(
            f"{narrow.name}: head_dim", f"{widths[1]}, as {wide.name} has", str(widths[0]), remedy
        )
    if ratios[0] != ratios[1]:
        expected = f"{ratios[1]:g} query heads for each key head, as {wide.name} has"
        yield Fault(
            narrow.name, expected, f"{ratios[0]:g}", "use donors with the same ratio of heads"
        )


def _block_shapes(donor: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Of the first block, which is like all others in the families that can be widened."""
    return {
        canonical: donor.tensors[name].shape
        for canonical, name in donor.by_role["block", 0].items()
    }


def _inexact(architecture: Architecture) -> str | None:
    """Why zeros would change what donors of a family compute, or are not known not to."""
    stream = architecture.stream
    if stream is None:
        return "tensors that are not described"
    if architecture.norm != "rms":
        return "norms that centre: the mean over more directions is another one"
    if stream.output_norms:
        return "norms after its maps"
    if stream.inside:
        return "norms of single heads, which share the small constant that has to be adjusted"
    if architecture.fused or any(
        "experts" in name for maps in stream.norms.values() for name in maps
    ):
        return "several maps in one tensor, or experts"
    return None


def widen(narrow: Checkpoint, wide: Checkpoint, output: Path) -> Path:
    """Write `narrow` in the shape of `wide` to the new folder `output`, complete or not at all.

    It keeps its depth, vocabulary, tokenizer, types and files of weights, of which one at a time is
    held in memory; all tensors but the gains of its norms are padded as they are. In float32 it
    gives the same logits; in narrower types its gains are rounded.

    Raises:
        FrankenmergeError: naming everything that keeps it from being exact or from fitting `wide`,
            and for an output that exists, is inside a donor or has no room.
    """
    from safetensors.torch import save_file

    raise_all(widening_faults(narrow, wide))
    shapes = _shapes(narrow, wide)
    size = sum(
        BYTES_OF[narrow.tensors[name].dtype] * math.prod(shape) for name, shape in shapes.items()
    )
    check_output(output, {donor.name: donor for donor in (narrow, wide)}, size)
    files: dict[Path, list[str]] = defaultdict(list)
    for name in shapes:
        files[narrow.tensors[name].file].append(name)
    if output.is_dir():
        output.rmdir()  # it is empty, and new_folder replaces nothing
    with new_folder(output) as partial:
        others = [narrow.path / name for name in _OTHER_FILES if (narrow.path / name).is_file()]
        copied = [*narrow.tokenizer_files, *others]
        content = {str(path.relative_to(narrow.path)): path.read_bytes() for path in copied}
        write_files(partial, content)
        _write_json(partial / "config.json", widened_config(narrow, wide))
        if len(files) > 1:
            weight_map = {name: file.name for file, names in files.items() for name in names}
            _write_json(
                partial / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map}
            )
        for file, names in files.items():
            made = _widened_file(
                file,
                {name: shapes[name] for name in names},
                narrow,
                math.sqrt(_share(narrow, wide)),
            )
            save_file(made, partial / file.name, {"format": "pt"})
    return output


def _shapes(narrow: Checkpoint, wide: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The new shape of each tensor of the narrow donor, by its name; constant buffers left out."""
    width, blocks, shapes = wide.config[wide.architecture.keys.width], _block_shapes(wide), {}
    for (role, _), names in narrow.by_role.items():
        for canonical, name in names.items() if role != "ignored" else ():
            shapes[name] = (
                blocks[canonical] if role == "block" else (*narrow.tensors[name].shape[:-1], width)
            )
    return shapes


def _widened_file(
    file: Path, shapes: dict[str, tuple[int, ...]], narrow: Checkpoint, factor: float
) -> "dict[str, Tensor]":
    from safetensors import safe_open

    made = {}
    with safe_open(file, "pt") as handle:
        for name, shape in shapes.items():
            kind = stream_use(narrow.architecture, narrow.architecture.role(name)[2]).kind
            made[name] = widened(handle.get_tensor(name), shape, factor if kind == "gain" else 1.0)
    return made


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
