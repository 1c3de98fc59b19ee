"""The merge methods as a table: their parameters and how many models they take. Importing it does not import torch.

Names and defaults are mergekit's. `span.py`, `sparse.py` and `fusion.py` hold the formulas;
`combine.py` runs them by torch, `native.py` in C.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from frankenmerge.errors import Fault

Value = float | int | bool


class Parameter(NamedTuple):
    """A parameter of a method."""

    default: Value | None
    """None: it must be given. Its type is the parameter's: a bool also takes 0 and 1, an int a
    whole float.
    """
    per_model: bool
    """One value for every model but the base; otherwise one for the whole tensor."""
    low: float = -math.inf
    high: float = math.inf
    """The range of allowed values, both ends included."""


@dataclass(frozen=True)
class Method:
    """What a recipe may say to a method."""

    parameters: Mapping[str, Parameter]
    base: Literal["none", "optional", "required"]
    """`none`: a base has no part in it; a model that the recipe calls base and lists is a model
    like the others.
    """
    models: tuple[int, int | None]
    """The fewest and the most models, the base not counted: slerp's two models are its base and one
    other.
    """
    random: bool = False
    """Whether the result depends on the seed."""
    divides: str | None = None
    """The parameter that has it divide by the sum of all weights (one that is not a switch: it
    always does).
    """


_WEIGHT = {"weight": Parameter(None, True)}
_DENSITY = {"density": Parameter(1.0, True, 0, 1)}
_GAMMA = {"gamma": Parameter(0.01, True, 0, 1)}
_EPSILON = {"epsilon": Parameter(0.15, True, 0, 1)}
_INT8_MASK = {"int8_mask": Parameter(False, False)}
"""Accepted because recipes carry it; without effect, since no mask is larger than a chunk."""


def _task(
    normalize: bool,
    rescale: bool,
    extra: dict[str, Parameter] | None = None,
    *,
    random: bool = False,
    consensus: bool = False,
) -> Method:
    shared = {
        "normalize": Parameter(normalize, False),
        "rescale": Parameter(rescale, False),
        "lambda": Parameter(1.0, False),
    }
    parameters = _WEIGHT | _DENSITY | (extra or {}) | shared | _INT8_MASK
    # with sign consensus the divisor is the sum of the weights that agree
    return Method(parameters, "required", (1, None), random, None if consensus else "normalize")


METHODS: dict[str, Method] = {
    "passthrough": Method({"scale": Parameter(1.0, True)}, "none", (1, 1)),
    "linear": Method(
        _WEIGHT | {"normalize": Parameter(True, False)}, "none", (1, None), divides="normalize"
    ),
    "slerp": Method({"t": Parameter(None, False, 0, 1)}, "required", (1, 1)),
    "nuslerp": Method(
        _WEIGHT
        | {"nuslerp_row_wise": Parameter(False, False), "nuslerp_flatten": Parameter(True, False)},
        "optional",
        (2, 2),
        divides="weight",
    ),
    "multislerp": Method(
        _WEIGHT | {"normalize_weights": Parameter(True, False), "eps": Parameter(1e-8, False, 0)},
        "optional",
        (1, None),
        divides="normalize_weights",
    ),
    "karcher": Method(
        {"max_iter": Parameter(10, False, 0), "tol": Parameter(1e-5, False, 0)}, "none", (1, None)
    ),
    "task_arithmetic": _task(False, False),
    "ties": _task(True, False, consensus=True),
    "dare_linear": _task(False, True, random=True),
    "dare_ties": _task(False, True, random=True, consensus=True),
    "breadcrumbs": _task(False, False, _GAMMA),
    "breadcrumbs_ties": _task(False, False, _GAMMA, consensus=True),
    "della": _task(True, True, _EPSILON, random=True, consensus=True),
    "della_linear": _task(False, True, _EPSILON, random=True),
    "model_stock": Method({"filter_wise": Parameter(False, False)}, "required", (2, None)),
    "nearswap": Method({"t": Parameter(None, False, 0)}, "required", (1, 1)),
    "arcee_fusion": Method({}, "required", (1, 1)),
    "sce": Method({"select_topk": Parameter(1.0, False, 0, 1)} | _INT8_MASK, "required", (1, None)),
    "ram": Method({"epsilon": Parameter(1e-5, False, 0)}, "required", (1, None)),
    "ramplus_tl": Method(
        {
            "r": Parameter(0.1, False, 0),
            "alpha": Parameter(0.2, False, 0),
            "epsilon": Parameter(1e-5, False, 0),
        },
        "required",
        (1, None),
    ),
}
"""Every method by its name in a recipe."""


def resolved(method: str, given: Mapping[str, Value], *, per_model: bool) -> dict[str, Value]:
    """The parameters of one model (or of the whole tensor), defaults filled in, each of its own type; `given` has no faults."""
    values: dict[str, Value] = {}
    for name, parameter in METHODS[method].parameters.items():
        if parameter.per_model == per_model:
            values[name] = (
                given[name]
                if parameter.default is None
                else type(parameter.default)(given.get(name, parameter.default))
            )
    return values


def faults(
    method: str,
    models: Sequence[Mapping[str, Value]],
    parameters: Mapping[str, Value],
    *,
    base: bool,
    place: str,
) -> list[Fault]:
    """Everything that is wrong with what a method was given, the tensors' values left aside.

    Args:
        method: a key of `METHODS`.
        models: each model's own parameters, the base's not among them.
        parameters: those of the whole tensor.
        base: whether there is a base.
        place: what the faults name: the recipe's key, or the tensor.
    """
    spec = METHODS[method]
    found = list(_number_faults(spec, method, len(models), base, place))
    for number, given in enumerate([parameters, *models]):
        owner = f"{place}, model {number}" if number else place
        for name, parameter in spec.parameters.items():
            if parameter.per_model == bool(number):
                found += _value_faults(name, parameter, given.get(name, parameter.default), owner)
        wrong = [
            name
            for name in given
            if name not in spec.parameters or spec.parameters[name].per_model != bool(number)
        ]
        known = (
            ", ".join(
                name
                for name, parameter in spec.parameters.items()
                if parameter.per_model == bool(number)
            )
            or "none"
        )
        found += [
            Fault(
                owner, f"parameters of {method}: {known}", name, "correct or remove the parameter"
            )
            for name in wrong
        ]
    return found or list(
        _joint_faults(method, models, resolved(method, parameters, per_model=False), place)
    )


def _number_faults(
    spec: Method, method: str, count: int, base: bool, place: str
) -> Iterator[Fault]:
    low, high = spec.models
    if count < low or (high is not None and count > high):
        expected = (
            f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
        )
        beside = " beside the base" if spec.base != "none" else ""
        yield Fault(
            place,
            f"{expected} model{'s' * (expected != '1')}{beside} for {method}",
            f"{count}",
            "add or remove models",
        )
    if spec.base == "required" and not base:
        yield Fault(place, f"a base model, which {method} needs", "none", "name one as base_model")


def _value_faults(
    name: str, parameter: Parameter, value: Value | None, owner: str
) -> Iterator[Fault]:
    if (expected := unfit(parameter, value)) is not None:
        yield Fault(
            owner, f"{name}: {expected}", "nothing" if value is None else repr(value), f"set {name}"
        )


def unfit(parameter: Parameter, value: Value | None) -> str | None:
    """What a value should be, None where it is fit."""
    if isinstance(parameter.default, bool):
        return None if value in (0, 1) else "true or false"
    if isinstance(value, bool):
        return "a number"
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "a finite number"
    if isinstance(parameter.default, int) and value != int(value):
        return "a whole number"
    return (
        None
        if parameter.low <= value <= parameter.high
        else f"a number from {parameter.low:g} to {parameter.high:g}"
    )


def _joint_faults(
    method: str, models: Sequence[Mapping[str, Value]], shared: Mapping[str, Value], place: str
) -> Iterator[Fault]:
    divides = METHODS[method].divides
    weights = (
        [given["weight"] for given in models] if divides and shared.get(divides, True) else [1.0]
    )
    if abs(math.fsum(weights)) <= 1e-8 * math.fsum(map(abs, weights)):
        found = " + ".join(map(str, weights)) + " = 0"
        remedy = (
            f"change a weight, or set {divides}: false" if divides in shared else "change a weight"
        )
        yield Fault(
            place, "weights whose sum is not 0, since they are divided by it", found, remedy
        )
    if "epsilon" in METHODS[method].parameters and METHODS[method].parameters["epsilon"].per_model:
        for number, given in enumerate(models, 1):
            values = resolved(method, given, per_model=True)
            density, epsilon = values["density"], values["epsilon"]
            if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                found = f"{density:g} - {epsilon:g} and {density:g} + {epsilon:g}"
                yield Fault(
                    f"{place}, model {number}",
                    "density - epsilon above 0 and density + epsilon below 1",
                    found,
                    "choose a smaller epsilon",
                )
