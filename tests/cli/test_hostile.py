"""Recipes and names that are attacks: one message and exit status 2, or no harm."""

import shutil
from itertools import pairwise

import pytest
import yaml
from conftest import changed
from hostile import EVIL, stack

# What a terminal would obey


def test_a_folder_s_name_is_shown_and_not_obeyed(answer, donors, tmp_path):
    folder = tmp_path / EVIL.replace("/", "")
    shutil.copytree(donors["a"], folder)
    for arguments in (
        ["inspect", folder],
        ["inspect", folder, "--json"],
        ["inspect", folder, donors["g"]],
    ):
        code, said = answer(*arguments)
        assert code == 0 and "owned" in said


def test_a_config_s_values_are_shown_and_not_obeyed(answer, donors, tmp_path):
    folder = changed(
        donors["a"],
        tmp_path / "evil",
        config=lambda config: config | {"max_position_embeddings": EVIL, "hidden_act": EVIL},
    )
    assert "owned" in answer("inspect", folder, donors["a"])[1]


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "layer_types", "rope_parameters"]
)
def test_a_config_s_values_in_messages_are_shown_and_not_obeyed(answer, donors, tmp_path, key):
    assert (
        answer(
            "inspect",
            changed(
                donors["a"],
                tmp_path / "evil",
                config=lambda config: config | {key: EVIL.removesuffix("\udc80")},
            ),
        )[0]
        == 2
    )


def test_a_tensor_s_name_is_shown_and_not_obeyed(answer, donors, tmp_path):
    name = f"model.layers.0.{EVIL.removesuffix(chr(0xDC80))}"
    folder = changed(
        donors["a"], tmp_path / "evil", lambda arrays: arrays | {name: arrays["model.norm.weight"]}
    )
    code, said = answer("inspect", folder)
    assert code == 2 and "owned" in said


def test_a_recipe_s_names_are_shown_and_not_obeyed(check):
    name = EVIL.removesuffix("\udc80")
    for recipe in (
        stack(name),
        stack("x", **{name: 1}),
        stack("x", merge_method=name),
        stack("x", chat_template=name),
        stack("x", name=name),
    ):
        assert check(recipe)[0] == 2


# Numbers


@pytest.mark.parametrize(
    "value", [10**9, 10**30, -1, 0, 1.5, True, "4", None, [4], {"a": 1}, float("nan"), float("inf")]
)
@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "vocab_size",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "intermediate_size",
    ],
)
def test_an_invalid_size_is_reported(answer, check, donors, tmp_path, key, value):
    folder = changed(donors["a"], tmp_path / "odd", config=lambda config: config | {key: value})
    answer("inspect", folder)
    answer("inspect", folder, donors["a"])
    check(stack(folder, donors["a"]))
    if key in ("num_hidden_layers", "hidden_size", "vocab_size"):
        assert answer("inspect", folder)[0] == 2 or value is True


@pytest.mark.parametrize("value", [10**9, 10**30, 1 << 63, -1, 1.5, "4", None, True])
def test_an_invalid_range_is_reported(check, donors, value):
    recipe = stack(donors["a"])
    for layer_range in ([0, value], [value, value + 1 if isinstance(value, int) else value]):
        recipe["slices"][0]["sources"][0]["layer_range"] = layer_range
        assert check(recipe)[0] == 2


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer": {"source": "base", "pad_to_multiple_of": 10**12}},
        {"tokenizer": {"source": "base", "pad_to_multiple_of": 1 << 70}},
        {
            "tokenizer": {
                "source": "union",
                "tokens": {
                    "x": {"source": {"kind": "model_token", "model": "DONOR", "token_id": 1 << 70}}
                },
            }
        },
        {"seed": 1 << 70},
        {"merge_method": "linear", "parameters": {"weight": 10**400}},
        {"merge_method": "linear", "parameters": {"weight": [1e308] * 3}},
        {"merge_method": "linear", "parameters": {"weight": [[[[1]]]]}},
    ],
)
def test_numbers_that_are_too_large_are_reported(check, donors, keys):
    text = yaml.safe_dump(stack(donors["a"]) | keys).replace("DONOR", str(donors["a"]))
    check(text)


# Recipes


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghijklm")),
        "x: &x [*x]\nslices: *x\nmerge_method: passthrough",
        "&a {slices: *a, merge_method: passthrough}",
        "merge_method: passthrough\nslices: " + "[" * 5000 + "]" * 5000,
        "merge_method: passthrough\nslices: " + "{a: " * 5000 + "1" + "}" * 5000,
        "- " * 20000 + "x",
        "%YAML 9.9\n---\na: 1",
        "!!python/object/apply:os.system ['true']",
        "merge_method: !!binary aGVsbG8=\nslices: []",
        "merge_method: !!set {a, b}\nslices: 2001-01-01",
        "2001-01-01: 1\n? [a, b]\n: 2",
        "merge_method: 0o7777777777777777777777\nslices: 1_000:30:30.5",
        "\x00",
        "merge_method: passthrough\nmodels: [{model: 'a\\0b'}]",
        'merge_method: passthrough\nmodels: [{model: "a\\0b"}]',
        "merge_method: passthrough\nmodels: [{model: " + "a" * 5000 + "}]",
        "merge_method: passthrough\nmodels: [{model: " + "a/" * 3000 + "b}]",
        "merge_method: passthrough\nmodels: [{model: ~}]",
        "merge_method: passthrough\nmodels: [{model: ~root}]",
        "merge_method: passthrough\nmodels: [{model: ~nobody-of-this-name/x}]",
        "merge_method: passthrough\nmodels: [{model: /}]",
        "merge_method: passthrough\nmodels: [{model: /dev/zero}]",
        "merge_method: passthrough\nmodels: [{model: .}]",
        "merge_method: passthrough\nmodels: [{model: ''}]",
        "merge_method: passthrough\nmodels: [{model: '@'}]",
        "merge_method: passthrough\nmodels: [{model: 'a+b+c'}]",
        "merge_method: passthrough\nmodels: [{model: 'http://127.0.0.1/x'}]",
        "merge_method: passthrough\nmodels: [{model: a/b@..}]",
    ],
)
def test_a_recipe_that_is_an_attack_is_reported(check, text):
    assert check(text)[0] == 2


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{% include '/etc/passwd' %}",
        "{{",
        "../../../etc/passwd",
        "/etc/passwd",
    ],
)
def test_a_chat_template_is_text_and_never_run(check, donors, template):
    code, said = check(stack(donors["a"], chat_template=template))
    assert "root:" not in said
    assert code == 2 * ("{" not in template or template == "{{")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "..", ".", "a/b", "a\nb", ""])
def test_a_stage_s_name_leads_nowhere(check, donors, name):
    stages = [stack(donors["a"], name=name), stack(name or "x")]
    assert check(yaml.safe_dump_all(stages))[0] == 2
