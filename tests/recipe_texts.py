"""Texts of recipes, parsed or refused."""

import pytest

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_file import (
    parse_recipe,
)
from frankenmerge.errors import FrankenmergeError

GOOD = """\
slices:
  - sources:
      - model: first
        layer_range: [0, 3]
  - sources:
      - model: org/second
        layer_range: [1, 4]
merge_method: passthrough
base_model: org/second
dtype: bfloat16
tokenizer_source: base
"""


def refused(text: str) -> tuple:
    with pytest.raises(FrankenmergeError) as caught:
        parse_recipe(text, "r.yaml")
    for fault in caught.value.faults:
        assert all(isinstance(part, str) and part.strip() for part in fault), fault
        assert fault.place.startswith("r.yaml")
    return caught.value.faults


def places(text: str) -> set[str]:
    return {fault.place for fault in refused(text)}


def one_slice(layer_range: str, model: str = "a") -> str:
    return (
        f"merge_method: passthrough\nslices:\n  - sources:\n      - model: {model}\n"
        f"        layer_range: {layer_range}\n"
    )


def sound(text: str) -> Recipe:
    return parse_recipe(text, "r.yaml")
