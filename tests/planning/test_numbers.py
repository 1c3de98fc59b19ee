"""Numbers of recipes: which there are, their ranges, and finer ones that change nothing."""

from typing import Any

import pytest
from conftest import resolved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from relatives import opened

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.planning.numbers import numbers_of, refined, with_numbers
from frankenmerge.splicing.operations import Combine
from frankenmerge.workflows.gaining import parts_of

ENDS = {"a": ["embed_tokens", "lm_head"], "g": ["wte", "wpe", "lm_head"]}
FILTERS = {
    "a": ("self_attn", "mlp", "q_proj", "down_proj", "layernorm", "embed_tokens", "lm_head"),
    "g": ("attn", "mlp", "c_proj", "attn.c_attn", "bias", "ln_1", "wte"),
}
ANYWHERE = ("weight", "proj")


def recipe(**fields: Any) -> Recipe:
    return Recipe.model_validate(fields)


def values(made: Recipe) -> list[float]:
    return [number.value for number in numbers_of(made)]


def test_weights_densities_and_lambda_are_numbers_and_flags_are_not():
    made = recipe(
        merge_method="ties",
        base_model="base",
        parameters={"normalize": True, "int8_mask": True, "lambda": 0.9},
        models=[
            {"model": "x", "parameters": {"weight": 0.5, "density": [0.2, 0.4]}},
            {
                "model": "y",
                "parameters": {"weight": [{"filter": "mlp", "value": [1, 2]}, {"value": 0.3}]},
            },
        ],
    )
    assert sorted(values(made)) == sorted([0.9, 0.5, 0.2, 0.4, 1, 2, 0.3])
    assert {number.parameter.effect for number in numbers_of(made)} == {"smooth", "rough"}


def test_t_and_scales_are_numbers_and_tolerances_are_not():
    sources = [{"model": "x", "layer_range": [0, 4]}, {"model": "y", "layer_range": [0, 4]}]
    slerp = recipe(
        merge_method="slerp",
        base_model="x",
        slices=[{"sources": sources}],
        parameters={"t": [0, 0.5, 1]},
    )
    assert values(slerp) == [0, 0.5, 1]
    stack = recipe(
        merge_method="passthrough",
        slices=[
            {
                "sources": [
                    {
                        "model": "x",
                        "layer_range": [0, 4],
                        "parameters": {"scale": [{"filter": "o_proj", "value": 0}, {"value": 1}]},
                    }
                ]
            }
        ],
    )
    assert values(stack) == [0, 1]
    ram = recipe(
        merge_method="ram",
        base_model="x",
        models=[{"model": "y"}],
        parameters={"epsilon": 1e-5},
    )
    assert values(ram) == []
    assert values(recipe(merge_method="linear", models=[{"model": "x"}, {"model": "y"}])) == []


def test_other_numbers_stand_where_the_old_ones_did_within_their_ranges():
    made = recipe(
        merge_method="ties",
        base_model="base",
        models=[
            {"model": "x", "parameters": {"weight": 0.5, "density": [0.2, 0.4]}},
            {"model": "y", "parameters": {"weight": [{"filter": "mlp", "value": 1}, {"value": 2}]}},
        ],
    )
    found = with_numbers(made, numbers_of(made), [-3, 1.7, -0.1, 5, 6])
    assert found.models and made.models
    assert found.models[0].parameters == {"weight": -3, "density": [1, 0]}
    assert found.models[1].parameters == {"weight": [{"filter": "mlp", "value": 5}, {"value": 6}]}
    assert with_numbers(made, numbers_of(made), values(made)) == made
    assert made.models[0].parameters == {"weight": 0.5, "density": [0.2, 0.4]}, "it was changed"
    nearswap = recipe(
        merge_method="nearswap",
        base_model="x",
        models=[{"model": "y"}],
        parameters={"t": 0.1},
    )
    assert values(with_numbers(nearswap, numbers_of(nearswap), [-2])) == [0]
    assert values(with_numbers(nearswap, numbers_of(nearswap), [7])) == [7]


def plain_settings() -> st.SearchStrategy[Any]:
    number = st.integers(1, 20).map(lambda tenths: tenths / 10)
    return st.one_of(number, st.lists(number, min_size=1, max_size=5))


