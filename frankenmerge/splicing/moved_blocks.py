"""Blocks that a recipe moves, in families that are not in the table."""

import re
from collections.abc import Container, Iterator, Mapping
from copy import deepcopy
from typing import Any

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import is_multimodal, is_tied, language
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.splicing.result import Donors, blocks_by_source, is_whole

_COUNT = re.compile(r"first_k|dense|interval|period|offset|step|freq|every|start|end|pattern")
"""Names of numbers that may say which blocks are of which kind."""
_FEW = 4
"""Blocks of the first, shortest model that a trial is compared in."""


def settled(recipe: Recipe, donors: Donors, config: dict[str, Any], place: str) -> dict[str, Any]:
    """The result's config, with which every block computes what it computes in its donor.

    Where moving what has an entry a block is not enough, numbers that may say which blocks are of
    which kind are tried one by one (DeepSeek's `first_k_dense_replace`, for one).

    Args:
        recipe: spelled out.
        donors: its donors by name.
        config: the result's, complete, with what has an entry a block moved.
        place: where the recipe is from.

    Raises:
        FrankenmergeError: for blocks that would not compute the same.
    """
    base = donors[recipe.base]
    if base.architecture.listed:
        return config
    from frankenmerge.splicing.at_home import (
        differences_from_home,
        first_unlike,
        has_lists,
        home_faults,
        homes_of,
        models_of,
    )

    used = {name: donors[name] for name in (recipe.base, *recipe.tensor_donors)}
    buildable = {
        name: donor for name, donor in used.items() if donor.written is not None or donor.view
    }
    configs = {name: donor.config for name, donor in buildable.items()}
    models = models_of(configs)
    _check_shapes(used, models)
    if is_whole(recipe, donors):
        return config
    if base.written is None:
        expected = "a family that transformers can build without code of the donor"
        remedy = "merge whole models of this family, or install a transformers that has it"
        raise fail(place, expected, str(base.config["model_type"]), remedy)
    if base.architecture.keys.blocks not in language(base.config):
        expected = f"{base.architecture.keys.blocks}, the number of blocks, in its config"
        remedy = "merge whole models of this family"
        raise fail(f"{place}: {recipe.base}", expected, "none", remedy)
    runs = blocks_by_source(recipe)
    homes = homes_of(configs, models, place)
    _check_names(base, homes[recipe.base].prefix, place)
    _check_head(base, config, homes[recipe.base].model.state_dict(), place)
    first = differences_from_home(config, recipe.base, homes, runs)
    if not first:
        _check_surroundings(recipe, base, config, place)
        return config
    beginning = (first_unlike(config, homes, runs[0]) or 0) + 1
    for trial in _trials(config, len(runs[0])):
        # Lists and short models show of most trials, and soon, that they are in vain.
        if not has_lists(trial, homes, runs[0]) or any(
            first_unlike(trial, homes, runs[0][:length]) is not None
            for length in sorted({min(_FEW, beginning), beginning})
        ):
            continue
        if not differences_from_home(trial, recipe.base, homes, runs):
            _check_surroundings(recipe, base, trial, place)
            return trial
    raise FrankenmergeError(*home_faults(first, place))


def _check_shapes(used: Donors, models: Mapping[str, Any]) -> None:
    """Refuse donors with tensors of other shapes than in the model of their config."""
    faults: list[Fault] = []
    for name, donor in {id(donor): (name, donor) for name, donor in used.items()}.values():
        if donor.quantisation or name not in models:
            continue
        expected = models[name].state_dict()
        faults += [
            Fault(
                f"{donor.path}: {tensor}",
                f"shape {list(expected[tensor].shape)}, as config.json says",
                f"shape {list(found.shape)}",
                "use a checkpoint whose config.json belongs to its weights",
            )
            for tensor, found in donor.tensors.items()
            if tensor in expected and tuple(expected[tensor].shape) != found.shape
        ][:3]
    raise_all(faults)


