"""Whether blocks compute in a result what they compute in their donors.

For families that are not in the table. The donors' models and the result's are built from their
configs without weights, by transformers itself, and compared block by block: classes of modules,
names and shapes of parameters, constants, and settings. Equal blocks compute the same, by
construction. What stands outside the blocks must be equal, too.
"""

import ast
import inspect
import textwrap
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from frankenmerge.artefacts.recipe import Block
from frankenmerge.donors.architecture import Config
from frankenmerge.donors.config import language, spliced_config
from frankenmerge.errors import Fault, FrankenmergeError, fail
from frankenmerge.models.blank import blank_model, config_object
from frankenmerge.models.hooks import blocks_path

Facts = dict[tuple[str, ...], Any]
"""What a module is, by path: class, shapes, constants, settings."""
_PLAIN = (int, float, bool, str, type(None))
_REMEDY = "leave blocks where they are (merge whole models), or use donors of another family"


class Home(NamedTuple):
    """A model without weights, taken apart."""

    config: Config
    model: PreTrainedModel
    prefix: str
    """Of its blocks, without their index."""
    blocks: list[Facts]
    rest: Facts


def models_of(configs: Mapping[str, Config]) -> dict[str, PreTrainedModel]:
    """The models of configs, without weights, by name; none for those that cannot be built."""
    models = {}
    for name, config in configs.items():
        try:
            models[name] = blank_model(config)
        except Exception:  # whatever transformers raises for a config of any origin
            continue
    return models


def homes_of(
    configs: Mapping[str, Config], models: Mapping[str, PreTrainedModel], place: str
) -> dict[str, Home]:
    """The donors' models, taken apart, by name.

    Args:
        configs: the donors', by name.
        models: those of them that are built.
        place: where faults are.

    Raises:
        FrankenmergeError: for a donor whose model cannot be built.
    """
    homes = {}
    for name, config in configs.items():
        try:
            homes[name] = home_of(config, models.get(name))
        except Exception as error:  # whatever transformers raises for a config of any origin
            expected = "a model that transformers can build, with one list of blocks"
            raise fail(f"{place}: {name}", expected, _told(error), _REMEDY) from error
    return homes


def differences_from_home(
    result: Config, base: str, homes: Mapping[str, Home], runs: Sequence[Sequence[Block]]
) -> list[str]:
    """Where a result's blocks, or what stands around them, are not what they are at home.

    Args:
        result: its config, complete.
        base: the donor of everything that is not a block.
        homes: the donors' models.
        runs: the blocks of the result in order, one run for each number of a slice's source.
    """
    try:
        made = home_of(result)
    except Exception as error:
        return [f"transformers cannot build it: {_told(error)}"]
    lines = [
        *(line for run in runs for line in _block_differences(made, homes, run)),
        *_rest_differences(made, homes[base]),
        *_list_differences(_lists(made.model.config, len(runs[0])), homes, runs[0]),
    ]
    return list(dict.fromkeys(lines or _depth_bound(homes[base])))


def first_unlike(result: Config, homes: Mapping[str, Home], run: Sequence[Block]) -> int | None:
    """The first place whose block is not what it is at home; None where all are, or none is built.

    Args:
        result: its config, complete; with more blocks than `run` its first ones are compared.
        homes: the donors' models.
        run: the blocks of the result in order.
    """
    places = range(len(run))
    shorter = spliced_config(result, [(result, place) for place in places], tied=True)
    try:
        made = home_of(shorter)
    except Exception:  # whether the whole result can be built is another question
        return None
    return next((place for place in places if any(_unlike(made, homes, place, run[place]))), None)


def has_lists(result: Config, homes: Mapping[str, Home], run: Sequence[Block]) -> bool:
    """Whether the lists that a config derives are those of its blocks; without building a model."""
    try:
        own = _lists(config_object(result), len(run))
    except Exception:  # whatever transformers raises for a config that it cannot read
        return False
    return not any(_list_differences(own, homes, run))


def home_faults(differing: Sequence[str], place: str) -> Iterator[Fault]:
    """Faults for the first of the differences that `differences_from_home` finds."""
    expected = "blocks that compute in the result what they compute in their donor"
    for line in differing[:3]:
        yield Fault(place, expected, line, _REMEDY)


