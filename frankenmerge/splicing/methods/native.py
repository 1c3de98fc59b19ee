"""Merge methods in C, on the CPU. Importing this module does not import torch."""

from collections.abc import Iterator

from frankenmerge.splicing.methods import native_chunks, native_span, native_sparse
from frankenmerge.splicing.methods.span import Combination
from frankenmerge.splicing.methods.sparse import Thinned


def can(method: Combination | Thinned) -> bool:
    """Whether the extension is built and supports this."""
    return native_chunks.extension is not None and supports(method)


def supports(method: Combination | Thinned) -> bool:
    """Whether the extension supports this, if it is built: coefficients per tensor only."""
    return isinstance(method, Thinned) or method.per == "tensor"


def rounded(
    method: Combination | Thinned, dtype: str, *, allow_nan: bool
) -> Iterator[tuple[memoryview, bool]]:
    """Yield the merged tensor in chunks, as `native_chunks.written_chunks` does."""
    if isinstance(method, Combination):
        return native_span.rounded(method, dtype, allow_nan=allow_nan)
    return native_sparse.rounded(method, dtype, allow_nan=allow_nan)
