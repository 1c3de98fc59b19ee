"""The operations of a recipe: every tensor's donors, parameters, type and seed, by hand."""

from pathlib import Path

import pytest
import torch
from conftest import resolved, write_donor
from lettered import (
    EMBEDDING,
    HEAD,
    NORM,
    PRECEDENCE,
    STACK,
    faults_of,
    layer,
    named,
    names_of,
    whole,
)
from transformers import AutoConfig, AutoModelForCausalLM

from frankenmerge.donors.config import is_tied
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model
from frankenmerge.splicing.assemble import assemble
from frankenmerge.splicing.methods import METHODS
from frankenmerge.splicing.operations import Combine, Copy


@pytest.fixture
def plan(donors, tmp_path):
    """Resolve a recipe of the tests' donors, called by their letters: operations by name."""

    def call(text: str, **more: Path) -> dict:
        splice = whole(text, donors | more, tmp_path)
        return {operation.name: operation for operation in splice.operations}

    return call


# Parameters


@pytest.mark.parametrize("speaking", range(1, 16))
def test_source_before_slice_before_module_before_recipe(plan, speaking):
    said = [bool(speaking >> number & 1) for number in range(4)]
    text = (
        PRECEDENCE.replace("SOURCE", ", parameters: {weight: 1}" if said[0] else "")
        .replace("SLICE", "        parameters: {weight: 2}" if said[1] else "")
        .replace("MODULE", "    parameters: {weight: 3}" if said[2] else "")
        .replace("RECIPE", "parameters: {weight: 4}" if said[3] else "")
    )
    shared = [value for value, there in zip((2, 3, 4), said[1:], strict=True) if there]
    if not shared:  # nothing is said of the second source
        with pytest.raises(FrankenmergeError):
            plan(text)
        return
    for operation in plan(text).values():
        assert [entry.parameters["weight"] for entry in operation.inputs] == [
            1 if said[0] else shared[0],
            shared[0],
        ]


def test_a_gradient_runs_over_each_slice_from_its_first_to_its_last_block(plan):
    made = plan("""\
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
  - sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [1, 3]}]
  - sources: [{model: a, layer_range: [3, 4]}, {model: b, layer_range: [3, 4]}]
parameters: {t: [0, 0.6, 0.9]}
""")
    found = [made[layer(index)].parameters["t"] for index in range(7)]
    # Depths 0, 1/3, 2/3, 1 of the first slice: 0, 2/3 of the way to 0.6, a third of the way on to
    # 0.9, 0.9.
    assert found == pytest.approx([0, 0.4, 0.7, 0.9, 0, 0.9, 0.9])
    # What is in no block is at depth 0, as mergekit 0.1.5 has it.
    assert (
        made[EMBEDDING].parameters["t"]
        == made[NORM].parameters["t"]
        == made[HEAD].parameters["t"]
        == 0
    )


def test_filters_name_donors_tensors_for_models_and_the_result_s_for_the_whole(plan):
    made = plan(
        """\
merge_method: task_arithmetic
base_model: c
slices:
  - sources:
      - {model: c, layer_range: [1, 3]}
      - model: a
        layer_range: [2, 4]
        parameters: {weight: [{filter: layers.3., value: 5}, {value: 6}]}
parameters:
  lambda: [{filter: layers.0., value: 7}, {filter: embed, value: 8}, {value: 9}]
""".replace("model: c", "model: deep")
    )
    assert [made[layer(index)].inputs[0].parameters["weight"] for index in (0, 1)] == [6, 5]
    assert [made[name].parameters["lambda"] for name in (layer(0), layer(1), EMBEDDING, HEAD)] == [
        7,
        9,
        8,
        9,
    ]


def test_defaults_are_filled_in_and_have_their_types(plan):
    made = plan(
        "merge_method: ties\nbase_model: a\nmodels: [{model: b}]\n"
        "parameters: {weight: 1, normalize: 0, int8_mask: true}\n"
    )
    operation = made[layer(2)]
    assert operation.inputs[0].parameters == {"weight": 1, "density": 1.0}
    assert operation.parameters["normalize"] is False and operation.parameters["lambda"] == 1.0


# Models and bases


@pytest.mark.parametrize("listed", ["", "{model: deep}, "])
def test_the_base_of_whole_models_is_no_input_whether_listed_or_not(plan, donors, tmp_path, listed):
    third = write_donor(tmp_path / "third", seed=8)
    listed = listed.replace("deep", "third")
    text = (
        "merge_method: ties\nbase_model: third\n"
        f"models: [{listed}{{model: a}}, {{model: b}}]\nparameters: {{weight: 1}}\n"
    )
    made = plan(text, third=third)
    for index in range(4):
        operation = made[layer(index)]
        assert names_of(operation.inputs, donors) == ["a", "b"] and operation.base.donor == str(
            third
        )
        assert [entry.source for entry in (*operation.inputs, operation.base)] == [layer(index)] * 3


