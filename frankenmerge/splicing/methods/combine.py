"""Run a merge method in torch, on tensors that need not fit in memory.

A method is a function of its `Inputs` that computes its statistics, reading the tensors as often as
necessary, and returns a `ChunkRule` that computes any chunk of the result. Statistics are summed
over fixed blocks, and random masks are a function of the element's index, so the chunk size does
not change any bit of the result. Arithmetic is float32, with separate multiplications and additions
(a fused operation rounds differently in the last, unvectorised elements of a chunk); sums over a
tensor are float64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from frankenmerge.splicing.methods import Value, fusion, span, sparse, torch_span, torch_sparse
from frankenmerge.splicing.methods.inputs import BLOCK, ChunkRule, Inputs, Operand, inputs_of

RULES: dict[str, Callable[[Inputs], ChunkRule]] = {
    **{
        name: lambda inputs, rule=rule: torch_span.chunk_rule(rule(inputs))
        for name, rule in span.RULES.items()
    },
    **{
        name: lambda inputs, rule=rule: torch_sparse.chunk_rule(rule(inputs))
        for name, rule in sparse.RULES.items()
    },
    "nearswap": fusion.nearswap,
    "arcee_fusion": fusion.arcee_fusion,
    "sce": fusion.sce,
    "ram": fusion.ram,
    "ramplus_tl": fusion.ramplus_tl,
}


def combine(
    method: str,
    models: Sequence[Operand],
    base: Operand | None,
    *,
    shape: tuple[int, ...],
    parameters: Mapping[str, Value],
    name: str,
    seed: int,
    chunk: int = BLOCK,
) -> Iterator[Tensor]:
    """Yield the merged tensor in flat float32 chunks, each valid until the next is requested.

    Args:
        method: a key of `METHODS`.
        models: the models' tensors, without the base. For slerp, the one model that is not the
            base.
        base: the base's tensor. Its parameters are ignored, and so is the base if the method has
            none.
        shape: the common shape of the tensors. Rows run along the last dimension.
        parameters: the parameters of the whole tensor. Missing ones have their defaults, as in
            `models`.
        name: the tensor's name, used in errors and in the seed of random masks.
        seed: the seed of random masks.
        chunk: elements per chunk. Methods that process rows use whole rows: as many as fit, at
            least one.

    Raises:
        FrankenmergeError: when the first chunk is requested, if the method does not accept the
            parameters or the number of models (all faults together), or if the statistics of the
            tensors are not finite.
    """
    inputs = inputs_of(
        method, models, base, shape=shape, parameters=parameters, name=name, seed=seed
    )
    if not inputs.size:
        return
    rule = RULES[method](inputs)
    for start, stop in inputs.spans(chunk, rows=rule.rows):
        yield rule.chunk(start, stop)
