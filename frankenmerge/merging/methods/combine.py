"""Run a merge method on tensors that need not fit in memory.

A method is a function of its `Inputs` that gathers its statistics, reading the tensors as often as it must, and returns a `Plan`
that computes any chunk of the result. Statistics are summed over fixed blocks and random masks are a function of the element's
index, so how the result is cut into chunks changes no bit of it. Arithmetic is float32, multiplications and additions apart
(a fused one rounds differently in the last, unvectorised elements of a chunk); what sums over a tensor is float64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from frankenmerge.errors import raise_all
from frankenmerge.merging.methods import METHODS, Value, faults, fusion, resolved, span, sparse
from frankenmerge.merging.methods.inputs import BLOCK, Inputs, Part, Plan

RULES: dict[str, Callable[[Inputs], Plan]] = {
    "passthrough": span.passthrough,
    "linear": span.linear,
    "slerp": span.slerp,
    "nuslerp": span.nuslerp,
    "multislerp": span.multislerp,
    "karcher": span.karcher,
    "task_arithmetic": span.task_arithmetic,
    "model_stock": span.model_stock,
    "ties": sparse.ties,
    "dare_linear": sparse.dare_linear,
    "dare_ties": sparse.dare_ties,
    "breadcrumbs": sparse.breadcrumbs,
    "breadcrumbs_ties": sparse.breadcrumbs_ties,
    "della": sparse.della,
    "della_linear": sparse.della_linear,
    "nearswap": fusion.nearswap,
    "arcee_fusion": fusion.arcee_fusion,
    "sce": fusion.sce,
    "ram": fusion.ram,
    "ramplus_tl": fusion.ramplus_tl,
}


def combine(
    method: str,
    parts: Sequence[Part],
    base: Part | None,
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
        parts: the models' tensors, the base not among them. For slerp the one model that is not the base.
        base: the base's tensor; its parameters are not looked at, nor is it where the method takes none.
        shape: the tensors' common shape; rows run along its last dimension.
        parameters: those of the whole tensor; what is not given has its default, for a model's own too.
        name: the tensor's name: errors give it, and random masks differ with it.
        seed: of the random masks.
        chunk: elements of a chunk. Methods that look at rows take whole ones: as many as fit, at least one.

    Raises:
        FrankenmergeError: when the first chunk is asked for: for parameters or a number of models that the method cannot
            take, all faults together; for tensors whose statistics are not finite.
    """
    raise_all(faults(method, [part.parameters for part in parts], parameters, base=base is not None, place=f"{name} ({method})"))
    complete = [Part(part.read, resolved(method, part.parameters, per_model=True)) for part in parts]
    wanted = None if METHODS[method].base == "none" else base
    inputs = Inputs(complete, wanted, shape, resolved(method, parameters, per_model=False), name, seed)
    if not inputs.size:
        return
    plan = RULES[method](inputs)
    for start, stop in inputs.spans(chunk, rows=plan.rows):
        yield plan.chunk(start, stop)