def home_of(config: Config, model: PreTrainedModel | None = None) -> Home:
    """Build a config's model without weights, unless it is given, and take it apart.

    Raises FrankenmergeError for a model without exactly one list of blocks, and whatever
    transformers raises for a config that it cannot build.
    """
    model = blank_model(config) if model is None else model
    prefix = blocks_path(model)
    blocks: Any = model.get_submodule(prefix)
    rest = _facts(model, skipped=prefix)
    return Home(config, model, prefix, [_facts(block) for block in blocks], rest)


def _told(error: Exception) -> str:
    if isinstance(error, FrankenmergeError):
        return f"{error.faults[0].found}, not {error.faults[0].expected}"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _facts(module: nn.Module, skipped: str | None = None) -> Facts:
    """What a module and all within are; `skipped` is the path of a part that does not count."""
    facts: Facts = {}
    for path, part in module.named_modules():
        if skipped is not None and (path == skipped or path.startswith(f"{skipped}.")):
            continue
        facts[path, "class"] = type(part).__qualname__
        for name, parameter in part._parameters.items():
            facts[path, name, "shape"] = None if parameter is None else tuple(parameter.shape)
        for name, buffer in part._buffers.items():
            facts[path, name, "constant"] = _constant(part, name, buffer)
        for name, value in vars(part).items():
            if not name.startswith("_") and name != "training" and (plain := _setting(value)):
                facts[path, name] = plain[0]
    return facts


def _constant(part: nn.Module, name: str, buffer: torch.Tensor | None) -> Hashable:
    """A buffer's shape; of one that no file holds also its values."""
    if buffer is None or name not in part._non_persistent_buffers_set or buffer.is_meta:
        return None if buffer is None else tuple(buffer.shape)
    return tuple(buffer.shape), buffer.reshape(-1).view(torch.uint8).numpy().tobytes()


def _setting(value: Any) -> tuple[Any] | None:
    """A plain value, or a sequence of such, in a tuple of its own; None for any other."""
    if isinstance(value, _PLAIN):
        return (value,)
    if isinstance(value, tuple | list) and all(isinstance(each, _PLAIN) for each in value):
        return (tuple(value),)
    return None


def _block_differences(
    made: Home, homes: Mapping[str, Home], run: Sequence[Block]
) -> Iterator[str]:
    for place, block in enumerate(run):
        yield from _unlike(made, homes, place, block)


def _unlike(made: Home, homes: Mapping[str, Home], place: int, block: Block) -> Iterator[str]:
    """Where the block at one place of a result is not what it is at home."""
    donor, index = block
    own, there = made.blocks[place], homes[donor].blocks[index]
    for key in sorted(own.keys() | there.keys()):
        a, b = there.get(key), own.get(key)
        if a == b or _is_label(key, made, homes[donor], (place, index)):
            continue
        entries = isinstance(a, tuple) and len(a) == len(homes[donor].blocks)
        if entries and _is_list_of_blocks(key[-1], (b, a), (made, homes[donor])):
            continue  # what the block reads of it is a setting, or its own entry
        yield f"block {index} of {donor} as block {place}: {_described(key, a, b)}"


def _rest_differences(made: Home, base: Home) -> Iterator[str]:
    for key in sorted(made.rest.keys() | base.rest.keys()):
        a, b = base.rest.get(key), made.rest.get(key)
        if a == b or key[-1] == "tie_word_embeddings" or _is_depth(key, made, base):
            continue
        if _is_list_of_blocks(key[-1], (b, a), (made, base)) or _kind_is_gone(key, made, base):
            continue
        yield f"outside the blocks: {_described(key, a, b)}"


def _kind_is_gone(key: tuple[str, ...], made: Home, base: Home) -> bool:
    """Whether a setting names kinds of blocks (`layer_types`) of which the result has no block."""
    kinds = [set(map(str, language(home.config).get("layer_types") or ())) for home in (made, base)]
    if key[-1] == "layer_types":
        own, there = (set(home.rest.get(key) or ()) for home in (made, base))
        return own == there & kinds[0] and there <= kinds[1]
    return made.rest.get(key) is None and any(
        key[1].startswith(f"{kind}_") for kind in kinds[1] - kinds[0]
    )


def _is_list_of_blocks(name: str, values: Sequence[Any], homes: Sequence[Home]) -> bool:
    """Whether two settings are lists of their configs with an entry a block, which have moved."""
    texts = [language(home.config).get(name) for home in homes]
    return all(
        isinstance(text, list) and tuple(text) == value
        for text, value in zip(texts, values, strict=True)
    )


