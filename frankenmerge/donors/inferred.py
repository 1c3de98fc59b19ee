"""Families that are not in the table: inferred from config and tensors, or refused with reasons.

The blocks of an inferred family must be safe to move: they are alike and consist of plain layers,
every other tensor has one possible role, and config.json has no fields that may belong to single
blocks except the known lists.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from frankenmerge.donors.architecture import (
    FULL,
    LAYER_TYPES,
    SLIDING,
    Architecture,
    Config,
    Keys,
)
from frankenmerge.donors.config import BOOKKEEPING, FREE, family, quantity
from frankenmerge.donors.families import FAMILIES, USUAL
from frankenmerge.donors.library import completed, is_known
from frankenmerge.errors import Fault, raise_all

Shapes = Mapping[str, tuple[int, ...]]

_SUPPORTED = f"model_type, one of: {', '.join(sorted(FAMILIES))}"
_NEEDED = (Keys.blocks, Keys.width, Keys.heads, Keys.positions, Keys.vocabulary)
_LISTS = {part.key for part in USUAL.per_block}
_NUMBERS = {number: part.key for part in USUAL.per_block for number in part.numbers}
_SUSPECT = re.compile(
    r"layer(?!_?norm)|block|depth|interval|pattern|step|freq|period|every|share|chunk|window|first_k|index|idx|stride|hybrid|recurren"
)
"""Names of config fields that may refer to single blocks, groups of blocks, or their number."""


def family_faults(config: Config, place: str) -> list[Fault]:
    """The reasons why a config's family is neither in the table nor can be inferred."""
    name = config.get("model_type")
    if not isinstance(name, str):
        return _faults(place, [repr(name)])
    if name in FAMILIES:
        return []
    if isinstance(config.get("text_config"), Mapping):
        remedy = "save its language model as a separate checkpoint, and use that"
        return [
            Fault(place, _SUPPORTED, f"{name}, which has its language model in text_config", remedy)
        ]
    return _not_inferred(config, place, _config_reasons(config, name))


def architecture_of(config: Config, shapes: Shapes, place: str) -> Architecture:
    """A donor's family: its entry in the table, or inferred from config, tensor names and shapes.

    Raises FrankenmergeError, with every reason, for a family that is not in the table and cannot be
    inferred.
    """
    raise_all(family_faults(config, place))
    if family(config).listed:
        return family(config)
    shapes = {name: shape for name, shape in shapes.items() if not re.search(USUAL.unread, name)}
    numbered = Counter(match[1] for name in shapes if (match := re.match(r"(.+?\.)\d+\.", name)))
    prefix = max(numbered, key=numbered.__getitem__, default=".")
    root = prefix[: prefix.removesuffix(".").rfind(".") + 1]
    roles = _roles(config, shapes, root, prefix)
    reasons = [*_block_reasons(shapes, prefix), *_role_reasons(config, shapes, roles)]
    raise_all(_not_inferred(config, place, reasons))
    return replace(
        USUAL,
        root=root,
        block=f"{prefix.removeprefix(root)}{{}}.",
        embedding=tuple(
            module.removeprefix(root)
            for role in ("embedding", "positions")
            for module in roles.get(role, ())
        ),
        final=roles["final"][0].removeprefix(root),
        head=roles.get("head", [USUAL.head])[0],
        norm="rms" if "rms_norm_eps" in config else "layer",
        learned_positions="positions" in roles,
    )


def _not_inferred(config: Config, place: str, reasons: Iterable[str]) -> list[Fault]:
    """One fault with all reasons: the list of families and the remedy are the same for each."""
    found = "; ".join(reasons)
    named = f"{config['model_type']}, which cannot be inferred: {found}"
    return _faults(place, [named] if found else [])


def _faults(place: str, findings: Iterable[str]) -> list[Fault]:
    remedy = "use donors of a supported family, or add this one to FAMILIES"
    found = "; ".join(findings)
    return [Fault(place, _SUPPORTED, found, remedy)] if found else []


