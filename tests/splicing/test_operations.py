"""What a recipe asks of every tensor: its donors, its parameters at its depth, its type. Computed here by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_donor, write_stand_in
from transformers import AutoConfig, AutoModelForCausalLM

from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.donors.config import is_tied
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.compatibility import recipe_faults, result_config
from frankenmerge.splicing.methods import METHODS
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.operations import Combine, Copy
from frankenmerge.splicing.stages import checked

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def plan(donors, tmp_path):
    """Schedule a recipe of the tests' donors, called by their letters: operations by name."""

    def call(text: str, **more: Path) -> dict:
        stage = whole(text, donors | more, tmp_path)
        return {operation.name: operation for operation in stage.operations}

    return call


def whole(text: str, donors, tmp_path):
    scratch = tmp_path / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    (stage,) = checked([named(text, donors)], scratch)
    return stage


def named(text: str, donors):
    from frankenmerge.artefacts.recipe import renamed

    return renamed(parse_recipe(text, "r.yaml"), lambda name: str(donors.get(name, name)))


def told(text: str, donors, tmp_path) -> list:
    with pytest.raises(FrankenmergeError) as caught:
        whole(text, donors, tmp_path)
    return list(caught.value.faults)


def layer(index: int, rest: str = "self_attn.q_proj.weight") -> str:
    return f"model.layers.{index}.{rest}"


def names_of(inputs, donors) -> list[str]:
    letters = {str(path): letter for letter, path in donors.items()}
    return [letters[entry.donor] for entry in inputs]


# Parameters


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
      - {model: a, layer_range: [2, 4], parameters: {weight: [{filter: layers.3., value: 5}, {value: 6}]}}
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
        "merge_method: ties\nbase_model: a\nmodels: [{model: b}]\nparameters: {weight: 1, normalize: 0, int8_mask: true}\n"
    )
    operation = made[layer(2)]
    assert operation.inputs[0].parameters == {"weight": 1, "density": 1.0}
    assert operation.parameters["normalize"] is False and operation.parameters["lambda"] == 1.0


# Models and bases


@pytest.mark.parametrize("listed", ["", "{model: deep}, "])
def test_the_base_of_whole_models_is_no_input_whether_listed_or_not(plan, donors, tmp_path, listed):
    third = write_donor(tmp_path / "third", seed=8)
    listed = listed.replace("deep", "third")
    text = f"merge_method: ties\nbase_model: third\nmodels: [{listed}{{model: a}}, {{model: b}}]\nparameters: {{weight: 1}}\n"
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
        "merge_method: linear\nbase_model: third\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n",
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


STACK = """\
merge_method: passthrough
slices: [{sources: [{model: a, layer_range: [0, 2]PARAMETERS}]}, {sources: [{model: b, layer_range: [2, 4]}]}]
"""


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
    assert (
        result_config(stage.recipe, stage.donors)["dtype"]
        == {"BF16": "bfloat16", "F16": "float16"}[dtype]
    )
    halves = sum(2 * operation.inputs[0].tensor.bytes // 4 for operation in stage.operations)
    assert sum(operation.bytes for operation in stage.operations) == halves


def test_donors_of_several_types_need_one_named(donors, tmp_path):
    half = write_donor(tmp_path / "half", seed=3, dtype="bfloat16")
    text = STACK.replace("PARAMETERS", "").replace("model: b", "model: half")
    (fault,) = told(text, donors | {"half": half}, tmp_path)
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
            "merge_method: linear\nmodels: [{model: b}, {model: t}]\nparameters: {weight: [0.2, 1]}\n",
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
            "merge_method: linear\nmodels: [{model: b}]\nbase_model: t\nembedding: b\nparameters: {weight: 1}\n",
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
    assert sources == head and is_tied(result_config(stage.recipe, stage.donors)) == (head is None)


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
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**result_config(stage.recipe, stage.donors))
        )
    assert {made.name: tuple(made.shape) for made in stage.operations} == {
        key: tuple(value.shape) for key, value in model.state_dict().items()
    }


# Faults


