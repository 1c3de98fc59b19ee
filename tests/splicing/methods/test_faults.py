"""Faults of a method's parameters and number of models."""

import math

import numpy as np
import pytest
from method_cases import NAME, part_of

from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.methods import METHODS, faults
from frankenmerge.splicing.methods.combine import combine

X = np.arange(1.0, 7.0).reshape(2, 3)
W = {"weight": 1.0}


@pytest.mark.parametrize(
    ("method", "models", "parameters", "base", "expected"),
    [
        ("linear", [W, {"weight": -1}], {}, False, "1.0 + -1 = 0"),
        ("linear", [{"weight": 0.0}], {}, False, "= 0"),
        ("linear", [{"weight": 0.1}, {"weight": 0.2}, {"weight": -0.3}], {}, False, "= 0"),
        ("nuslerp", [W, {"weight": -1.0}], {}, False, "= 0"),
        ("multislerp", [W, {"weight": -1.0}], {}, False, "= 0"),
        ("task_arithmetic", [W, {"weight": -1.0}], {"normalize": True}, True, "= 0"),
        ("dare_linear", [W, {"weight": -1.0}], {"normalize": 1}, True, "= 0"),
        ("linear", [{}], {}, False, "weight"),
        ("linear", [{"weight": math.nan}], {}, False, "nan"),
        ("linear", [{"weight": "1"}], {}, False, "'1'"),
        ("linear", [W], {"normalise": True}, False, "normalise"),
        ("linear", [W], {"normalize": 0.5}, False, "true or false"),
        ("linear", [], {}, False, "1 or more"),
        ("slerp", [{}], {"t": math.nan}, True, "nan"),
        ("slerp", [{}], {"t": 1.1}, True, "0 to 1"),
        ("slerp", [{}], {}, True, "nothing"),
        ("slerp", [{}], {"t": 0.5}, False, "base"),
        ("slerp", [{}, {}], {"t": 0.5}, True, "1 model besides the base"),
        ("karcher", [{}], {"max_iter": 2.5}, False, "whole"),
        ("ties", [W | {"density": 1.5}], {}, True, "model 1"),
        ("ties", [W], {"weight": 1.0}, True, "weight"),
        ("della", [W | {"density": 0.9}], {}, True, "0.9 + 0.15"),
        ("della", [W, W | {"density": 0.15}], {}, True, "model 2"),
        ("nearswap", [{}], {"t": -1.0}, True, "0 to inf"),
    ],
)
def test_faults(method, models, parameters, base, expected):
    result = faults(method, models, parameters, base=base, place="recipe.yaml")
    assert len(result) == 1
    assert expected in str(result[0])
    assert "recipe.yaml" in result[0].place
    with pytest.raises(FrankenmergeError, match="layers.0.weight"):
        next(
            combine(
                method,
                [part_of(X, model) for model in models],
                part_of(X) if base else None,
                shape=X.shape,
                parameters=parameters,
                name=NAME,
                seed=0,
            )
        )


def test_all_faults_at_once():
    result = faults(
        "ties",
        [{"weight": math.inf, "density": -1}, {}],
        {"lambda": None, "lamda": 1},
        base=False,
        place="p",
    )
    assert len(result) == 6


def test_no_fault_where_weights_cancel_but_nothing_divides_by_them():
    opposite = [{"weight": 1.0}, {"weight": -1.0}]
    for method, parameters in (
        ("linear", {"normalize": False}),
        ("task_arithmetic", {}),
        ("ties", {}),
        ("della", {}),
        ("dare_ties", {"normalize": True}),
    ):
        assert not faults(
            method,
            [
                given | ({"density": 0.5} if "density" in METHODS[method].parameters else {})
                for given in opposite
            ],
            parameters,
            base=True,
            place="p",
        )