def _list_differences(
    own: Mapping[str, Sequence[Any]], homes: Mapping[str, Home], run: Sequence[Block]
) -> Iterator[str]:
    """Lists with an entry a block that a config derives from other fields."""
    theirs = {name: _lists(home.model.config, len(home.blocks)) for name, home in homes.items()}
    for key, entries in own.items():
        if all(key in lists for lists in theirs.values()):
            expected = [theirs[donor][key][index] for donor, index in run]
            if list(entries) != expected:
                yield f"{key} {_short(list(entries))} instead of {_short(expected)}"


def _lists(config: PreTrainedConfig, depth: int) -> dict[str, Sequence[Any]]:
    text, found = config.get_text_config(decoder=True), {}
    for key in dir(type(text)):
        if key.startswith("_") or not isinstance(inspect.getattr_static(text, key), property):
            continue
        try:
            value = getattr(text, key)
        except Exception:  # a property that this config has not
            continue
        if isinstance(value, list | tuple) and len(value) == depth:
            found[key] = value
    return found


def _depth_bound(base: Home) -> Iterator[str]:
    """Parameters outside the blocks that have a part for every block, and so do not move."""
    blocks = [(base.config, index) for index in range(len(base.blocks))]
    try:
        taller = home_of(spliced_config(base.config, [*blocks, blocks[-1]], tied=True))
    except Exception:  # the result's own model has been built and compared
        return
    for key, shape in base.rest.items():
        if key[-1] == "shape" and shape != taller.rest.get(key):
            yield f"outside the blocks: {key[0]}.{key[1]} has a part for every block"


def _is_label(key: tuple[str, ...], made: Home, home: Home, places: tuple[int, int]) -> bool:
    """Whether a setting only numbers its block or counts all, and nothing is computed from it."""
    if len(key) != 2:
        return False
    values = made.blocks[places[0]].get(key), home.blocks[places[1]].get(key)
    offsets = {_offset(value, index) for value, index in zip(values, places, strict=True)}
    numbers = offsets in ({0}, {1})
    counts = values == (len(made.blocks), len(home.blocks))
    # A block with several entries in the cache numbers these.
    entries = key[1] == "layer_idx" and _is_multiple(values, places)
    return (numbers or counts or entries) and not _is_computed_with(
        _class_at(home, places[1], key[0]), key[1]
    )


def _is_multiple(values: tuple[Any, Any], places: tuple[int, int]) -> bool:
    """Whether two numbers are as far apart as some multiple of their blocks' indices."""
    if not all(type(value) is int for value in values) or places[0] == places[1]:
        return False
    factor, left = divmod(values[0] - values[1], places[0] - places[1])
    return left == 0 and 1 < factor <= 4 and 0 <= values[0] - factor * places[0] < factor


def _offset(value: Any, index: int) -> int | None:
    return value - index if type(value) is int else None


def _is_depth(key: tuple[str, ...], made: Home, base: Home) -> bool:
    """Whether a setting outside the blocks is their number, and nothing is computed from it."""
    pairs = made.rest.get(key), base.rest.get(key)
    if len(key) != 2 or pairs != (len(made.blocks), len(base.blocks)):
        return False
    # It may be compared with an index: what follows for a block is a setting of the block.
    return not _is_computed_with(type(base.model.get_submodule(key[0])), key[1], compared=False)


def _class_at(home: Home, index: int, path: str) -> type:
    return type(home.model.get_submodule(f"{home.prefix}.{index}").get_submodule(path))


@cache
def _is_computed_with(kind: type, name: str, compared: bool = True) -> bool:
    """Whether a class does arithmetic with its attribute `name`, or compares it, in a pass."""
    for method in vars(kind).values():
        if not inspect.isfunction(method) or method.__name__ == "__init__":
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, SyntaxError):
            return True
        for node in ast.walk(tree):
            operands = (
                [node.left, node.right]
                if isinstance(node, ast.BinOp)
                else [node.left, *node.comparators]
                if compared and isinstance(node, ast.Compare)
                else []
            )
            if any(isinstance(each, ast.Attribute) and each.attr == name for each in operands):
                return True
    return False


def _described(key: tuple[str, ...], there: Any, here: Any) -> str:
    return f"{'.'.join(part for part in key if part)} {_short(here)} instead of {_short(there)}"


def _short(value: Any) -> str:
    return "none" if value is None else repr(value)[:80]
