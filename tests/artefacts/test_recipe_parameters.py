"""Parameters as recipes write them: scalars, gradients, filters, and which level counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frankenmerge.artefacts.recipe_parameters import evaluate, filters, resolve, setting, values

NAME = "model.layers.3.self_attn.q_proj.weight"


@pytest.mark.parametrize("value", [0, 1, -2, 0.25, True, False])
def test_a_scalar_is_itself_everywhere(value):
    assert evaluate(setting(value), NAME, 0.3) is value


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert setting("1e-5") == 1e-5 and setting(["1e-1", 2]) == [0.1, 2]


@pytest.mark.parametrize(
    "t, expected",
    # Five numbers are at 0, 1/4, 1/2, 3/4 and 1; by hand between them.
    [
        (0, 0),
        (0.25, 0.5),
        (0.5, 0.3),
        (0.75, 0.7),
        (1, 1),
        (0.125, 0.25),
        (0.3, 0.5 - 0.2 * 0.2),
        (0.9, 0.7 + 0.6 * 0.3),
    ],
)
def test_a_gradient_is_interpolated_over_the_depth(t, expected):
    assert evaluate(setting([0, 0.5, 0.3, 0.7, 1]), NAME, t) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0, 1))
def test_a_gradient_is_piecewise_linear(numbers, t):
    expected = (
        np.interp(t, np.linspace(0, 1, len(numbers)), numbers) if len(numbers) > 1 else numbers[0]
    )
    assert evaluate(setting(numbers), NAME, t) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "entries, expected",
    [
        ([{"filter": "self_attn", "value": 1}, {"value": 2}], 1),
        ([{"filter": "mlp", "value": 1}, {"value": 2}], 2),
        ([{"filter": "mlp", "value": 1}, {"filter": "*", "value": 3}], 3),
        ([{"filter": "self_attn", "value": 1}, {"filter": "q_proj", "value": 2}], 1),
        ([{"filter": "q_proj", "value": [0, 4]}, {"value": 2}], 1),
        ({"filter": "layers.3.", "value": 7}, 7),
        ([{"filter": "mlp", "value": 1}], None),
    ],
)
def test_the_first_filter_that_is_part_of_the_name_counts(entries, expected):
    assert evaluate(setting(entries), NAME, 0.25) == expected


SOURCE, SLICE, MODULE, RECIPE = 1.0, 2.0, 3.0, 4.0
NONE_FOR_IT = [{"filter": "mlp", "value": 9}]


@pytest.mark.parametrize("given_at", range(16))
@pytest.mark.parametrize("filtered_at", range(4))
def test_the_narrowest_level_that_has_a_value_counts(given_at, filtered_at):
    """Every subset of the four levels; a level without a matching filter counts as absent."""
    levels: list[dict | None] = [
        {"weight": value} if given_at >> number & 1 else None
        for number, value in enumerate((SOURCE, SLICE, MODULE, RECIPE))
    ]
    speaking = [
        value
        for number, value in enumerate((SOURCE, SLICE, MODULE, RECIPE))
        if given_at >> number & 1 and number != filtered_at
    ]
    levels[filtered_at] = {"weight": setting(NONE_FOR_IT)}
    assert resolve("weight", levels, NAME, 0.5) == (speaking[0] if speaking else None)


def test_another_parameter_at_a_narrower_level_hides_nothing():
    assert resolve("weight", [{"density": 1}, None, {"weight": 0}], NAME, 0.5) == 0


def test_values_and_filters_of_a_setting():
    written = setting(
        [{"filter": "mlp", "value": [1, 2]}, {"filter": "attn", "value": 3}, {"value": 4}]
    )
    assert list(values(written)) == [1, 2, 3, 4] and filters(written) == ["mlp", "attn"]
    assert list(values(5)) == [5] and filters([1, 2]) == [] == filters(1)
