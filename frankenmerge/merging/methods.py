"""The merge methods: what each is called and which parameters it takes."""

from typing import Literal, NamedTuple


class Parameter(NamedTuple):
    """One parameter of a method."""

    default: float | int | bool | None = None
    """None where the recipe has to give it."""
    per_model: bool = False
    low: float | None = None
    high: float | None = None


class Method(NamedTuple):
    """What a recipe may say to a method."""

    parameters: dict[str, Parameter]
    base: Literal["none", "optional", "required"] = "none"
    models: tuple[int, int | None] = (1, None)
    """Fewest and most models, the base not counted."""
    random: bool = False


_WEIGHT = Parameter(None, True)
_TASK = {"weight": _WEIGHT, "density": Parameter(1.0, True, 0.0, 1.0), "lambda": Parameter(1.0)}

METHODS: dict[str, Method] = {
    "passthrough": Method({"scale": Parameter(1.0, True)}, models=(1, 1)),
    "linear": Method({"weight": _WEIGHT, "normalize": Parameter(True)}),
    "slerp": Method({"t": Parameter(None, low=0.0, high=1.0)}, "required", (1, 1)),
    "ties": Method(_TASK | {"normalize": Parameter(True)}, "required"),
    "dare_ties": Method(_TASK | {"normalize": Parameter(False), "rescale": Parameter(True)}, "required", random=True),
    "task_arithmetic": Method(_TASK | {"normalize": Parameter(False)}, "required"),
    "model_stock": Method({"filter_wise": Parameter(False)}, "required", (2, None)),
}
