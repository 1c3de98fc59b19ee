from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import BitGenerator

LANES: int

_Memory = bytes | bytearray | memoryview | np.ndarray[Any, Any]
_Inputs = Sequence[tuple[_Memory, str]]
Keep = tuple[int, int, int, int] | tuple[BitGenerator, int] | tuple[_Memory, _Memory] | None

def combine(
    inputs: _Inputs, coefficients: Sequence[float], relative: bool, result: _Memory, type: str, /
) -> tuple[int, bool]: ...
def products(inputs: _Inputs, relative: bool, finite_only: bool, sums: _Memory, /) -> int: ...
def count(inputs: _Inputs, upper: int | None, counts: _Memory, /) -> int: ...
def find(inputs: _Inputs, key: int, nth: int, /) -> tuple[int, int]: ...
def row_limits(inputs: _Inputs, limits: _Memory, result: _Memory, /) -> int: ...
def sum_magnitudes(
    inputs: _Inputs, keep: Keep, start: int, finite_only: bool, sums: _Memory, /
) -> int: ...
def thin(
    inputs: _Inputs,
    terms: Sequence[tuple[float, float, Keep]],
    start: int,
    consensus: bool,
    least: float,
    factor: float,
    result: _Memory,
    type: str,
    /,
) -> tuple[int, bool]: ...
