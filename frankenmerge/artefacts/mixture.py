"""A mixture of experts as mergekit-moe's YAML writes it: donors, and prompts for the gates."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictInt

from frankenmerge.artefacts.recipe_schema import Model, Part
from frankenmerge.errors import Fault

GateMode = Literal["hidden", "cheap_embed", "random", "uniform_random"]
PROMPTED = ("hidden", "cheap_embed")
"""Modes whose gates are made from prompts."""
Kind = Literal["mixtral", "qwen2_moe", "qwen3_moe", "deepseek"]
"""What a mixture may become, by the `model_type` of its config."""
_KINDS = {
    "qwen": "qwen2_moe",
    "qwen2": "qwen2_moe",
    "qwen moe": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "qwen3 moe": "qwen3_moe",
    "deepseek moe": "deepseek",
}
"""Further names in mergekit-moe."""


def _kind(value: Any) -> Any:
    name = value.lower() if isinstance(value, str) else value
    return _KINDS.get(name, name) if isinstance(name, str) else name


Prompts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class Expert(Part):
    """A donor whose MLPs become one expert in every block."""

    source_model: Model
    positive_prompts: Prompts | None = None
    """Texts that should be routed to it."""
    negative_prompts: Prompts | None = None
    """Texts that should not."""
    noise_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Standard deviation of Gaussian noise that is added to its weights."""
    residual_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Factor of what it writes to the residual stream."""


class Mixture(Part):
    """Experts, and how tokens are routed to them; everything else is the base model's."""

    experts: Annotated[list[Expert], Field(min_length=2)]
    shared_experts: Annotated[list[Expert], Field(min_length=1, max_length=1)] | None = None
    """Experts that every token passes."""
    gate_mode: GateMode = "hidden"
    experts_per_token: Annotated[StrictInt, Field(ge=1)] = 2
    architecture: Annotated[Kind | None, BeforeValidator(_kind)] = None
    """What it becomes; by default what fits the donors."""

    @property
    def all_experts(self) -> list[Expert]:
        """The experts, then the shared ones."""
        return [*self.experts, *(self.shared_experts or [])]

    @property
    def gates_from_prompts(self) -> bool:
        """Whether prompts decide what tokens are routed where."""
        return self.gate_mode in PROMPTED


def mixture_faults(mixture: Mixture, place: str) -> Iterator[Fault]:
    """What is wrong with a mixture by itself, other than with single values."""
    count = len(mixture.experts)
    if mixture.experts_per_token > count:
        where, found = f"{place}: experts_per_token", str(mixture.experts_per_token)
        yield Fault(where, f"at most {count}, the number of experts", found, "lower it")
    if not mixture.gates_from_prompts:
        return
    for number, expert in enumerate(mixture.experts):
        if not expert.positive_prompts:
            where = f"{place}: experts[{number}].positive_prompts"
            expected = f"a prompt or more, which gate_mode {mixture.gate_mode} needs"
            yield Fault(where, expected, "none", "add one, or set gate_mode: random")
    prompts = {
        (tuple(each.positive_prompts or ()), tuple(each.negative_prompts or ()))
        for each in mixture.experts
    }
    if len(prompts) == 1 and all(each.positive_prompts for each in mixture.experts):
        expected, found = "prompts that tell the experts apart", "the same for all"
        remedy = "give every expert its own, or set gate_mode: random"
        yield Fault(f"{place}: experts", expected, found, remedy)
