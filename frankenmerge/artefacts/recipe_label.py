"""A recipe in one line for tables and charts, with the numbers that tell similar recipes apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_parameters import evaluate, filters, values
from frankenmerge.artefacts.recipe_schema import Slice, Source, Whole

PARTS = 3
"""Most parts of blocks with weights of their own that a label names."""
OF_BASE = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
"""Methods that add to a base what each donor has changed, by its weight."""


def label(recipe: Recipe) -> str:
    """A recipe in one line, with weights, scales and densities where they are plain numbers.

    `0.53 code + 0.47 prose` for an average, `self_attn: 0.50 code + 0.50 prose, else code` for one
    part of every block, `base + 0.6 (code) + 0.6 (prose)` for task arithmetic, and
    `code[0:6] 0.5 x code[4:8]` for a stack of which a slice writes less. Other recipes are as
    `str` has them.
    """
    stack, method = recipe.stack, recipe.merge_method
    if method == "passthrough" and stack.slices:
        return " ".join(map(_scaled, stack.slices))
    made = None
    if method == "linear":
        slices = [_slice(part) for part in stack.slices or []]
        whole = " ".join(filter(None, slices)) if None not in slices else None
        made = _average(stack.models) if stack.models else whole
    elif method in OF_BASE and stack.models:
        made = _added(recipe, stack.models)
    return made or str(recipe)


def _scaled(part: Slice) -> str:
    """A slice of a stack, with the one factor by which some of its maps are scaled."""
    shown = "+".join(map(str, part.sources))
    written = (part.sources[0].parameters or {}).get("scale", 1.0)
    factors = {value for value in values(written) if value != 1}
    return f"{factors.pop():g} x {shown}" if len(factors) == 1 else shown


def _slice(part: Slice) -> str | None:
    """Averaged blocks, `(0.50 code + 0.50 prose)[2:6]`."""
    if len(part.sources) == 1:
        return str(part.sources[0])
    average = _average(part.sources)
    ranges = {tuple(source.layer_range) for source in part.sources}
    if average is None or len(ranges) > 1:
        return None
    start, stop = ranges.pop()
    return f"({average})[{start}:{stop}]"


def _average(sources: Sequence[Source | Whole]) -> str | None:
    """Donors by their weights, for each part of a block that has weights of its own.

    None where the weights are not plain numbers, or where there are too many.
    """
    written = [(source.parameters or {}).get("weight") for source in sources]
    parts = list(dict.fromkeys(part for weight in written for part in filters(weight)))
    names = [Path(source.model).name for source in sources]
    shown = []
    for part in [*parts, ""]:
        found = [evaluate(weight, part, 0.0) for weight in written]
        weights = [value for value in found if value is not None]
        if len(weights) < len(names):
            return None
        shown.append(_sum(dict(zip(names, map(float, weights), strict=True))))
    if len(parts) > PARTS or any(_has_gradient(weight) for weight in written):
        return None
    *some, rest = shown
    listed = [f"{part}: {each}" for part, each in zip(parts, some, strict=True)]
    return ", ".join([*listed, f"else {rest}"] if parts else [rest])


def _sum(weights: dict[str, float]) -> str:
    used = {name: weight for name, weight in weights.items() if weight}
    if list(used.values()) == [1.0]:
        return next(iter(used))
    return " + ".join(f"{weight:.2f} {name}" for name, weight in used.items())


def _added(recipe: Recipe, models: Sequence[Whole]) -> str | None:
    """The base, and what is added to it; the density where all donors have the same."""
    settings = [(recipe.parameters or {}) | (whole.parameters or {}) for whole in models]
    weights = [each.get("weight") for each in settings]
    if not all(isinstance(weight, int | float) for weight in weights):
        return None
    pairs = zip(weights, models, strict=True)
    sums = [f"{weight:g} ({Path(whole.model).name})" for weight, whole in pairs]
    line = " + ".join([Path(recipe.base).name, *sums])
    density = settings[0].get("density")
    if isinstance(density, int | float) and all(each["density"] == density for each in settings):
        line += f", density {density:g}"
    return line if recipe.merge_method == "task_arithmetic" else f"{recipe.merge_method}: {line}"


def _has_gradient(written: Any) -> bool:
    """Whether a setting changes over depth."""
    entries = written if isinstance(written, list) else []
    return any(not isinstance(entry, dict) or isinstance(entry["value"], list) for entry in entries)
