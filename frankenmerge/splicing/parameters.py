"""What a recipe tells its method: which models, which parameters, and whether it may."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_parameters import Value, filters, resolve, values
from frankenmerge.artefacts.recipe_schema import Slice, Source, Whole
from frankenmerge.errors import Fault
from frankenmerge.splicing.methods import METHODS, Method, unfit

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
    """Tell a slice's models from its base, which is the first source of that name.

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
    """A method's parameters of one model for one of its tensors; those that have to be given and are not are left out."""
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


class _Level(NamedTuple):
    """One place of a recipe where parameters may stand."""

    place: str
    parameters: Mapping[str, Any]
    of_model: bool


def _levels(recipe: Recipe) -> Iterator[_Level]:
    prefix = f"modules.{next(iter(recipe.modules))}." if recipe.modules else ""
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
    """Everything that keeps the method from doing what the recipe says, as far as the recipe itself tells."""
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


def _model_faults(recipe: Recipe, method: Method, place: str) -> Iterator[Fault]:
    prefix = f"{place}: modules.{next(iter(recipe.modules))}." if recipe.modules else f"{place}: "
    if models := recipe.stack.models:
        groups = [(f"{prefix}models", models, recipe.base_model)]
    else:
        groups = [
            (
                f"{prefix}slices[{number}].sources",
                part.sources,
                part.base_model or recipe.base_model,
            )
            for number, part in enumerate(recipe.parts)
            if not _lone(method, part.sources)
        ]
    for number, part in enumerate(recipe.stack.slices or []):
        if _lone(method, part.sources) and (part.parameters or part.sources[0].parameters):
            yield Fault(
                f"{prefix}slices[{number}]",
                f"no parameters, since {recipe.merge_method} leaves a single source as it is",
                "some",
                "remove them, or list what it is merged with (the base model too)",
            )
    fewest, most = method.models
    for where, sources, base in groups:
        if method.base == "required" and base is None:
            yield Fault(
                where,
                f"a base_model, which {recipe.merge_method} starts from",
                "none",
                "say base_model",
            )
            continue
        listed = method.base != "none" and any(source.model == base for source in sources)
        count = len(sources) - listed
        if count < fewest or (most is not None and count > most):
            wanted = (
                f"{fewest} or more"
                if most is None
                else str(fewest)
                if fewest == most
                else f"{fewest} to {most}"
            )
            beside = " beside the base model" if method.base != "none" and base else ""
            yield Fault(
                where,
                f"{wanted} to merge by {recipe.merge_method}{beside}",
                str(count),
                "add or remove models, or change the method",
            )
        ranges = {tuple(source.layer_range) for source in sources if isinstance(source, Source)}
        if method.base != "none" and base and not listed and len(ranges) > 1:
            yield Fault(
                where,
                f"a range of the base model {base}",
                f"sources of {len(ranges)} ranges, the base none of them",
                "list the base model among the sources",
            )


def _level_faults(recipe: Recipe, method: Method, level: _Level, place: str) -> Iterator[Fault]:
    for name, written in level.parameters.items():
        where = f"{place}: {level.place}parameters.{name}"
        if name not in method.parameters:
            near = get_close_matches(name, method.parameters, 1)
            expected = f"one of: {', '.join(method.parameters) or 'none'}, the parameters of {recipe.merge_method}"
            yield Fault(
                where, expected, "another parameter", f"write {near[0]}" if near else "remove it"
            )
        elif level.of_model and not method.parameters[name].per_model:
            yield Fault(
                where,
                "a parameter of single models",
                f"{name}, which is one of the whole merge",
                "say it for the slice or the recipe",
            )
        else:
            for value in values(written):
                if told := unfit(method.parameters[name], value):
                    yield Fault(where, told, repr(value), "correct the value")


def filter_faults(recipe: Recipe, tensors: Sequence[str], place: str = "recipe") -> Iterator[Fault]:
    """Tell the filters that are part of none of the names of `tensors`."""
    joined = "\n".join(tensors)
    for level in _levels(recipe):
        for name, written in level.parameters.items():
            for part in filters(written):
                if part not in joined:
                    where = f"{place}: {level.place}parameters.{name}"
                    yield Fault(
                        where,
                        "filters that are part of a tensor's name",
                        part,
                        f"correct it; names are like {tensors[len(tensors) // 2]}",
                    )
