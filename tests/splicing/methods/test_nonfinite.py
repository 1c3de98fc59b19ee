"""Values that are not finite, or too large to be squared."""

import math

import numpy as np
import pytest
from method_cases import NAME, cases, example, merged

from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.methods import METHODS, span


def test_values_too_large_to_be_squared_are_an_error_that_names_the_tensor():
    for method in ("slerp", "nuslerp", "multislerp", "karcher", "model_stock"):
        for count, with_base, models, parameters in cases(method):
            base, xs = example((3, 4))
            xs[0][1, 1] = 1e30
            with pytest.raises(FrankenmergeError, match=f"{NAME}\n.*squared"):
                merged(method, xs[:count], base if with_base else None, models, **parameters)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("nonfinite", ["model", "base"])
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_inf_affect_only_their_own_element(method, nonfinite, value):
    for count, with_base, models, parameters in cases(method):
        base, xs = example((6, 20))
        if nonfinite == "model":
            xs[0][2, 3] = value
        elif with_base:
            base[2, 3] = value
        found = merged(method, xs[:count], base if with_base else None, models, **parameters)
        assert set(map(tuple, np.argwhere(~np.isfinite(found)))) <= {(2, 3)}, (
            count,
            with_base,
            models,
            parameters,
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", [name for name in span.RULES if name != "passthrough"])
def test_lengths_and_angles_are_those_of_the_finite_elements(method, value):
    for count, with_base, models, parameters in cases(method):
        base, xs = example((6, 20))
        replaced = [x.copy() for x in xs]
        xs[0][2, 3] = value
        # a value that adds nothing to inner products; for slerp those are of the models themselves
        replaced[0][2, 3] = base[2, 3] if with_base and method != "slerp" else 0
        found, wanted = (
            merged(method, some[:count], base if with_base else None, models, **parameters)
            for some in (xs, replaced)
        )
        assert not np.isfinite(found[2, 3]) or method == "linear"
        found[2, 3] = wanted[2, 3]
        assert found.tobytes() == wanted.tobytes(), (count, with_base, models, parameters)
