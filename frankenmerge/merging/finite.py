"""Look for NaN and Inf in tensors on disk, without torch."""

from collections.abc import Sequence

from frankenmerge.errors import Fault
from frankenmerge.splicing.operations import Operation, readings
from frankenmerge.splicing.reading import not_finite, read_fully
from frankenmerge.storage.dtypes import DTYPES

CHUNK = 8 << 20
"""Bytes read at a time."""


def finite_faults(operations: Sequence[Operation]) -> list[Fault]:
    """Read every tensor that operations use; a fault for each that holds NaN or Inf."""
    import numpy as np

    faults = []
    read = (reading for operation in operations for reading in readings(operation))
    for donor, source, tensor in dict.fromkeys(read):
        dtype = DTYPES[tensor.dtype]
        if dtype.exponent is None:
            continue
        with tensor.file.open("rb", buffering=0) as handle:
            for start in range(0, tensor.bytes, CHUNK):
                stop = min(start + CHUNK, tensor.bytes)
                content = read_fully(handle.fileno(), tensor, start, stop)
                bits = np.frombuffer(content, f"<u{dtype.bytes}")
                # Only NaN and Inf have all bits of the exponent set.
                if ((bits & dtype.exponent) == dtype.exponent).any():
                    faults.append(not_finite(donor, source))
                    break
    return faults
