"""Gauges: a slice rotated into another basis of the residual stream, exactly, and the rotation that brings two donors together.

A norm without a gain treats all directions alike, so a model whose norms' gains have been moved
into the maps that read them computes the same in any orthogonal basis of its residual stream
(Ashkboos et al. 2024, SliceGPT, section 3). Where a donor's state is the row `x`, the rotated slice
sees `scale * x @ matrix`: maps that read it become `W G matrix`, with `G` the gain, and maps that
write it `scale * matrix.T W`. A LayerNorm centres as well, so there the all-ones direction has to
stay where it is.

Norms divide by the stream's length, so `scale` changes nothing but the weight of their small
constant.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from frankenmerge.donors.architecture import Architecture
from frankenmerge.errors import Fault, FrankenmergeError, fail

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["gain", "shift", "read", "write", "added", "rows", "inside"]


class Rotation(NamedTuple):
    """From a donor's basis to another one: the state `x [d]` becomes `scale * x @ matrix`."""

    matrix: "Tensor"
    """`[d, d]`, float64, orthogonal; with `writing`, any."""
    scale: float = 1.0
    writing: "Tensor | None" = None
    """`[d, d]`: what maps that write go through in the place of `scale * matrix`. Then it is no
    rotation but two linear maps.
    """

    @property
    def writes(self) -> "Tensor":
        """What maps that write go through, `[d, d]`."""
        return self.scale * self.matrix if self.writing is None else self.writing

    @property
    def hash(self) -> str:
        """A hash of its numbers."""
        written = b"" if self.writing is None else self.writing.numpy().tobytes()
        return hashlib.sha256(
            self.matrix.numpy().tobytes() + str(self.scale).encode() + written
        ).hexdigest()[:16]


class Fit(NamedTuple):
    """A fitted rotation, and how well it fits."""

    rotation: Rotation
    residual: float
    """Share of the target's squared length that is left over on tokens not used in the fit: 1 minus
    R^2.
    """
    refined: tuple[Rotation, ...] = ()
    """After descent: a rotation for every block of the slice, and of the last slice one for final
    norm and head.
    """

    def at(self, place: int) -> Rotation:
        """The rotation of block `place` of the slice; 0 is the embedding's, -1 that of the head."""
        return self.refined[place] if self.refined else self.rotation


class Meeting(NamedTuple):
    """How a tensor meets the stream."""

    kind: Kind
    """`gain` and `shift` of a norm, a map that does `read` or `write`, the bias `added` by one that
    writes, `rows` that enter the stream as they are, or `inside`, not at all.
    """
    gain: str | None = None
    """The canonical name of the norm's gain that the tensor takes in."""
    transposed: bool = False
    """Whether it is a map stored `[in, out]`."""


def meeting(architecture: Architecture, canonical: str) -> Meeting:
    """How the tensor of a canonical name meets the stream.

    Raises FrankenmergeError for a family that cannot be rotated and for a tensor nobody has placed.
    """
    stream = architecture.stream
    if stream is None or stream.output_norms:
        found = (
            f"gains of their own basis in {', '.join(stream.output_norms)}"
            if stream
            else "one nobody has described so"
        )
        raise fail(
            canonical,
            "a family whose blocks can be rotated",
            found,
            "splice without a gauge, or donors of another family",
        )
    module, is_weight = (
        canonical.removesuffix(".weight").removesuffix(".bias"),
        not canonical.endswith(".bias"),
    )
    final = (architecture.root + architecture.final).removesuffix(".")
    if canonical.startswith(architecture.head):
        return Meeting("read", f"{final}.weight") if is_weight else Meeting("inside")
    block = architecture.root + architecture.block
    if module in {final, *(block + norm for norm in stream.norms)}:
        return Meeting("gain") if is_weight else Meeting("shift", f"{module}.weight")
    if not module.startswith(block):
        return Meeting("rows")
    inner = re.sub(r"(\.experts|\.norms)\.\d+", r"\1", module.removeprefix(block))
    norm = next((norm for norm, maps in stream.norms.items() if inner in maps), None)
    if norm is not None and is_weight:
        return Meeting("read", f"{block}{norm}.weight", stream.transposed)
    if inner in stream.writes:
        return Meeting("write", transposed=stream.transposed) if is_weight else Meeting("added")
    if norm is not None or inner in stream.inside:
        return Meeting("inside")
    raise fail(
        canonical,
        "a tensor that reads or writes the residual stream in a known way",
        "neither",
        "splice without a gauge",
    )


