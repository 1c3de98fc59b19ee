"""Gauges: rotate a slice into another basis of the residual stream, exactly.

A norm without a gain treats all directions alike, so a model whose norms' gains have been moved
into the maps that read them computes the same in any orthogonal basis of its residual stream
(Ashkboos et al. 2024, SliceGPT, section 3). Where a donor's state is the row `x`, the rotated slice
sees `scale * x @ matrix`: maps that read it become `W G matrix`, with `G` the gain, and maps that
write it `scale * matrix.T W`. A LayerNorm centres as well, so there the all-ones direction has to
stay where it is.

Norms divide by the stream's length, so `scale` changes only the weight of their small constant.
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


class StreamUse(NamedTuple):
    """How a tensor uses the residual stream."""

    kind: Kind
    """`gain` and `shift` of a norm, a map that does `read` or `write`, the bias `added` by one that
    writes, `rows` that enter the stream as they are, or `inside`, not at all.
    """
    gain: str | None = None
    """The canonical name of the norm's gain that the tensor absorbs."""
    transposed: bool = False
    """Whether it is a map stored `[in, out]`."""


def stream_use(architecture: Architecture, canonical: str) -> StreamUse:
    """How the tensor of a canonical name uses the residual stream.

    Raises FrankenmergeError for a family that cannot be rotated and for an unknown tensor.
    """
    stream = architecture.stream
    if stream is None or stream.output_norms:
        found = (
            f"gains of their own basis in {', '.join(stream.output_norms)}"
            if stream
            else "a family that is not described so"
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
        return StreamUse("read", f"{final}.weight") if is_weight else StreamUse("inside")
    block = architecture.root + architecture.block
    if module in {final, *(block + norm for norm in stream.norms)}:
        return StreamUse("gain") if is_weight else StreamUse("shift", f"{module}.weight")
    if not module.startswith(block):
        return StreamUse("rows")
    inner = re.sub(r"(\.experts|\.norms)\.\d+", r"\1", module.removeprefix(block))
    norm = next((norm for norm, maps in stream.norms.items() if inner in maps), None)
    if norm is not None and is_weight:
        return StreamUse("read", f"{block}{norm}.weight", stream.transposed)
    if inner in stream.writes:
        return StreamUse("write", transposed=stream.transposed) if is_weight else StreamUse("added")
    if norm is not None or inner in stream.inside:
        return StreamUse("inside")
    raise fail(
        canonical,
        "a tensor that reads or writes the residual stream in a known way",
        "neither",
        "splice without a gauge",
    )


def rotated(
    tensor: "Tensor", use: StreamUse, rotation: Rotation, gain: "Tensor | None" = None
) -> "Tensor":
    """One tensor as the rotated slice has it.

    It has the rotation's type, float64 except while a rotation is being refined.

    Args:
        tensor: as the donor has it; maps `[out, in]` unless `use` says otherwise, embeddings and
            heads `[v, d]`.
        use: how it uses the residual stream.
        rotation: from the donor's basis to the new one.
        gain: the norm's gain `[d]` that `use` names.

    Raises:
        FrankenmergeError: for a norm that adds a shift where its gain is zero: no map after it
            could absorb that.
    """
    tensor, matrix = tensor.to(rotation.matrix.dtype), rotation.matrix.to(tensor.device)
    if use.kind == "inside":
        return tensor
    if use.kind == "gain":
        return tensor.new_ones(tensor.shape)
    if use.kind in ("added", "rows") or (use.kind == "write" and use.transposed):
        return tensor @ rotation.writes.to(tensor.device)
    if use.kind == "write":
        return rotation.writes.T.to(tensor.device) @ tensor
    assert gain is not None and use.gain is not None
    gain = gain.to(matrix.dtype)
    if use.kind == "read":
        return matrix.T @ (gain[:, None] * tensor) if use.transposed else (tensor * gain) @ matrix
    if not gain.all():
        raise fail(
            use.gain,
            "gains that are not zero, where the norm has a bias",
            "zeros",
            "use another donor, or splice without a gauge",
        )
    return (tensor / gain) @ matrix


def rotate_all(
    tensors: Mapping[str, "Tensor"], architecture: Architecture, rotation: Rotation
) -> dict[str, "Tensor"]:
    """Rotate the tensors of one block, or those outside the blocks; in the rotation's type.

    Args:
        tensors: by canonical name, the norms' gains among them.
        architecture: of their family.
        rotation: from the donor's basis to the new one.
    """
    places = {name: stream_use(architecture, name) for name in tensors}
    return {
        name: rotated(tensors[name], use, rotation, tensors[use.gain] if use.gain else None)
        for name, use in places.items()
    }


def procrustes(source: "Tensor", target: "Tensor", *, centred: bool = False) -> Rotation:
    """The rotation and scale from `source` to `target` by least squares (Schoenemann 1966).

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
    """Share of the target's squared length left over, for states `[n, d]`: 1 minus R^2 about 0."""
    left = target.double() - rotation.scale * source.double() @ rotation.matrix
    return float(left.square().sum() / target.double().square().sum())


def random_rotation(width: int, seed: int, *, centred: bool = False) -> Rotation:
    """A uniformly random rotation, the null of any fit; `centred` keeps the all-ones direction."""
    import torch

    samples = torch.randn(
        2, width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return Rotation(procrustes(samples[0], samples[1], centred=centred).matrix)


def gauge_faults(architecture: Architecture, names: Iterable[str], place: str) -> list[Fault]:
    """What keeps tensors of these canonical names from being rotated; once for a family."""
    names = list(names)
    try:
        for gain in [gain for name in names if (gain := stream_use(architecture, name).gain)]:
            if gain not in names:
                raise fail(
                    gain,
                    "the norm before the maps that read it, one for each",
                    "none",
                    "splice without a gauge",
                )
    except FrankenmergeError as error:
        return [fault._replace(place=f"{place}: {fault.place}") for fault in error.faults]
    return []
