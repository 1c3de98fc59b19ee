"""What a recipe gives its method: models and parameters, and whether they are valid."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from frankenmerge.artefacts.recipe import WITHOUT_EFFECT, Recipe
from frankenmerge.artefacts.recipe_parameters import Value, filters, resolve, values
from frankenmerge.artefacts.recipe_schema import Slice, Source, Whole
from frankenmerge.errors import Fault
from frankenmerge.splicing.methods import METHODS, Method, unfit

_OF_ANY_METHOD = {name for method in METHODS.values() for name in method.parameters} | {
    "embed_slerp",
    "random_seed",
    "residual_weight",
}
"""Parameters that published recipes have, also under methods that do not read them."""
_USUAL_FILTERS = {
    *(
        "modelnorm",
        "model.norm",
        "final_norm",
        "ln_f",
        "lm_head",
        "embed_out",
        "embed_tokens",
        "wte",
    ),
    *(
        "layernorm",
        "layer_norm",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "rotary_emb",
    ),
    *("self_attn", "attention", "attn", "mlp", "block_sparse_moe", "gate"),
    *(f"{name}_proj" for name in ("q", "k", "v", "o", "qkv", "gate", "up", "down", "gate_up")),
    *("q_norm", "k_norm", "bias"),
}
"""Filters that published recipes have for models whose tensors have such names."""
PLAIN = "passthrough"
"""The method of tensors that a single donor gives."""


class Taken(NamedTuple):
    """What one slice is made of."""

    method: str
    """PLAIN where a slice has one source only and the recipe's method needs more: that source's
    blocks stay as they are.
    """
    sources: list[Source]
    base: Source | None
    """None of the sources."""


def taken(recipe: Recipe, part: Slice) -> Taken:
    """Separate a slice's models from its base, which is the first source of that name.

    A base that is no source of the slice gives the blocks of the range that all sources share.
    """
    method = METHODS[recipe.merge_method]
    if _lone(method, part.sources):
        return Taken(PLAIN, part.sources, None)
    name = part.base_model or recipe.base_model
    if method.base == "none" or name is None:
        return Taken(recipe.merge_method, part.sources, None)
    listed = next((source for source in part.sources if source.model == name), None)
    base = listed or Source(model=name, layer_range=part.sources[0].layer_range)
    return Taken(
        recipe.merge_method, [source for source in part.sources if source is not base], base
    )


def _lone(method: Method, sources: Sequence[Source | Whole]) -> bool:
    return len(sources) == 1 and method.models[0] + (method.base == "required") > 1


def model_parameters(
    recipe: Recipe, part: Slice, source: Source, tensor: str, t: float
) -> dict[str, Value]:
    """A method's parameters of one model for one of its tensors.

    Required ones that are missing are left out.
    """
    return _resolved(recipe, [source.parameters, part.parameters], tensor, t, per_model=True)


def common_parameters(recipe: Recipe, part: Slice, tensor: str, t: float) -> dict[str, Value]:
    """A method's other parameters, for one tensor of the result."""
    return _resolved(recipe, [part.parameters], tensor, t, per_model=False)


def _resolved(
    recipe: Recipe,
    narrow: list[Mapping[str, Any] | None],
    tensor: str,
    t: float,
    *,
    per_model: bool,
) -> dict[str, Value]:
    """Source before slice before module before recipe."""
    levels = [*narrow, recipe.stack.parameters, recipe.parameters]
    found: dict[str, Value] = {}
    for name, parameter in METHODS[recipe.merge_method].parameters.items():
        if parameter.per_model == per_model:
            value = resolve(name, levels, tensor, t)
            value = parameter.default if value is None else value
            if value is not None:
                found[name] = value if parameter.default is None else type(parameter.default)(value)
    return found


def module_prefix(recipe: Recipe) -> str:
    """How places in the recipe's stack begin: with `modules.NAME.` where it has modules."""
    return f"modules.{next(iter(recipe.modules))}." if recipe.modules else ""


class _Level(NamedTuple):
    """One place of a recipe where parameters are allowed."""

    place: str
    parameters: Mapping[str, Any]
    of_model: bool


def _levels(recipe: Recipe) -> Iterator[_Level]:
    prefix = module_prefix(recipe)
    stack = recipe.stack
    slices = [
        (f"{prefix}slices[{number}].", part) for number, part in enumerate(stack.slices or [])
    ]
    yield _Level("", recipe.parameters or {}, False)
    if recipe.modules:
        yield _Level(prefix, stack.parameters or {}, False)
    for number, whole in enumerate(stack.models or []):
        yield _Level(f"{prefix}models[{number}].", whole.parameters or {}, True)
    for place, part in slices:
        yield _Level(place, part.parameters or {}, False)
        for number, source in enumerate(part.sources):
            yield _Level(f"{place}sources[{number}].", source.parameters or {}, True)


def method_faults(recipe: Recipe, place: str = "recipe") -> list[Fault]:
    """What keeps the method from doing what the recipe says, as far as the recipe alone shows."""
    method = METHODS.get(recipe.merge_method)
    if method is None:
        near = get_close_matches(recipe.merge_method, METHODS, 1)
        remedy = f"write {near[0]}" if near else "name one of these"
        return [
            Fault(
                f"{place}: merge_method",
                f"one of: {', '.join(METHODS)}",
                recipe.merge_method,
                remedy,
            )
        ]
    return [
        *_model_faults(recipe, method, place),
        *(
            fault
            for level in _levels(recipe)
            for fault in _level_faults(recipe, method, level, place)
        ),
    ]


class _Group(NamedTuple):
    """Models that are merged with each other."""

    place: str
    sources: Sequence[Source | Whole]
    base: str | None


