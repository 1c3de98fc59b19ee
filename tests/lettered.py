"""Recipes whose donors are called by letters, resolved; and the names of their tensors."""

import shutil

import pytest

from frankenmerge.artefacts.recipe import renamed
from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.stages import resolve_stages

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
PRECEDENCE = """\
merge_method: linear
modules:
  default:
    slices:
      - sources:
          - {model: a, layer_range: [0, 4]SOURCE}
          - {model: b, layer_range: [0, 4]}
SLICE
MODULE
RECIPE
"""
"""Places for a parameter at every level of a recipe."""
STACK = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]PARAMETERS}]
  - sources: [{model: b, layer_range: [2, 4]}]
"""


def whole(text: str, donors, tmp_path):
    """The splice of a recipe of one stage; `donors` are folders by letter."""
    scratch = tmp_path / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    (splice,) = resolve_stages([named(text, donors)], scratch).all
    return splice


def named(text: str, donors):
    return renamed(parse_recipe(text, "r.yaml"), lambda name: str(donors.get(name, name)))


def faults_of(text: str, donors, tmp_path) -> list:
    with pytest.raises(FrankenmergeError) as caught:
        whole(text, donors, tmp_path)
    return list(caught.value.faults)


def layer(index: int, rest: str = "self_attn.q_proj.weight") -> str:
    return f"model.layers.{index}.{rest}"


def names_of(inputs, donors) -> list[str]:
    letters = {str(path): letter for letter, path in donors.items()}
    return [letters[entry.donor] for entry in inputs]