def _config_reasons(config: Config, name: str) -> Iterator[str]:
    if missing := [key for key in _NEEDED if key not in config]:
        yield f"config.json has no {', '.join(missing)}"
    if "auto_map" in config and not is_known(name):
        yield "it needs code of its own (auto_map)"
    names = config.get("architectures")
    causal = rf"{re.escape(name.partition('_')[0])}\w*ForCausalLM"
    if (
        not isinstance(names, list)
        or not names
        or not re.fullmatch(causal, str(names[0]), re.IGNORECASE)
    ):
        yield f"architectures is {names!r}, not a causal language model of this family"
    for key, value in config.items():
        if key in _NUMBERS and isinstance(config.get(_NUMBERS[key]), list):
            continue  # the list replaces the number
        if (
            value
            and key not in FREE | BOOKKEEPING | _LISTS
            and (_SUSPECT.search(key) or isinstance(value, list | Mapping))
        ):
            yield f"{key} may belong to single blocks"
    kinds = config.get(LAYER_TYPES.key)
    if isinstance(kinds, list) and (others := sorted(set(map(str, kinds)) - {FULL, SLIDING})):
        yield f"blocks of the kind {', '.join(others)} may depend on their position"
    if (
        kinds is None
        and config.get("sliding_window")
        and config.get("use_sliding_window", True)
        and not _limits_every_block(config)
    ):
        yield "it has a sliding_window but no layer_types that say which blocks use it"


def _limits_every_block(config: Config) -> bool:
    """Whether the window applies to every block, as in Starcoder2.

    It does in a family of transformers whose config has a window and nothing that differs by block.
    """
    full = completed(config) or {}
    return "sliding_window" in full and not any(
        LAYER_TYPES.key in key or (key not in FREE and _SUSPECT.search(key) and full[key])
        for key in full
        if key != "sliding_window"
    )


def _roles(config: Config, shapes: Shapes, root: str, prefix: str) -> dict[str, list[str]]:
    """The modules outside the blocks, by the role that fits their shapes."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if not name.startswith(prefix):
            module, _, leaf = name.rpartition(".")
            modules.setdefault(f"{module}.", {})[leaf] = shape
    width, vocabulary, positions = (
        quantity(config, name) for name in ("width", "vocabulary", "positions")
    )
    roles: dict[str, list[str]] = {}
    for module, held in modules.items():
        inside, plain = module.startswith(root), held.keys() <= {"weight", "bias"}
        if inside and held == {"weight": (vocabulary, width)}:
            role = "embedding"
        elif inside and held == {"weight": (positions, width)}:
            role = "positions"
        elif inside and plain and set(held.values()) == {(width,)}:
            role = "final"
        elif not inside and plain and held.get("weight") == (vocabulary, width):
            role = "head"
        else:
            role = "unknown"
        roles.setdefault(role, []).append(module)
    return roles


def _role_reasons(config: Config, shapes: Shapes, roles: Mapping[str, list[str]]) -> Iterator[str]:
    for role, title in (("embedding", "embedding"), ("final", "final norm")):
        if len(modules := roles.get(role, [])) != 1:
            yield f"one tensor must be the {title}; candidates: {', '.join(modules) or 'none'}"
    for role, title in (("positions", "positions"), ("head", "head")):
        if len(modules := roles.get(role, [])) > 1:
            yield f"one tensor must be the {title}; candidates: {', '.join(modules)}"
    if unknown := roles.get("unknown"):
        yield f"the role of {', '.join(unknown[:5])} is not known"
    if heads := roles.get("head"):
        if "tie_word_embeddings" not in config:
            yield "config.json does not say whether the head is the embedding (tie_word_embeddings)"
        elif config["tie_word_embeddings"] and any(f"{head}bias" in shapes for head in heads):
            yield "its head is the embedding, with a bias"


def _block_reasons(shapes: Shapes, prefix: str) -> Iterator[str]:
    if prefix.count(".") < 2:
        yield "its tensors are not named MODEL.LAYERS.0. etc."
        return
    blocks: dict[str, set[str]] = {}
    for name in shapes:
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            blocks.setdefault(index, set()).add(rest)
    kinds = {frozenset(names) for names in blocks.values()}
    if len(kinds) != 1:
        different = frozenset.union(*kinds) - frozenset.intersection(*kinds)
        yield f"its blocks have different tensors, such as {min(different)}"
    if odd := sorted(
        name for name in frozenset.union(*kinds) if not name.endswith((".weight", ".bias"))
    ):
        yield f"its blocks have {', '.join(odd[:5])}, which plain layers do not have"
