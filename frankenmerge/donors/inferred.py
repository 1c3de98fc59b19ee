"""Families that are not in the table: their names are inferred from the donor's own tensors.

What is inferred says where tensors are. Whether a block can move is decided by a comparison with
transformers' own blocks, when a recipe moves one.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from os.path import commonprefix

from frankenmerge.donors.architecture import Architecture, Config
from frankenmerge.donors.config import family, is_multimodal, is_tied, language, quantity
from frankenmerge.donors.families import USUAL
from frankenmerge.donors.library import ties
from frankenmerge.errors import Fault

Shapes = Mapping[str, tuple[int, ...]]

_TOWER = re.compile(r"vision|visual|image|img|audio|speech|video|tower|encoder\.|talker|mtp")
"""Parts of prefixes of blocks that are not those of a language model, where there are several."""
_MATRIX = re.compile(
    r"(^|\.)(embed_tokens|embed_in|embed|embeddings?|word_embeddings?|tok_embeddings|tokens_embed"
    r"|wte|w)\.weight$"
)
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings|positions_embed)\.weight$")
_BEFORE = re.compile(r"emb|wpe|project_in")
"""Names of modules before the first block."""
_FIRST_NORM = re.compile(
    r"layernorm_embedding|embeddings?_layer_?norm|embeddings\.(layer_?)?norm", re.IGNORECASE
)
"""Norms before the first block. A few families have one behind the blocks under such a name:
`splicing.surroundings` finds out where a recipe needs to know.
"""
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|output_projection|head)\.(weight|bias)$")
_INNER_HEAD = re.compile(r".*?(?<=[._])head\.")
_NONE = " "
"""A prefix that no tensor has."""
_NORM = re.compile(r"norm|ln|layer_?norm", re.IGNORECASE)


def family_faults(config: Config, place: str) -> list[Fault]:
    """A config.json that does not name its family."""
    if isinstance(name := config.get("model_type"), str) and name:
        return []
    remedy = "restore the donor's config.json"
    return [Fault(f"{place}: model_type", "the name of a family", repr(name), remedy)]


def architecture_of(config: Config, shapes: Shapes) -> Architecture:
    """A donor's family: its entry in the table, or inferred from config, tensor names and shapes.

    Every tensor gets a role; without numbered blocks, or beyond the language model, it is `rest`.
    """
    architecture = family(config)
    if architecture.listed:
        return architecture
    shapes = {name: shape for name, shape in shapes.items() if not re.search(USUAL.unread, name)}
    prefix = blocks_prefix(config, shapes)
    if prefix is None:
        return replace(architecture, root="", block="{}", embedding=(), final=_NONE, head=_NONE)
    outside = {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
    parent = prefix[: prefix.removesuffix(".").rfind(".") + 1]
    root = _root(config, outside, parent)
    head, tied = _head(config, outside, root), {}
    if is_tied(config) and not is_multimodal(config):
        tied = _tied(config, outside)
        mapped = next((name for name, same in tied.items() if _MATRIX.search(same)), None)
        head = _module(mapped) if mapped else head
    inside = [
        name
        for name in outside
        if root
        and name.startswith(root)
        and not name.startswith(head or _NONE)
        and not _TOWER.search(name.removeprefix(parent).removeprefix(root))
    ]
    matrix = [name for name in inside if _MATRIX.search(name) and len(outside[name]) == 2]
    positions = [name for name in inside if _POSITIONS.search(name)]
    width = quantity(config, "width")
    all_norms = [
        name
        for name in inside
        if outside[name] == (width,) and _NORM.search(name) and not _FIRST_NORM.search(name)
    ]
    norms = [name for name in all_norms if "emb" not in name] or all_norms
    first = [name for name in inside if _BEFORE.search(name) and name not in norms]
    modules = dict.fromkeys(
        _module(name).removeprefix(root) for name in (*matrix[:1], *positions, *first)
    )
    final = _module(norms[-1]).removeprefix(root) if norms else _NONE
    return replace(
        architecture,
        root=root,
        block=f"{prefix.removeprefix(root)}{{}}.",
        embedding=tuple(module for module in modules if module != final),
        final=final,
        head=head or (USUAL.head if matrix else _NONE),
        head_parts=() if is_multimodal(config) else _head_parts(outside, root, head),
        ties=tied,
        norm="rms" if "rms_norm_eps" in language(config) else "layer",
        learned_positions=bool(positions),
    )


def blocks_prefix(config: Config, shapes: Shapes) -> str | None:
    """The prefix of the language model's blocks, before their index; None without any.

    Of several lists of blocks, the one with as many as config.json says, that is no tower's, and
    has the most tensors.
    """
    indices: dict[str, set[int]] = defaultdict(set)
    tensors: dict[str, int] = defaultdict(int)
    for name in shapes:
        if match := re.match(r"(.*?(?:^|\.))(\d+)\.", name):
            indices[match[1]].add(int(match[2]))
            tensors[match[1]] += 1
    whole = set(range(quantity(config, "blocks") or 0))

    def rank(prefix: str) -> tuple[bool, bool, int]:
        return whole <= indices[prefix], not _TOWER.search(prefix), tensors[prefix]

    return max(indices, key=rank, default=None)


def _head(config: Config, outside: Shapes, root: str) -> str | None:
    """The prefix of the head's module: by its name, or by its shape outside the inner model."""
    named = [name for name in outside if _HEAD.search(name) and not _TOWER.search(name)]
    size = quantity(config, "vocabulary"), quantity(config, "width")
    shaped = [
        name
        for name, shape in outside.items()
        if root and not name.startswith(root) and shape == size and not _MATRIX.search(name)
    ]
    found = named or shaped
    return _module(found[0]) if found else None


def _root(config: Config, outside: Shapes, parent: str) -> str:
    """The prefix of the inner model: of the blocks' list, and of the embedding where that has one.

    The blocks of an encoder are in a module of their own, and its embedding beside that.
    """
    size = quantity(config, "vocabulary")
    matrices = [
        name
        for name, shape in outside.items()
        if _MATRIX.search(name) and shape[:1] == (size,) and not _TOWER.search(name)
    ]
    if not parent or not matrices or any(name.startswith(parent) for name in matrices):
        return parent
    common = commonprefix([parent, matrices[0]])
    return common[: common.rfind(".") + 1] or parent


def _head_parts(outside: Shapes, root: str, head: str | None) -> tuple[str, ...]:
    """The modules next to the inner one, of a model that has no other parts, and heads within."""
    tops = (f"{name.split('.')[0]}." for name in outside)
    found = [top for top in tops if root and not root.startswith(top)]
    found += [match[0] for name in outside if (match := _INNER_HEAD.match(name))]
    return tuple(
        prefix for prefix in dict.fromkeys(found) if prefix != head and not _TOWER.search(prefix)
    )


def _tied(config: Config, outside: Shapes) -> dict[str, str]:
    """The tensors that the file of a tied model lacks, with those that they are in the model."""
    return {
        name: same
        for name, same in ties(str(config["model_type"])).items()
        if same in outside and name not in outside
    }


def _module(name: str) -> str:
    return name[: name.rfind(".") + 1]
