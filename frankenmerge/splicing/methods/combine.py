"""Run a merge method, by torch, on tensors that need not fit in memory.

A method is a function of its `Inputs` that gathers its statistics, reading the tensors as often as
it must, and returns a `ChunkRule` that computes any chunk of the result. Statistics are summed over
fixed blocks and random masks are a function of the element's index, so how the result is cut into
chunks changes no bit of it. Arithmetic is float32, multiplications and additions apart (a fused one
rounds differently in the last, unvectorised elements of a chunk); what sums over a tensor is
float64.
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
    """Yield the merged tensor in flat float32 chunks, in order; each is good until the next is asked for.

    Args:
        method: a key of `METHODS`.
        models: the models' tensors, the base not among them. For slerp the one model that is not the
            base.
        base: the base's tensor; its parameters are not looked at, nor is it where the method takes
            none.
        shape: the tensors' common shape; rows run along its last dimension.
        parameters: those of the whole tensor; what is not given has its default, for a model's own
            too.
        name: the tensor's name: errors give it, and random masks differ with it.
        seed: of the random masks.
        chunk: elements of a chunk. Methods that look at rows take whole ones: as many as fit, at
            least one.

    Raises:
        FrankenmergeError: when the first chunk is asked for: for parameters or a number of models
            that the method cannot take, all faults together; for tensors whose statistics are not
            finite.
    """
    inputs = inputs_of(
        method, models, base, shape=shape, parameters=parameters, name=name, seed=seed
    )
    if not inputs.size:
        return
    rule = RULES[method](inputs)
    for start, stop in inputs.spans(chunk, rows=rule.rows):
        yield rule.chunk(start, stop)