def _model_faults(recipe: Recipe, method: Method, place: str) -> Iterator[Fault]:
    prefix = f"{place}: {module_prefix(recipe)}"
    for number, part in enumerate(recipe.stack.slices or []):
        where = f"{prefix}slices[{number}]"
        if part.by_filter and recipe.merge_method != PLAIN:
            expected, remedy = f"sources without a filter for {recipe.merge_method}", "remove it"
            yield Fault(where, expected, "a filter", f"{remedy}, or use passthrough")
        elif _lone(method, part.sources) and (part.parameters or part.sources[0].parameters):
            expected = f"no parameters, since {recipe.merge_method} keeps a single source as it is"
            remedy = "remove them, or list what it is merged with (the base model too)"
            yield Fault(where, expected, "some", remedy)
    for group in _groups(recipe, method, prefix):
        yield from _group_faults(recipe, method, group)


def _groups(recipe: Recipe, method: Method, prefix: str) -> Iterator[_Group]:
    if models := recipe.stack.models:
        yield _Group(f"{prefix}models", models, recipe.base_model)
        return
    for number, part in enumerate(recipe.parts):
        if not part.by_filter and not _lone(method, part.sources):
            where = f"{prefix}slices[{number}].sources"
            yield _Group(where, part.sources, part.base_model or recipe.base_model)


def _group_faults(recipe: Recipe, method: Method, group: _Group) -> Iterator[Fault]:
    where, sources, base = group
    if method.base == "required" and base is None:
        expected = f"a base_model, which {recipe.merge_method} starts from"
        yield Fault(where, expected, "none", "add base_model")
        return
    listed = method.base != "none" and any(source.model == base for source in sources)
    (fewest, most), count = method.models, len(sources) - listed
    if count < fewest or (most is not None and count > most):
        wanted = f"{fewest} to {most}"
        if most is None or fewest == most:
            wanted = f"{fewest} or more" if most is None else str(fewest)
        also = " in addition to the base model" if method.base != "none" and base else ""
        expected = f"{wanted} to merge by {recipe.merge_method}{also}"
        yield Fault(where, expected, str(count), "add or remove models, or change the method")
    ranges = {tuple(source.layer_range) for source in sources if isinstance(source, Source)}
    if method.base != "none" and base and not listed and len(ranges) > 1:
        found = f"sources of {len(ranges)} ranges, the base none of them"
        remedy = "list the base model among the sources"
        yield Fault(where, f"a range of the base model {base}", found, remedy)


def _level_faults(recipe: Recipe, method: Method, level: _Level, place: str) -> Iterator[Fault]:
    for name, written in level.parameters.items():
        where = f"{place}: {level.place}parameters.{name}"
        if name not in method.parameters and name in _OF_ANY_METHOD:
            continue
        if name not in method.parameters:
            near = get_close_matches(name, method.parameters, 1)
            names = ", ".join(method.parameters) or "none"
            expected = f"one of: {names}, the parameters of {recipe.merge_method}"
            yield Fault(
                where, expected, "another parameter", f"write {near[0]}" if near else "remove it"
            )
        elif level.of_model and not method.parameters[name].per_model:
            yield Fault(
                where,
                "a parameter of single models",
                f"{name}, which is one of the whole merge",
                "set it for the slice or the recipe",
            )
        else:
            for value in values(written):
                if expected := unfit(method.parameters[name], value):
                    yield Fault(where, expected, repr(value), "correct the value")


def filter_faults(recipe: Recipe, tensors: Sequence[str], place: str = "recipe") -> Iterator[Fault]:
    """Filters of parameters that are part of none of the names of `tensors`.

    Those that published recipes have for models of other names are no faults.
    """
    for where, part in _idle_filters(recipe, tensors):
        if part not in _USUAL_FILTERS:
            expected = "filters that are part of a tensor's name"
            remedy = f"correct it; names are like {tensors[len(tensors) // 2]}"
            yield Fault(f"{place}: {where}", expected, part, remedy)


def gradients(recipe: Recipe) -> Iterator[str]:
    """The places of settings that change with depth."""
    for level in _levels(recipe):
        for name, written in level.parameters.items():
            entries = written if isinstance(written, list) else []
            plain = [part["value"] if isinstance(part, Mapping) else part for part in entries]
            if any(isinstance(part, list) for part in plain) or plain == entries != []:
                yield f"{level.place}parameters.{name}"


def recipe_remarks(recipe: Recipe, tensors: Sequence[str]) -> Iterator[str]:
    """What a recipe says and has no effect, with the reason.

    Args:
        recipe: one without faults.
        tensors: names that filters are compared with.
    """
    for key in recipe.without_effect or {}:
        yield f"{key} has no effect: {WITHOUT_EFFECT[key]}"
    if "float64" in (recipe.dtype, recipe.out_dtype):
        stored = "" if recipe.out_dtype not in (None, "float64") else ", and the result is float32"
        yield f"dtype float64 has no effect: sums are computed in float32 or better{stored}"
    known = METHODS[recipe.merge_method].parameters
    for level in _levels(recipe):
        for name in level.parameters:
            if name not in known:
                reason = f"{recipe.merge_method} has no such parameter"
                yield f"{level.place}parameters.{name} has no effect: {reason}"
    for where, part in _idle_filters(recipe, tensors):
        yield f"{where}: filter {part} has no effect: no tensor's name contains it"


def _idle_filters(recipe: Recipe, tensors: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Place and text of each filter that is part of none of the names."""
    joined, known = "\n".join(tensors), METHODS[recipe.merge_method].parameters
    for level in _levels(recipe):
        for name, written in level.parameters.items():
            for part in filters(written) if name in known else ():
                if part not in joined:
                    yield f"{level.place}parameters.{name}", part