def _check_surroundings(
    recipe: Recipe, base: Checkpoint, config: dict[str, Any], place: str
) -> None:
    """Refuse blocks that read what other blocks make, or what is around blocks of another donor.

    What is before the first block comes from the first donor, what is after the last block from the
    last one, all else from the base.
    """
    from frankenmerge.splicing.surroundings import surroundings

    around = surroundings(config)
    if around is not None and around.shared:
        expected = "blocks that pass on nothing but the hidden state"
        found = "blocks that read what an earlier block has computed beside it"
        raise fail(f"{place}: {recipe.base}", expected, found, "merge whole models")
    models = [block.model for block in recipe.blocks]
    if len(set(models)) == 1:
        return
    root = base.architecture.root
    origin = {"embedding": models[0], "final": models[-1], "head": models[-1], "rest": recipe.base}
    for role, donor in origin.items():
        allowed = {"before"} if donor == models[0] else set()
        allowed |= {"after"} if donor == models[-1] else set()
        for name in base.by_role.get((role, None), {}).values():
            if role == "rest" and is_multimodal(base.config) and not name.startswith(root):
                continue  # towers
            parts = _named(around.read, name) if around else None
            # What the model has under no such name, or a model that cannot be run, shows nothing.
            known = role != "rest" and _is_usual(base, name) if parts is None else parts <= allowed
            if not known:
                expected = "what is around the blocks to be read before or after all of them"
                found = f"{name}, which blocks of several donors may not share"
                remedy = "take all blocks from one donor, or merge whole models"
                raise fail(f"{place}: {recipe.base}", expected, found, remedy)


def _named(read: Mapping[str, frozenset[str]], name: str) -> frozenset[str] | None:
    """The entry of a tensor, whose file may leave out the prefix of the inner model."""
    ending = (key for key in read if key.endswith(f".{name}"))
    return read.get(name, read.get(next(ending, "")))


def _is_usual(base: Checkpoint, name: str) -> bool:
    """Whether a tensor is the embedding matrix, the final norm or the map to the vocabulary."""
    architecture = base.architecture
    ends = (architecture.root + part for part in (*architecture.embedding[:1], architecture.final))
    return name.startswith((*ends, architecture.head))


def _check_names(base: Checkpoint, prefix: str, place: str) -> None:
    """Refuse a file whose blocks are under other names than in memory: they may be converted."""
    architecture = base.architecture
    stored = (architecture.root + architecture.block).removesuffix(".{}.")
    if is_multimodal(base.config) or f".{prefix}".endswith(f".{stored}"):
        return
    remedy = "save the donor again with this version of transformers, or merge whole models"
    raise fail(f"{place}: {base.name}", f"blocks under {prefix}", f"blocks under {stored}", remedy)


def _check_head(
    base: Checkpoint, config: dict[str, Any], known: Container[str], place: str
) -> None:
    """Refuse to write a head that the donors have not, if the model calls it otherwise."""
    architecture = base.architecture
    written = architecture.tied_names
    unknown = any(name not in known or architecture.role(name)[0] != "head" for name in written)
    if base.tied and not is_tied(config) and unknown and not is_multimodal(base.config):
        expected = f"a head of its own, or {', '.join(written)} as its name in the model"
        remedy = "begin and end with blocks of one donor"
        raise fail(f"{place}: {base.name}", expected, "a tied head of another name", remedy)


def _trials(config: dict[str, Any], blocks: int) -> Iterator[dict[str, Any]]:
    """The config with one number changed, or left to its list."""
    text = language(config)
    for key, own in text.items():
        if type(own) is int and _COUNT.search(key) and not key.endswith(("_id", "_size", "_dim")):
            for value in range(blocks + 1):
                if value != own:
                    trial = deepcopy(config)
                    changed: Any = language(trial)
                    changed[key] = value
                    yield trial
