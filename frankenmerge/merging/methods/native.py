"""What of the merge methods C computes, on the CPU. Imports no torch."""

from collections.abc import Iterator

from frankenmerge.merging.methods import native_chunks, native_span, native_sparse
from frankenmerge.merging.methods.span import Combination
from frankenmerge.merging.methods.sparse import RowOdds, Thinned


def can(method: Combination | Thinned) -> bool:
    """Whether the extension is there and does this: no coefficients, and no odds, of single rows."""
    if native_chunks.extension is None:
        return False
    if isinstance(method, Combination):
        return method.per == "tensor"
    return not any(isinstance(keep, RowOdds) for keep in method.keeps)


def rounded(method: Combination | Thinned, dtype: str, *, allow_nan: bool) -> Iterator[tuple[memoryview, bool]]:
    """The merged tensor in chunks, as `native_chunks.written` yields them."""
    if isinstance(method, Combination):
        return native_span.rounded(method, dtype, allow_nan=allow_nan)
    return native_sparse.rounded(method, dtype, allow_nan=allow_nan)