def test_a_base_that_the_method_has_no_use_for_gives_only_the_config(plan, donors, tmp_path):
    third = write_donor(tmp_path / "third", seed=8)
    made = plan(
        "merge_method: linear\nbase_model: third\n"
        "models: [{model: a}, {model: b}]\nparameters: {weight: 1}\n",
        third=third,
    )
    assert all(
        operation.base is None and names_of(operation.inputs, donors) == ["a", "b"]
        for operation in made.values()
    )


def test_a_slice_s_own_base_counts_there(plan, donors):
    made = plan("""\
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
    base_model: b
parameters: {t: 0.5}
""")
    assert [
        names_of([made[layer(index)].base, *made[layer(index)].inputs], donors) for index in (1, 2)
    ] == [["a", "b"], ["b", "a"]]


def test_a_base_that_is_no_source_gives_the_range_that_the_sources_share(plan, donors):
    text = """\
merge_method: ties
base_model: deep
slices: [{sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [1, 3]}]}]
parameters: {weight: 1}
"""
    assert [plan(text)[layer(index)].base.source for index in (0, 1)] == [layer(1), layer(2)]
    with pytest.raises(FrankenmergeError) as caught:
        plan(text.replace("b, layer_range: [1, 3]", "b, layer_range: [0, 2]"))
    assert "range of the base model" in caught.value.faults[0].expected


@pytest.mark.parametrize("method, parameters", [("linear", "weight: 1"), ("slerp", "t: 0.25")])
def test_a_model_merged_with_itself_is_not_discarded(plan, method, parameters):
    made = plan(f"""\
merge_method: {method}
base_model: a
slices: [{{sources: [{{model: a, layer_range: [0, 2]}}, {{model: a, layer_range: [2, 4]}}]}}]
parameters: {{{parameters}}}
""")
    for index in (0, 1):
        operation = made[layer(index)]
        found = [
            entry.source
            for entry in ((operation.base,) if operation.base else ()) + operation.inputs
        ]
        assert found == [layer(index), layer(index + 2)]


def test_a_slice_of_one_source_stays_as_it_is_where_the_method_needs_two(plan, donors):
    made = plan("""\
merge_method: slerp
base_model: a
slices:
  - sources: [{model: b, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
parameters: {t: 0.5}
""")
    assert (
        isinstance(made[layer(1)], Copy)
        and names_of([made[layer(1)]], donors) == ["b"]
        and isinstance(made[EMBEDDING], Copy)
    )
    assert isinstance(made[layer(2)], Combine)


# Copies, types, ends, seeds


def test_a_plain_passthrough_is_all_copies(plan):
    assert all(
        isinstance(operation, Copy) for operation in plan(STACK.replace("PARAMETERS", "")).values()
    )
    unscaled = STACK.replace("PARAMETERS", ", parameters: {scale: 1}")
    assert all(isinstance(operation, Copy) for operation in plan(unscaled).values())


def test_what_is_scaled_is_computed_and_the_rest_copied(plan):
    made = plan(
        STACK.replace(
            "PARAMETERS", ", parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}"
        )
    )
    computed = {
        name: operation for name, operation in made.items() if isinstance(operation, Combine)
    }
    assert set(computed) == {layer(index, "self_attn.o_proj.weight") for index in (0, 1)}
    assert all(
        operation.method == "passthrough" and operation.inputs[0].parameters["scale"] == 0.5
        for operation in computed.values()
    )


