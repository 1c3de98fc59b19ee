"""What a recipe is called in tables and charts."""

import pytest

from frankenmerge.artefacts.recipe_file import parse_recipes
from frankenmerge.artefacts.recipe_label import label

LINEAR = "merge_method: linear\nmodels:\n"
TWO = """\
  - {{model: x/code, parameters: {{weight: {}}}}}
  - {{model: y/prose, parameters: {{weight: {}}}}}
"""
BASE = "base_model: z/base\nmodels:\n"


def half(rest: float) -> str:
    return f"[{{filter: self_attn, value: 0.5}}, {{value: {rest}}}]"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (LINEAR + TWO.format(0.532, 0.468), "0.53 code + 0.47 prose"),
        (LINEAR + TWO.format(1, 0), "code"),
        (
            LINEAR + TWO.format(half(1), half(0)),
            "self_attn: 0.50 code + 0.50 prose, else code",
        ),
        (LINEAR + TWO.format("[0.2, 0.8]", "[0.8, 0.2]"), "linear: code+prose"),
        (
            "merge_method: linear\nslices:\n"
            "  - sources: [{model: code, layer_range: [0, 2], parameters: {weight: 1}}]\n"
            "  - sources:\n"
            "      - {model: code, layer_range: [2, 8], parameters: {weight: 0.5}}\n"
            "      - {model: prose, layer_range: [2, 8], parameters: {weight: 0.5}}\n",
            "code[0:2] (0.50 code + 0.50 prose)[2:8]",
        ),
        (
            "merge_method: task_arithmetic\n" + BASE + TWO.format(0.6, 0.6),
            "base + 0.6 (code) + 0.6 (prose)",
        ),
        (
            "merge_method: ties\nparameters: {density: 0.2}\n" + BASE + TWO.format(1.0, 0.8),
            "ties: base + 1 (code) + 0.8 (prose), density 0.2",
        ),
        (
            "merge_method: passthrough\nslices:\n"
            "  - sources: [{model: code, layer_range: [0, 6]}]\n"
            "  - sources:\n"
            "      - model: code\n"
            "        layer_range: [4, 8]\n"
            "        parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}\n",
            "code[0:6] 0.5 x code[4:8]",
        ),
        (
            "merge_method: slerp\nbase_model: code\nparameters: {t: 0.5}\nmodels:\n"
            "  - {model: code}\n  - {model: prose}\n",
            "slerp: code+prose",
        ),
    ],
)
def test_a_label_names_the_numbers_that_tell_recipes_apart(text, shown):
    (recipe,) = parse_recipes(text, "recipe.yaml")
    assert label(recipe) == shown