@pytest.mark.parametrize(
    "text, place, said",
    [
        ("merge_method: lineer\nmodels: [{model: a}]", "merge_method", "write linear"),
        (
            "merge_method: slerp\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}",
            "models",
            "base_model",
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}, {model: b}]\nparameters: {t: 0}",
            "models",
            "2",
        ),
        ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]", "models", "2"),
        (
            f"{PRECEDENCE}parameters: {{weight: 1}}".replace("linear", "passthrough").replace(
                "weight", "scale"
            ),
            "modules.default.slices[0].sources",
            "2",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]",
            "models[0].parameters.wieght",
            "write weight",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1, normalise: true}",
            "parameters.normalise",
            "write normalize",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1, normalize: 2}",
            "parameters.normalize",
            "true or false",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: true}",
            "parameters.weight",
            "a number",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {normalize: true}}]\nparameters: {weight: 1}",
            "models[0].parameters.normalize",
            "single models",
        ),
        (
            "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {max_iter: 2.5}",
            "parameters.max_iter",
            "whole number",
        ),
        (
            "merge_method: ties\nbase_model: a\nmodels: [{model: b}]\nparameters: {weight: 1, density: [0, 1.5]}",
            "parameters.density",
            "from 0 to 1",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: [{filter: self_atn, value: 1}, {value: 2}]}",
            "parameters.weight",
            "self_atn",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b}]",
            "model.embed_tokens.weight, model 1",
            "nothing",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: [{filter: mlp, value: 1}]}",
            "model.embed_tokens.weight, model 1",
            "nothing",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]",
            "model.embed_tokens.weight",
            "sum is not 0",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: [0, -2]}}]",
            "model.norm.weight",
            None,
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: deep}]\nparameters: {weight: 1}",
            "models",
            "4",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: wide}]\nparameters: {weight: 1}",
            "recipe",
            "hidden_size",
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: g}]\nparameters: {weight: 1}",
            "recipe",
            "gpt2",
        ),
        (
            "merge_method: linear\nparameters: {weight: 1}\n"
            "slices: [{sources: [{model: a, layer_range: [2, 6]}, {model: b, layer_range: [0, 4]}]}]",
            "slices[0].sources[0].layer_range",
            "[0, 4]",
        ),
    ],
)
def test_a_fault_is_told_with_its_place(donors, tmp_path, text, place, said):
    if said is None:  # weights whose sum is 0 nowhere but between two blocks are sound
        whole(text, donors, tmp_path)
        return
    faults = told(
        text.replace("SOURCE", "").replace("SLICE\nMODULE\nRECIPE\n", ""), donors, tmp_path
    )
    assert any(fault.place.endswith(place) and said in str(fault) for fault in faults), [
        str(fault) for fault in faults
    ]


def test_weights_whose_sum_is_0_in_one_block_alone_are_refused(donors, tmp_path):
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: [0, 0, 0, -1]}}]\n"
    (fault,) = told(text, donors, tmp_path)
    assert layer(3, "") in fault.place
    whole(text + "parameters: {normalize: false}\n", donors, tmp_path)


def test_faults_of_recipe_donors_and_method_are_told_together(donors, tmp_path):
    mute = Path(shutil.copytree(donors["a"], tmp_path / "mute"))
    (mute / "tokenizer.json").unlink()
    text = """\
merge_method: slerp
base_model: mute
slices:
  - sources: [{model: mute, layer_range: [0, 5], parameters: {t: 1}}, {model: wide, layer_range: [0, 5]}]
parameters: {tt: 0.5, t: 7}
"""
    found = "\n".join(map(str, told(text, donors | {"mute": mute}, tmp_path)))
    for part in (
        "sources[0].parameters.t",
        "parameters.tt",
        "0 to 1",
        "sources[0].layer_range",
        "sources[1].layer_range",
        "hidden_size",
        "a tokenizer",
    ):
        assert part in found