@pytest.mark.parametrize(
    "keys, dtype",
    [
        ("dtype: bfloat16", "BF16"),
        ("out_dtype: float16", "F16"),
        ("dtype: float32\nout_dtype: bfloat16", "BF16"),
    ],
)
def test_the_type_asked_for_is_that_of_every_tensor_and_of_the_config(
    donors, tmp_path, keys, dtype
):
    stage = whole(STACK.replace("PARAMETERS", "") + keys, donors, tmp_path)
    assert {operation.dtype for operation in stage.operations} == {dtype}
    assert all(
        isinstance(operation, Combine) and operation.method == "passthrough"
        for operation in stage.operations
    )
    assert stage.config["dtype"] == {"BF16": "bfloat16", "F16": "float16"}[dtype]
    halves = sum(2 * operation.inputs[0].tensor.bytes // 4 for operation in stage.operations)
    assert sum(operation.bytes for operation in stage.operations) == halves


def test_donors_of_several_types_need_one_named(donors, tmp_path):
    half = write_donor(tmp_path / "half", seed=3, dtype="bfloat16")
    text = STACK.replace("PARAMETERS", "").replace("model: b", "model: half")
    (fault,) = faults_of(text, donors | {"half": half}, tmp_path)
    assert fault.place == "recipe: dtype" and "float32" in fault.found and "bfloat16" in fault.found
    stage = whole(text + "dtype: float32", donors | {"half": half}, tmp_path)
    kinds = {
        type(operation)
        for operation in stage.operations
        if operation.name.startswith(("model.layers.0.", "model.layers.1."))
    }
    assert (
        kinds == {Copy}
        and isinstance(stage.operations[-1], Combine)
        and stage.operations[-1].dtype == "F32"
    )


def test_embedding_norm_and_head_come_from_the_donors_named(plan, donors):
    keys = "embedding: deep\nfinal_norm: b\nhead: deep\nparameters: {scale: 3}\n"
    made = plan(STACK.replace("PARAMETERS", "") + keys)
    ends = [made[name] for name in (EMBEDDING, NORM, HEAD)]
    assert all(isinstance(operation, Copy) for operation in ends) and names_of(ends, donors) == [
        "deep",
        "b",
        "deep",
    ]
    assert made[layer(0)].inputs[0].parameters["scale"] == 3


@pytest.mark.parametrize(
    "text, head",
    [
        (
            "merge_method: linear\nmodels: [{model: b}, {model: t}]\n"
            "parameters: {weight: [0.2, 1]}\n",
            None,
        ),
        (
            "merge_method: linear\nmodels: [{model: b}, {model: a}]\nparameters: {weight: 1}\n",
            [EMBEDDING, HEAD],
        ),
        (
            "merge_method: ties\nmodels: [{model: b}]\nbase_model: a\nparameters: {weight: 1}\n",
            [EMBEDDING, HEAD],
        ),
        ("merge_method: passthrough\nmodels: [{model: b}]\n", None),
        ("merge_method: passthrough\nmodels: [{model: b}]\nembedding: t\n", [EMBEDDING]),
        ("merge_method: passthrough\nmodels: [{model: b}]\nembedding: b\nhead: b\n", None),
        (
            "merge_method: linear\nmodels: [{model: b}]\nbase_model: t\n"
            "embedding: b\nparameters: {weight: 1}\n",
            [EMBEDDING],
        ),
    ],
)
def test_the_head_is_written_where_it_parts_from_the_embedding(donors, tmp_path, text, head):
    tied = write_donor(tmp_path / "t", seed=7, tie_word_embeddings=True)
    stage = whole(text, donors | {"t": tied}, tmp_path)
    made = {operation.name: operation for operation in stage.operations}
    found = made.get(HEAD)
    sources = found and (
        [found.source]
        if isinstance(found, Copy)
        else [entry.source for entry in (*found.inputs, *filter(None, [found.base]))]
    )
    assert sources == head and is_tied(stage.config) == (head is None)


def test_every_tensor_has_a_seed_of_its_own_that_the_recipe_s_seed_changes(plan):
    text = "merge_method: dare_ties\nbase_model: a\nmodels: [{model: b}]\nparameters: {weight: 1}\n"
    seeds = [
        {name: operation.seed for name, operation in plan(text + more).items()}
        for more in ("", "", "seed: 0", "seed: 1")
    ]
    assert seeds[0] == seeds[1] == seeds[2] and len(set(seeds[0].values())) == len(seeds[0])
    assert not set(seeds[0].values()) & set(seeds[3].values())
    assert all(0 <= seed < 1 << 63 for seed in seeds[0].values())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_merge_by_every_method_has_the_tensors_of_its_model(donors, tmp_path, method):
    third = write_donor(tmp_path / "third", seed=8)
    spec = METHODS[method]
    needed = spec.models[1] or max(spec.models[0], 2)
    models = ", ".join(f"{{model: {name}}}" for name in ("a", "b")[:needed])
    parameters = ", ".join(
        f"{name}: 0.5" for name, parameter in spec.parameters.items() if parameter.default is None
    )
    text = f"merge_method: {method}\nmodels: [{models}]\nparameters: {{{parameters}}}\n" + (
        "base_model: third\n" if spec.base != "none" else ""
    )
    stage = whole(text, donors | {"third": third}, tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**stage.config))
    assert {made.name: tuple(made.shape) for made in stage.operations} == {
        key: tuple(value.shape) for key, value in model.state_dict().items()
    }


def test_in_memory_embedding_norm_and_head_come_from_the_donors_named_too(donors):
    recipe = named(
        STACK.replace("PARAMETERS", "") + "embedding: b\nfinal_norm: a\nhead: deep\n", donors
    )
    splice = resolved(recipe)
    models = {name: load_model(checkpoint) for name, checkpoint in splice.donors.items()}
    state = assemble(splice, models).state_dict()
    for name, donor in (
        (EMBEDDING, "b"),
        (NORM, "a"),
        (HEAD, "deep"),
        (layer(1), "a"),
        (layer(3), "b"),
    ):
        assert torch.equal(state[name], models[str(donors[donor])].state_dict()[name])
