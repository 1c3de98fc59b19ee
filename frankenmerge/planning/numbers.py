"""The numbers of a recipe: where they stand, what may be tried for them, and finer ones."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_parameters import evaluate, filters
from frankenmerge.splicing.methods import METHODS, Parameter

Per = Literal["setting", "block", "map"]
"""What has a number of its own: what the recipe gives one, every block, or every map of a block."""
DECIMALS = 4
"""To which numbers are rounded that are written to recipes."""
Path = tuple[str | int, ...]


class Number(NamedTuple):
    """A number of a recipe that may be changed."""

    path: Path
    """Keys and positions that lead to it in the recipe's mapping."""
    value: float
    parameter: Parameter
    """Of the recipe's method."""


def numbers_of(recipe: Recipe) -> list[Number]:
    """All numbers that change the result continuously or in steps; flags and tolerances do not."""
    parameters = METHODS[recipe.merge_method].parameters
    found = []
    for path, setting in _settings(recipe.model_dump(exclude_none=True)):
        parameter = parameters.get(str(path[-1]))
        if parameter and parameter.effect != "none":
            found += [Number(at, value, parameter) for at, value in _leaves(setting, path)]
    return found


def with_numbers(recipe: Recipe, numbers: Sequence[Number], values: Sequence[float]) -> Recipe:
    """The recipe with other values of its numbers, within what the method allows."""
    data = recipe.model_dump(exclude_none=True)
    for number, value in zip(numbers, values, strict=True):
        holder: Any = data
        for key in number.path[:-1]:
            holder = holder[key]
        holder[number.path[-1]] = min(
            max(float(value), number.parameter.low), number.parameter.high
        )
    return Recipe.model_validate(data)


def refined(
    recipe: Recipe, per: Per, depth: int, maps: Sequence[str], ends: Sequence[str]
) -> Recipe:
    """The same recipe with a number for every block, or for every map of every block.

    Numbers are those that the recipe gives there already, so that the result is the same. In a
    recipe of slices every slice has its own.

    Args:
        recipe: any.
        per: what gets numbers of its own.
        depth: blocks of a recipe of whole models.
        maps: parts of tensor names of the maps of a block: `self_attn.q_proj`.
        ends: parts of tensor names outside the blocks: `embed_tokens`, `lm_head`.
    """
    if per == "setting":
        return recipe
    parameters = METHODS[recipe.merge_method].parameters
    parts = [*ends, *(maps if per == "map" else ())]

    def finer(setting: Any, blocks: int) -> list[dict[str, Any]]:
        def at(tensor: str) -> Any:
            if tensor in ends:
                return evaluate(setting, tensor, 0.0)
            along = [
                evaluate(setting, tensor, index / max(1, blocks - 1)) for index in range(blocks)
            ]
            return None if along[0] is None else along

        # Every part stands before the filter that takes it, so that each tensor keeps its number.
        chosen: dict[str, None] = {}
        for asked in filters(setting):
            chosen |= dict.fromkeys([part for part in parts if asked in part] + [asked])
        values = {tensor: at(tensor) for tensor in (chosen | dict.fromkeys(parts))}
        entries: list[dict[str, Any]] = [
            {"filter": tensor, "value": value}
            for tensor, value in values.items()
            if value is not None
        ]
        rest = at("")
        return entries if rest is None else [*entries, {"value": rest}]

    data = recipe.model_dump(exclude_none=True)
    for holder, blocks in _holders(data, depth):
        if "parameters" in holder:
            holder["parameters"] = {
                name: finer(setting, blocks)
                if name in parameters and parameters[name].effect != "none"
                else setting
                for name, setting in holder["parameters"].items()
            }
    return Recipe.model_validate(data)


def _holders(data: dict[str, Any], depth: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Everything in a recipe that has parameters, with the number of blocks that they are for."""
    (stack,) = data.get("modules", {"": data}).values()
    slices = stack.get("slices", [])
    lengths = {_length(part) for part in slices}
    if not slices or len(lengths) == 1:
        length = lengths.pop() if lengths else depth
        yield from ((each, length) for each in ([data] if stack is data else [data, stack]))
    for whole in stack.get("models", []):
        yield whole, depth
    for part in slices:
        yield part, _length(part)
        for source in part["sources"]:
            yield source, _length(part)


def _length(part: Mapping[str, Any]) -> int:
    start, stop = part["sources"][0]["layer_range"]
    return stop - start


def _settings(data: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every setting of every `parameters` in a recipe's mapping."""
    entries = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in entries:
        if key == "parameters":
            yield from ((path + (key, name), setting) for name, setting in value.items())
        elif isinstance(value, dict | list):
            yield from _settings(value, (*path, key))


def _leaves(setting: Any, path: Path) -> Iterator[tuple[Path, float]]:
    if isinstance(setting, list):
        for place, entry in enumerate(setting):
            if isinstance(entry, Mapping):
                yield from _leaves(entry["value"], (*path, place, "value"))
            else:
                yield from _leaves(entry, (*path, place))
    elif isinstance(setting, int | float) and not isinstance(setting, bool):
        yield path, float(setting)