def rotated(
    tensor: "Tensor", met: Meeting, rotation: Rotation, gain: "Tensor | None" = None
) -> "Tensor":
    """One tensor as the rotated slice has it, in the rotation's type, which is float64 but while a rotation is being refined.

    Args:
        tensor: as the donor has it; maps `[out, in]` unless `met` says else, embeddings and heads
            `[v, d]`.
        met: how it meets the stream.
        rotation: from the donor's basis to the new one.
        gain: the norm's gain `[d]` that `met` names.

    Raises:
        FrankenmergeError: for a norm that adds a shift where its gain is zero: no map behind it
            could take that in.
    """
    tensor, matrix = tensor.to(rotation.matrix.dtype), rotation.matrix.to(tensor.device)
    if met.kind == "inside":
        return tensor
    if met.kind == "gain":
        return tensor.new_ones(tensor.shape)
    if met.kind in ("added", "rows") or (met.kind == "write" and met.transposed):
        return tensor @ rotation.writes.to(tensor.device)
    if met.kind == "write":
        return rotation.writes.T.to(tensor.device) @ tensor
    assert gain is not None and met.gain is not None
    gain = gain.to(matrix.dtype)
    if met.kind == "read":
        return matrix.T @ (gain[:, None] * tensor) if met.transposed else (tensor * gain) @ matrix
    if not gain.all():
        raise fail(
            met.gain,
            "gains that are not zero, beside a bias",
            "zeros",
            "use another donor, or splice without a gauge",
        )
    return (tensor / gain) @ matrix


def rotate_all(
    tensors: Mapping[str, "Tensor"], architecture: Architecture, rotation: Rotation
) -> dict[str, "Tensor"]:
    """Tensors of one block, or of what lies outside the blocks, as the rotated slice has them, in the rotation's type.

    Args:
        tensors: by canonical name, the norms' gains among them.
        architecture: of their family.
        rotation: from the donor's basis to the new one.
    """
    places = {name: meeting(architecture, name) for name in tensors}
    return {
        name: rotated(tensors[name], met, rotation, tensors[met.gain] if met.gain else None)
        for name, met in places.items()
    }


def procrustes(source: "Tensor", target: "Tensor", *, centred: bool = False) -> Rotation:
    """The rotation and scale that bring `source` closest to `target` in the sum of squares (Schoenemann 1966).

    Args:
        source: states of the donor to be rotated, `[n, d]`.
        target: states of the other one on the same inputs, `[n, d]`.
        centred: whether the norms centre: then both are centred first and the all-ones direction
            stays where it is.
    """
    import torch

    source, target = source.double(), target.double()
    if centred:
        source, target = (states - states.mean(1, keepdim=True) for states in (source, target))
    product = source.T @ target
    # Orthogonal to everything else in the product, the all-ones direction is a singular pair of its
    # own.
    ones = product.norm() / len(product) * torch.ones_like(product) if centred else 0
    left, _, right = torch.linalg.svd(product + ones)
    matrix = left @ right
    return Rotation(matrix, float((product * matrix).sum() / source.square().sum()))


def residual(rotation: Rotation, source: "Tensor", target: "Tensor") -> float:
    """Share of the target's squared length that the rotation leaves over, for states `[n, d]`: 1 minus R^2 about the origin."""
    left = target.double() - rotation.scale * source.double() @ rotation.matrix
    return float(left.square().sum() / target.double().square().sum())


def random_rotation(width: int, seed: int, *, centred: bool = False) -> Rotation:
    """A rotation drawn uniformly, the null of any fit; `centred` keeps the all-ones direction."""
    import torch

    drawn = torch.randn(
        2, width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return Rotation(procrustes(drawn[0], drawn[1], centred=centred).matrix)


def gauge_faults(architecture: Architecture, names: Iterable[str], place: str) -> list[Fault]:
    """What keeps the tensors of these canonical names from being rotated, told once for a family."""
    names = list(names)
    try:
        for gain in [gain for name in names if (gain := meeting(architecture, name).gain)]:
            if gain not in names:
                raise fail(
                    gain,
                    "the norm that the maps behind it read, one for each",
                    "none",
                    "splice without a gauge",
                )
    except FrankenmergeError as error:
        return [fault._replace(place=f"{place}: {fault.place}") for fault in error.faults]
    return []