def test_blocks_of_other_kinds_are_not_merged(tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 2
    donor = write_donor(
        tmp_path / "q",
        "qwen2",
        seed=1,
        layer_types=kinds,
        use_sliding_window=True,
        sliding_window=8,
    )
    text = """\
merge_method: linear
slices: [{sources: [{model: q, layer_range: [0, 2]}, {model: q, layer_range: [SHIFT]}]}]
parameters: {weight: 1}
"""
    assert whole(text.replace("SHIFT", "2, 4"), {"q": donor}, tmp_path)
    (fault,) = told(text.replace("SHIFT", "1, 3"), {"q": donor}, tmp_path)
    assert fault.place == "recipe: layer_types" and "sliding_attention" in fault.found


def test_a_tensor_that_one_donor_lacks_is_not_dropped(donors, tmp_path):
    biased = write_donor(tmp_path / "biased", seed=4, attention_bias=True)
    text = "merge_method: linear\nmodels: [{model: a}, {model: biased}]\nparameters: {weight: 1}\n"
    assert any(
        "attention_bias" in fault.found
        for fault in told(text, donors | {"biased": biased}, tmp_path)
    )


def test_donors_that_cannot_be_opened_do_not_hide_the_method_s_faults(tmp_path):
    faults = told("merge_method: lineer\nmodels: [{model: nowhere}]\n", {}, tmp_path)
    assert [fault.place for fault in faults] == ["recipe: merge_method", "nowhere"]


# Vocabularies


@pytest.fixture
def speakers(tmp_path) -> dict[str, Path]:
    """Two donors of other vocabularies: `few` has t0 to t9, `more` t5 to t9 under other ids and two tokens of its own."""
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    few = write_stand_in(tmp_path / "few", "llama", vocab_size=10, **shape)
    more = write_stand_in(tmp_path / "more", "llama", vocab_size=9, **shape)
    tokenizer = {
        "model": {
            "type": "BPE",
            "vocab": {f"t{index}": 9 - index for index in range(5, 10)},
            "merges": [],
        },
        "added_tokens": [
            {"id": index, "content": text, "special": True}
            for index, text in ((5, "<u>"), (6, "<v>"))
        ],
    }
    (more / "tokenizer.json").write_text(json.dumps(tokenizer))
    return {"few": few, "more": more}


BOTH = "merge_method: linear\nbase_model: few\nmodels: [{model: few}, {model: more}]\nparameters: {weight: 1}\n"


def origins(entry, donors) -> list[tuple[str, int] | None]:
    rows = entry.rows
    letters = {str(path): name for name, path in donors.items()}
    return [
        None if number < 0 else (letters[rows.donors[number]], int(row))
        for number, row in zip(rows.origin, rows.row, strict=True)
    ]


def test_other_vocabularies_are_refused_where_no_tokenizer_is_named(speakers, tmp_path):
    faults = told(BOTH, speakers, tmp_path)
    assert {fault.place for fault in faults} == {"recipe: embedding", "recipe: head"}
    assert all("tokenizer_source" in fault.remedy for fault in faults)


def test_a_union_has_every_token_and_the_donors_own_rows(speakers, tmp_path):
    stage = whole(BOTH + "tokenizer_source: union\n", speakers, tmp_path)
    made = {operation.name: operation for operation in stage.operations}
    # t0 .. t9 as in the base, then <u> and <v>; more's t5 to t9 are its rows 4 to 0.
    shared = [("more", 9 - index) for index in range(5, 10)]
    for name in (EMBEDDING, HEAD):
        assert made[name].shape == (12, 16)
        few, more = made[name].inputs
        assert origins(few, speakers) == [("few", index) for index in range(10)] + [
            ("more", 5),
            ("more", 6),
        ]
        assert origins(more, speakers) == [("few", index) for index in range(5)] + shared + [
            ("more", 5),
            ("more", 6),
        ]
    assert made[NORM].inputs[0].rows is None
    assert result_config(stage.recipe, stage.donors)["vocab_size"] == 12


def test_a_token_beyond_the_donor_s_matrix_has_another_donor_s_row_or_zeros(speakers, tmp_path):
    path = speakers["few"] / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] |= {"<u>": 10, "<w>": 11}
    path.write_text(json.dumps(data))
    stage = whole(BOTH + "tokenizer_source: base\n", speakers, tmp_path)
    assert origins(stage.operations[0].inputs[0], speakers)[9:] == [("few", 9), ("more", 5), None]


def test_a_named_tokenizer_has_its_donor_s_order(speakers, tmp_path):
    stage = whole(BOTH + "tokenizer_source: more\n", speakers, tmp_path)
    few, more = stage.operations[0].inputs
    assert origins(few, speakers) == [("few", 9 - index) for index in range(5)] + [
        ("more", 5),
        ("more", 6),
    ]
    assert origins(more, speakers) == [("more", index) for index in range(7)]
    assert result_config(stage.recipe, stage.donors)["vocab_size"] == 7


def test_single_tokens_rows_come_from_where_the_recipe_says(speakers, tmp_path):
    text = (
        BOTH
        + """\
tokenizer:
  source: union
  tokens:
    t0: {source: {kind: zero}, force: true}
    t1: {source: few, force: true}
    <u>: {source: {kind: model_token, model: few, token: t3}}
    <v>: {source: {kind: model_token, model: few, token_id: 4}, force: true}
    new: {source: {kind: model_token, model: more, token: t9}}
    empty: {}
  pad_to_multiple_of: 8
"""
    )
    stage = whole(text, speakers, tmp_path)
    few, more = (origins(entry, speakers) for entry in stage.operations[0].inputs)
    assert len(few) == len(more) == 16 == result_config(stage.recipe, stage.donors)["vocab_size"]
    assert few[:2] == more[:2] == [None, ("few", 1)]
    assert few[10:] == [("few", 3), ("few", 4), ("more", 0), None, None, None]
    assert more[10:] == [("more", 5), ("few", 4), ("more", 0), None, None, None]