def written_settings(names: tuple[str, ...], *, whole: bool) -> st.SearchStrategy[Any]:
    """Settings of any form; those that are not `whole` may leave tensors to the next level."""
    entry = st.fixed_dictionaries({"filter": st.sampled_from(names), "value": plain_settings()})
    entries = st.lists(entry, min_size=1, max_size=3)
    last = st.fixed_dictionaries({"value": plain_settings()})
    ended = st.tuples(entries, last).map(lambda pair: [*pair[0], pair[1]])
    return st.one_of(plain_settings(), ended, *(() if whole else (entries,)))


def parameters_of(made: Recipe, donors) -> dict[str, list[dict[str, float]]]:
    return {
        each.name: [dict(given.parameters) for given in each.inputs] + [dict(each.parameters)]
        for each in resolved(made, donors).operations
        if isinstance(each, Combine)
    }


def alike(one: Recipe, other: Recipe, donors) -> None:
    mine, theirs = parameters_of(one, donors), parameters_of(other, donors)
    assert mine.keys() == theirs.keys()
    for name, found in mine.items():
        for ours, other_ones in zip(found, theirs[name], strict=True):
            assert ours == pytest.approx(other_ones, abs=1e-9), name


@pytest.mark.parametrize("per", ["block", "map"])
@pytest.mark.parametrize("pair", ["ab", "gh"])
@given(data=st.data())
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_finer_numbers_are_the_same_recipe(donors, per, pair, data):
    checkpoints = opened(*(donors[name] for name in pair))
    first, second = checkpoints
    names = FILTERS[pair[0]] + ANYWHERE
    wide = data.draw(written_settings(names, whole=True), label="of the recipe")
    narrow = data.draw(written_settings(names, whole=False), label="of a model")
    made = recipe(
        merge_method="linear",
        parameters={"weight": wide},
        models=[{"model": first, "parameters": {"weight": narrow}}, {"model": second}],
    )
    finer = refined(made, per, 4, parts_of(checkpoints, None).maps, ENDS[pair[0]])
    alike(finer, made, checkpoints)


@given(data=st.data())
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_slices_have_their_own_depth(donors, data):
    checkpoints = opened(donors["a"], donors["b"])
    first, second = checkpoints

    def part(start: int, stop: int) -> dict[str, Any]:
        weight = data.draw(written_settings(FILTERS["a"], whole=True))
        return {
            "sources": [
                {"model": name, "layer_range": [start, stop], "parameters": {"weight": weight}}
                for name in (first, second)
            ]
        }

    made = recipe(merge_method="linear", slices=[part(0, 3), part(2, 4)])
    finer = refined(made, "map", 4, parts_of(checkpoints, None).maps, ENDS["a"])
    alike(finer, made, checkpoints)


def test_every_map_of_every_block_has_a_number_of_its_own(donors):
    checkpoints = opened(donors["a"], donors["b"])
    made = recipe(
        merge_method="linear",
        models=[{"model": name, "parameters": {"weight": 0.5}} for name in checkpoints],
    )
    maps = parts_of(checkpoints, None).maps
    assert len(maps) == 7
    assert refined(made, "setting", 4, maps, ENDS["a"]) == made
    # For each model: two ends, and four numbers for every map and for all else.
    assert len(numbers_of(refined(made, "block", 4, maps, ENDS["a"]))) == 2 * (2 + 4)
    finer = refined(made, "map", 4, maps, ENDS["a"])
    assert len(numbers_of(finer)) == 2 * (2 + 4 * (7 + 1))
    plain = parameters_of(made, checkpoints)
    seen = set()
    numbers = numbers_of(finer)
    for place in range(len(numbers)):
        changed = values(finer)
        changed[place] = 0.9
        found = parameters_of(with_numbers(finer, numbers, changed), checkpoints)
        names = frozenset(name for name in plain if found[name] != plain[name])
        seen.add(names - {"model.norm.weight"})  # goes with what is left of the first block
    outside = {"model.embed_tokens.weight", "lm_head.weight"}
    norms = [
        {f"model.layers.{at}.{name}_layernorm.weight" for name in ("input", "post_attention")}
        for at in range(4)
    ]
    alone = {name for name in plain if "proj" in name} | outside
    assert seen == {frozenset([name]) for name in alone} | set(map(frozenset, norms))


def test_flags_stay_flags(donors):
    checkpoints = opened(donors["a"], donors["b"])
    made = recipe(
        merge_method="linear",
        parameters={"normalize": False},
        models=[{"model": name, "parameters": {"weight": 0.4}} for name in checkpoints],
    )
    finer = refined(made, "map", 4, parts_of(checkpoints, None).maps, ENDS["a"])
    assert finer.parameters == {"normalize": False}
    alike(finer, made, checkpoints)
