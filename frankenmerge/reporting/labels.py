"""How names are shown: models, tokens, roles, and the commands that write what is missing."""

import re
from pathlib import Path

from frankenmerge.splicing.diagram import visible

ROLES = {"model": "measured", "recipe": "run in memory", "donor": "donor"}
MISSING = {
    "recipes": ("a recipe", "frankenmerge plan ALIGNMENT -o RUN/recipe.yaml"),
    "evidence": ("the plan's evidence", "frankenmerge plan ALIGNMENT -o RUN/recipe.yaml"),
    "alignments": ("an alignment", "frankenmerge align A B -o RUN/ab.alignment.safetensors"),
    "features": ("tables of features", "frankenmerge analyze A -o RUN/a.atlas.safetensors"),
    "evaluations": (
        "an evaluation",
        "frankenmerge evaluate RUN/recipe.yaml --text FILE -o RUN/evaluation.json",
    ),
    "merges": ("a merged checkpoint", "frankenmerge merge RUN/recipe.yaml RUN/merged"),
}
VERIFIED = " (plan --verify)"
"""After the name of a recipe that `plan` measured itself."""


def shortened(name: str) -> str:
    """A model's name without its folder, cut in the middle to fit a label."""
    text = visible(Path(name).name)
    return text if len(text) <= 24 else f"{text[:11]}…{text[-12:]}"


def task_name(task: str) -> str:
    """A task for a label; a file of items without folder and suffix."""
    return shortened(task.removesuffix(".jsonl"))


def recipe_name(name: str) -> str:
    """The name of a recipe for a label."""
    return visible(name) if name.endswith(VERIFIED) else shortened(name)


def token(text: str) -> str:
    """A token with spaces (many as ␣×24), line ends and hidden characters made visible, cut."""
    shown = (
        re.sub(" {4,}", lambda run: f"␣×{len(run[0])}", text)
        .replace("\r\n", "↵")
        .translate({10: "↵", 9: "⇥", 32: "␣"})
    )
    return visible(shown if len(shown) <= 32 else f"{shown[:31]}…") or "(empty)"
