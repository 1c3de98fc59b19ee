"""The merge methods as a table: their parameters and the number of models they take.

Names and defaults are mergekit's. `span.py`, `sparse.py` and `fusion.py` contain the formulas;
`combine.py` runs them in torch, `native.py` in C. Importing this module does not import torch.
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
    """None: the parameter is required. Otherwise the type of the default is that of the parameter:
    for a bool, 0 and 1 are also accepted, for an int a float without a fractional part.
    """
    per_model: bool
    """One value for every model except the base; otherwise one for the whole tensor."""
    low: float = -math.inf
    high: float = math.inf
    """The range of allowed values, both ends inclusive."""
    effect: Literal["smooth", "rough", "none"] = "none"
    """How the result depends on it: with a derivative, in steps, or so that it is not tuned."""


@dataclass(frozen=True)
class Method:
    """What a recipe may specify for a method."""

    parameters: Mapping[str, Parameter]
    base: Literal["none", "optional", "required"]
    """`none`: the method has no base. A model that the recipe both lists and names as base is
    treated like the others.
    """
    models: tuple[int, int | None]
    """Minimum and maximum number of models, not counting the base: slerp's two models are its base
    and one other. None: no maximum.
    """
    random: bool = False
    """Whether the result depends on the seed."""
    divides: str | None = None
    """The parameter that makes the method divide by the sum of all weights. If that parameter is
    not a switch, the method always does.
    """


_WEIGHT = {"weight": Parameter(None, True, effect="smooth")}
_DENSITY = {"density": Parameter(1.0, True, 0, 1, "rough")}
_GAMMA = {"gamma": Parameter(0.01, True, 0, 1, "rough")}
_EPSILON = {"epsilon": Parameter(0.15, True, 0, 1, "rough")}
_INT8_MASK = {"int8_mask": Parameter(False, False)}
"""Accepted because recipes contain it; it has no effect, since no mask is larger than a chunk."""


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
        "lambda": Parameter(1.0, False, effect="smooth"),
    }
    parameters = _WEIGHT | _DENSITY | (extra or {}) | shared | _INT8_MASK
    # with sign consensus the divisor is the sum of the weights that agree
    return Method(parameters, "required", (1, None), random, None if consensus else "normalize")


METHODS: dict[str, Method] = {
    "passthrough": Method({"scale": Parameter(1.0, True, effect="smooth")}, "none", (1, 1)),
    "linear": Method(
        _WEIGHT | {"normalize": Parameter(True, False)}, "none", (1, None), divides="normalize"
    ),
    "slerp": Method({"t": Parameter(None, False, 0, 1, "smooth")}, "required", (1, 1)),
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
    "nearswap": Method({"t": Parameter(None, False, 0, effect="rough")}, "required", (1, 1)),
    "arcee_fusion": Method({}, "required", (1, 1)),
    "sce": Method(
        {"select_topk": Parameter(1.0, False, 0, 1, "rough")} | _INT8_MASK, "required", (1, None)
    ),
    "ram": Method({"epsilon": Parameter(1e-5, False, 0)}, "required", (1, None)),
    "ramplus_tl": Method(
        {
            "r": Parameter(0.1, False, 0, effect="rough"),
            "alpha": Parameter(0.2, False, 0, effect="rough"),
            "epsilon": Parameter(1e-5, False, 0),
        },
        "required",
        (1, None),
    ),
}
"""Every method by its name in a recipe."""


def resolved(method: str, values: Mapping[str, Value], *, per_model: bool) -> dict[str, Value]:
    """Return the parameters of one model or of the whole tensor, with defaults and proper types.

    `values` must have no faults (see `faults`).
    """
    return {
        name: values[name]
        if parameter.default is None
        else type(parameter.default)(values.get(name, parameter.default))
        for name, parameter in _parameters(method, per_model=per_model).items()
    }


def _parameters(method: str, *, per_model: bool) -> dict[str, Parameter]:
    return {
        name: parameter
        for name, parameter in METHODS[method].parameters.items()
        if parameter.per_model == per_model
    }


def faults(
    method: str,
    models: Sequence[Mapping[str, Value]],
    parameters: Mapping[str, Value],
    *,
    base: bool,
    place: str,
    names: Sequence[str] = (),
) -> list[Fault]:
    """Return everything that is wrong with the arguments of a method, except tensor values.

    Args:
        method: a key of `METHODS`.
        models: the parameters of each model, without the base.
        parameters: the parameters of the whole tensor.
        base: whether there is a base.
        place: the place that the faults name: a key of the recipe, or a tensor.
        names: what the models are called; their numbers where that is not known.
    """
    result = list(_number_faults(method, len(models), base, place))
    owners = [
        f"{place}, {name}"
        for name in names or [f"model {number}" for number in range(1, len(models) + 1)]
    ]
    result += _value_faults(method, parameters, place, per_model=False)
    for owner, values in zip(owners, models, strict=True):
        result += _value_faults(method, values, owner, per_model=True)
    return result or [
        *_weight_faults(method, models, parameters, place),
        *_epsilon_faults(method, models, owners),
    ]


def _number_faults(method: str, count: int, base: bool, place: str) -> Iterator[Fault]:
    spec = METHODS[method]
    low, high = spec.models
    if count < low or (high is not None and count > high):
        expected = (
            f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
        )
        besides = " besides the base" if spec.base != "none" else ""
        yield Fault(
            place,
            f"{expected} model{'s' * (expected != '1')}{besides} for {method}",
            f"{count}",
            "add or remove models",
        )
    if spec.base == "required" and not base:
        yield Fault(place, f"a base model, which {method} needs", "none", "name one as base_model")


def _value_faults(
    method: str, values: Mapping[str, Value], owner: str, *, per_model: bool
) -> Iterator[Fault]:
    """Yield the faults of single values: invalid or missing ones, and unknown names."""
    known = _parameters(method, per_model=per_model)
    for name, parameter in known.items():
        value = values.get(name, parameter.default)
        if (expected := unfit(parameter, value)) is not None:
            found = "nothing" if value is None else repr(value)
            yield Fault(owner, f"{name}: {expected}", found, f"set {name}")
    for name in values:
        if name not in known:
            yield Fault(
                owner,
                f"parameters of {method}: {', '.join(known) or 'none'}",
                name,
                "correct or remove the parameter",
            )


def unfit(parameter: Parameter, value: Value | None) -> str | None:
    """Return what a value should be, or None if it is valid."""
    if isinstance(parameter.default, bool):
        return None if value in (0, 1) else "true or false"
    if isinstance(value, bool):
        return "a number"
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "a finite number"
    if isinstance(parameter.default, int) and value != int(value):
        return "a whole number"
    if not parameter.low <= value <= parameter.high:
        return f"a number from {parameter.low:g} to {parameter.high:g}"
    return None


def _weight_faults(
    method: str, models: Sequence[Mapping[str, Value]], parameters: Mapping[str, Value], place: str
) -> Iterator[Fault]:
    """Yield a fault if the weights cancel and the method divides by their sum."""
    switch = METHODS[method].divides
    shared = resolved(method, parameters, per_model=False)
    if not switch or not shared.get(switch, True):
        return
    weights = [values["weight"] for values in models]
    if abs(math.fsum(weights)) <= 1e-8 * math.fsum(map(abs, weights)):
        yield Fault(
            place,
            "weights whose sum is not 0, since they are divided by it",
            " + ".join(map(str, weights)) + " = 0",
            "change a weight" + (f", or set {switch}: false" if switch in shared else ""),
        )


def _epsilon_faults(
    method: str, models: Sequence[Mapping[str, Value]], owners: Sequence[str]
) -> Iterator[Fault]:
    """Yield faults of probabilities `density - epsilon` and `density + epsilon`."""
    if "epsilon" not in _parameters(method, per_model=True):
        return
    for owner, values in zip(owners, models, strict=True):
        own = resolved(method, values, per_model=True)
        density, epsilon = own["density"], own["epsilon"]
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            yield Fault(
                owner,
                "density - epsilon above 0 and density + epsilon below 1",
                f"{density:g} - {epsilon:g} and {density:g} + {epsilon:g}",
                "choose a smaller epsilon",
            )
