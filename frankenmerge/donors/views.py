"""A text-only donor as part of a multimodal one, and the language model of a multimodal donor."""

from dataclasses import replace
from typing import Any

from frankenmerge.donors.architecture import Architecture, Config
from frankenmerge.donors.checkpoint import Checkpoint, Roles, View
from frankenmerge.donors.config import STORAGE_KEYS, is_multimodal, language, text_only
from frankenmerge.donors.library import declared


def seen_as(donor: Checkpoint, base: Checkpoint) -> Checkpoint:
    """A donor in the kind of another one: wrapped alike, or its language model alone.

    Its tensors keep their names in its file, and get the roles and canonical names that `base` has
    for them; towers that `base` does not have are left out. A donor of the same kind, or of another
    language model, is returned as it is.
    """
    wrapped = is_multimodal(donor.config) or is_multimodal(base.config)
    if not wrapped or donor.config["model_type"] == base.config["model_type"]:
        return donor
    text = text_only(donor.config)
    if text["model_type"] != text_only(base.config)["model_type"]:
        return donor
    roles = _roles(donor, base)
    kept = {name for names in roles.values() for name in names.values()}
    return replace(
        donor,
        config=_config(donor, text, base),
        tensors={name: tensor for name, tensor in donor.tensors.items() if name in kept},
        identity=lambda: donor.fingerprint,
        written=None,
        view=View(base.architecture, roles),
    )


def tower_remarks(donor: Checkpoint, base: Checkpoint) -> list[str]:
    """What is left out of a multimodal donor as part of a text-only model."""
    view = seen_as(donor, base)
    if view is donor or is_multimodal(base.config):
        return []
    left = sorted(donor.tensors.keys() - view.tensors.keys())
    which = f"{len(left)} tensors, such as {left[0]}," if left else "nothing"
    return [f"{which} of {donor.name} left out: the result is text-only, as {base.name} is"]


def _config(donor: Checkpoint, own: Config, base: Checkpoint) -> dict[str, Any]:
    name = str(language(base.config)["model_type"])
    # Fields that the base's family does not have decide nothing there: `differences` compares them.
    known = declared(name) | language(base.config).keys()
    text = {key: value for key, value in own.items() if key in known} | {"model_type": name}
    stored = {key: donor.config[key] for key in STORAGE_KEYS if key in donor.config}
    if not is_multimodal(base.config):
        return text | stored | {"tie_word_embeddings": donor.tied}
    around = {key: value for key, value in base.config.items() if key not in STORAGE_KEYS}
    return around | stored | {"text_config": text, "tie_word_embeddings": donor.tied}


def _roles(donor: Checkpoint, base: Checkpoint) -> Roles:
    own, other = donor.architecture, base.architecture
    roles: Roles = {}
    for (role, index), names in donor.by_role.items():
        beside = role == "rest" and not is_multimodal(base.config)
        for canonical, name in names.items():
            if beside and not canonical.startswith(own.root):
                continue
            roles.setdefault((role, index), {})[_renamed(role, canonical, own, other)] = name
    return roles


def _renamed(role: str, canonical: str, own: Architecture, other: Architecture) -> str:
    """A canonical name as another architecture has it."""
    embeddings = zip(own.embedding, other.embedding, strict=False)
    pairs = {
        "head": [(own.head, other.head)],
        "block": [(own.root + own.block, other.root + other.block)],
        "embedding": [(own.root + one, other.root + two) for one, two in embeddings],
        "final": [(own.root + own.final, other.root + other.final)],
        "rest": [(own.root, other.root)],
    }
    for one, two in pairs.get(role, ()):
        if canonical.startswith(one):
            return two + canonical.removeprefix(one)
    return canonical
