from collections.abc import Sequence
from typing import Any

import numpy as np

LANES: int

_Memory = bytes | bytearray | memoryview | np.ndarray[Any, Any]

def combine(
    inputs: Sequence[tuple[_Memory, str]], coefficients: Sequence[float], relative: bool, result: _Memory, type: str, /
) -> tuple[int, bool]: ...
def products(inputs: Sequence[tuple[_Memory, str]], relative: bool, finite_only: bool, sums: _Memory, /) -> int: ...