def test_a_token_s_source_that_has_no_such_token_is_refused(speakers, tmp_path):
    for source in (
        "few",
        "{kind: model_token, model: few, token: nowhere}",
        "{kind: model_token, model: few, token_id: 10}",
    ):
        (fault,) = told(
            BOTH + f"tokenizer: {{tokens: {{<u>: {{source: {source}, force: true}}}}}}\n",
            speakers,
            tmp_path,
        )
        assert "<u>" in fault.place


def test_a_stack_of_other_vocabularies_needs_a_tokenizer(speakers, tmp_path):
    text = """\
merge_method: passthrough
slices: [{sources: [{model: few, layer_range: [0, 1]}]}, {sources: [{model: more, layer_range: [1, 2]}]}]
"""
    (fault,) = told(text, speakers, tmp_path)
    assert "10 and 9" in fault.found
    stage = whole(text + "tokenizer_source: base\n", speakers, tmp_path)
    made = {operation.name: operation for operation in stage.operations}
    # The head's donor lacks t0 to t4: these rows are the other's.
    assert isinstance(made[EMBEDDING], Copy) or origins(made[EMBEDDING].inputs[0], speakers) == [
        ("few", index) for index in range(10)
    ]
    wanted = [("few", index) for index in range(5)] + [
        ("more", 9 - index) for index in range(5, 10)
    ]
    assert origins(made[HEAD].inputs[0], speakers) == wanted


@pytest.mark.parametrize("source", ["base", "union", "b"])
def test_donors_of_one_vocabulary_are_copied_whatever_tokenizer_is_named(plan, source):
    assert all(
        isinstance(operation, Copy)
        for operation in plan(
            STACK.replace("PARAMETERS", "") + f"tokenizer_source: {source}\n"
        ).values()
    )


def test_donors_without_a_json_tokenizer_are_matched_only_where_they_must_be(donors, tmp_path):
    old = {}
    for name, content in (("old", b"one"), ("same", b"one"), ("other", b"two")):
        old[name] = Path(shutil.copytree(donors["a"], tmp_path / name))
        (old[name] / "tokenizer.json").unlink()
        (old[name] / "tokenizer.model").write_bytes(content)
    text = "merge_method: linear\nmodels: [{model: old}, {model: same}]\nparameters: {weight: 1}\ntokenizer_source: base\n"
    assert whole(text, old, tmp_path)
    faults = told(text.replace("same", "other"), old, tmp_path)
    assert any(fault.place.endswith("tokenizer.json") for fault in faults)


def test_faults_of_the_donors_alone_need_no_method(donors):
    recipe = named("merge_method: anything\nmodels: [{model: a}, {model: b}]\n", donors)
    assert recipe_faults(recipe, open_donors(recipe)) == []


def test_a_virtual_splice_refuses_what_it_cannot_do(donors):
    from frankenmerge.models.loading import virtual_splice

    for text, place in [
        (STACK.replace("PARAMETERS", "") + "dtype: bfloat16\n", "dtype"),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n",
            "merge_method",
        ),
        (
            STACK.replace("PARAMETERS", "")
            + "tokenizer: {source: union, pad_to_multiple_of: 64}\n",
            "tokenizer",
        ),
    ]:
        recipe = named(text, donors)
        with pytest.raises(FrankenmergeError) as caught:
            virtual_splice(recipe, open_donors(recipe), {})
        assert any(
            fault.place == f"recipe: {place}" and "merge it" in fault.remedy
            for fault in caught.value.faults
        )


def test_a_virtual_splice_takes_its_ends_from_the_donors_named(donors):
    from frankenmerge.donors.checkpoint import open_checkpoint
    from frankenmerge.models.loading import load_model, virtual_splice

    recipe = named(
        STACK.replace("PARAMETERS", "") + "embedding: b\nfinal_norm: a\nhead: deep\n", donors
    )
    opened = {name: open_checkpoint(name) for name in recipe.donors}
    models = {name: load_model(checkpoint) for name, checkpoint in opened.items()}
    state = virtual_splice(recipe, opened, models).state_dict()
    for name, donor in (
        (EMBEDDING, "b"),
        (NORM, "a"),
        (HEAD, "deep"),
        (layer(1), "a"),
        (layer(3), "b"),
    ):
        assert torch.equal(state[name], models[str(donors[donor])].state_dict()[name])
