"""Rows for tokens that a model never had: weighted sums of the rows of tokens that it has.

A token that both vocabularies have keeps the model's row. Any other is put together from pieces
that the model knows, or stands in the donor's embedding among tokens that both know, and gets the
same place among their rows in the model: a sparse combination found by orthogonal matching pursuit
(Pati et al. 1993; for tokenizers Goddard and Fernandes Neto 2025), an affine combination of
neighbours (the weights of locally linear embedding, Roweis and Saul 2000), or a mean of the
nearest. Means are shorter than what they are taken of, which does no harm: the other combinations
get the length of the donor's row, in units of the rows that both know.
"""

from typing import TYPE_CHECKING, NamedTuple

from frankenmerge.artefacts.recipe_schema import Approximation
from frankenmerge.splicing.token_maps import NO_ROW, TokenMap

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 256
"""Tokens that are approximated at a time."""
RIDGE = 0.01
"""Of barycentric weights, relative to the sum of squared distances."""
TEMPERATURE = 0.1
"""Of the weights of nearest anchors, in cosine."""


class Weighted(NamedTuple):
    """Rows as weighted sums of others."""

    rows: "Tensor"
    """Of the anchors, int64 `[n, k]`."""
    weights: "Tensor"
    """float32 `[n, k]`."""


def transplanted(
    matrix: "Tensor",
    reference: "Tensor | None",
    tokens: TokenMap,
    approximation: Approximation,
    anchors: int,
) -> "Tensor":
    """The rows of a new vocabulary.

    Args:
        matrix: the model's embedding or head, float32 `[v_m, d]`, or a bias, `[v_m]`.
        reference: the same of the donor of the vocabulary, float32 `[v_d, d_d]`. Without it tokens
            are put together from pieces.
        tokens: of the result.
        approximation: for tokens that the model lacks; one without known pieces is approximated by
            `nearest`, the mean row where there is no reference.
        anchors: the most tokens that one is approximated by.

    Returns:
        float32 `[v, d]` or `[v]`, on the device of the matrix. Rows behind the reference are zeros.
    """
    import torch

    if matrix.dim() == 1:
        return transplanted(matrix[:, None], reference, tokens, "pieces", anchors).squeeze(1)
    exact = torch.from_numpy(tokens.exact).long().to(matrix.device)
    known = exact != NO_ROW
    made = matrix[exact.clamp_min(0)] * known[:, None]
    shared = known.nonzero().squeeze(1)
    if approximation == "pieces" or reference is None:
        composed = torch.from_numpy(tokens.composed).to(matrix.device)
        listed = torch.from_numpy(tokens.pieces).long().to(matrix.device)[composed]
        used = (listed != NO_ROW).to(matrix.dtype)
        sums = (matrix[listed.clamp_min(0)] * used[:, :, None]).sum(1)
        made[composed] = sums / used.sum(1, keepdim=True)
        known = known | composed
    missing = (~known).nonzero().squeeze(1)
    here = matrix[exact[shared]]
    if reference is None:
        made[missing] = here.mean(0)
        return made
    find = FINDERS.get(approximation, nearest)
    shared = shared[shared < len(reference)]
    there, here = reference[shared], matrix[exact[shared]]
    size = here.norm(dim=1).mean() / there.norm(dim=1).mean()
    for part in missing[missing < len(reference)].split(BATCH):
        found = find(reference[part], there, min(anchors, len(shared)))
        rows = (found.weights[:, :, None] * here[found.rows]).sum(1)
        if find is not nearest:
            # Weights of any sign may add up to rows far longer than any the model has.
            length = size * reference[part].norm(dim=1, keepdim=True)
            rows = torch.nn.functional.normalize(rows, dim=1) * length
        made[part] = rows
    return made


def orthogonal_matching_pursuit(targets: "Tensor", anchors: "Tensor", count: int) -> Weighted:
    """Sparse combinations of anchors, one anchor after the other.

    Each is the one most aligned with what is left of the target; then the target is projected on
    all that were chosen.

    Args:
        targets: `[n, d]`.
        anchors: `[m, d]`.
        count: of anchors for each target, at most `m`.
    """
    import torch

    n, width = targets.shape
    count = min(count, width)
    unit = torch.nn.functional.normalize(anchors, dim=1)
    left, everyone = targets.clone(), torch.arange(n)
    rows = targets.new_zeros(n, count, dtype=torch.long)
    # Orthonormal, of the anchors chosen so far (Gram-Schmidt, twice for accuracy).
    basis = targets.new_zeros(n, count, width)
    taken = targets.new_zeros(n, len(anchors), dtype=torch.bool)
    for step in range(count):
        closest = (left @ unit.T).abs().masked_fill_(taken, -1).argmax(1)
        rows[:, step], taken[everyone, closest] = closest, True
        direction = unit[closest]
        for _ in range(2):
            inside = torch.einsum("nkd,nd->nk", basis[:, :step], direction)
            direction = direction - torch.einsum("nkd,nk->nd", basis[:, :step], inside)
        basis[:, step] = torch.nn.functional.normalize(direction, dim=1)
        left -= basis[:, step] * (basis[:, step] * left).sum(1, keepdim=True)
    chosen = anchors[rows].transpose(1, 2)
    # Anchors that depend on each other get the combination of least norm.
    weights = torch.linalg.pinv(chosen, rtol=1e-4) @ targets[:, :, None]
    return Weighted(rows, weights.squeeze(2))


def barycentric(targets: "Tensor", anchors: "Tensor", count: int) -> Weighted:
    """Affine combinations (weights sum to 1) of the nearest anchors that come closest to a target.

    Args and shapes as `orthogonal_matching_pursuit`.
    """
    import torch

    _, rows = torch.cdist(targets, anchors).topk(count, dim=1, largest=False)
    edges = anchors[rows] - targets[:, None]
    products = edges @ edges.transpose(1, 2)
    size = products.diagonal(dim1=1, dim2=2).sum(1)
    # Regularised as in locally linear embedding: more neighbours than dimensions fit in many ways.
    ridge = (RIDGE * size + torch.finfo(size.dtype).tiny)[:, None, None] * torch.eye(
        count, device=size.device
    )
    weights = torch.linalg.solve(
        products + ridge, targets.new_ones(len(targets), count, 1)
    ).squeeze(2)
    return Weighted(rows, weights / weights.sum(1, keepdim=True))


def nearest(targets: "Tensor", anchors: "Tensor", count: int) -> Weighted:
    """The nearest anchors by cosine, centred; their weights fall off with the angle (softmax).

    Args and shapes as `orthogonal_matching_pursuit`.
    """
    import torch

    centre = anchors.mean(0)
    unit = torch.nn.functional.normalize(anchors - centre, dim=1)
    similar, rows = (torch.nn.functional.normalize(targets - centre, dim=1) @ unit.T).topk(count, 1)
    return Weighted(rows, torch.softmax(similar / TEMPERATURE, 1))


FINDERS = {
    "omp": orthogonal_matching_pursuit,
    "barycentric": barycentric,
    "nearest": nearest,
}
"""How anchors are found, by the name of the approximation."""
