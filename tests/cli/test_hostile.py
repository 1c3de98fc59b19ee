"""Donors and recipes that somebody wrote to do harm: one message and exit status 2, or no harm; never a traceback, never a hang."""

import json
import os
import shutil
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from conftest import changed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EVIL = "a\x1b]0;owned\x07\x1b[2J\u202e\r[/b][red]\udc80"


@pytest.fixture
def told(run):
    """Run a command that must end well or with one message; returns (exit code, everything it said)."""

    def call(*arguments: object) -> tuple[int, str]:
        code, out, err = run(*arguments)
        assert code in (0, 2) and "Traceback" not in err and bool(err) == bool(code), err
        assert not any(letter in out + err for letter in "\x1b\x07\u202e\r\udc80")
        return code, " ".join((out + err).split())

    return call


@pytest.fixture
def check(told, tmp_path):
    """Check a recipe, its keys or its text."""

    def call(recipe: dict | str) -> tuple[int, str]:
        text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe)
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        return told("check", tmp_path / "r.yaml")

    return call


def stack(*models: object, **keys) -> dict:
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(model), "layer_range": [0, 4]}]} for model in models],
    } | keys


# What a terminal would obey


def test_a_folder_s_name_is_shown_and_not_obeyed(told, donors, tmp_path):
    folder = tmp_path / EVIL.replace("/", "")
    shutil.copytree(donors["a"], folder)
    for arguments in (
        ["inspect", folder],
        ["inspect", folder, "--json"],
        ["inspect", folder, donors["g"]],
    ):
        code, said = told(*arguments)
        assert code == 0 and "owned" in said


def test_a_config_s_values_are_shown_and_not_obeyed(told, donors, tmp_path):
    folder = changed(
        donors["a"],
        tmp_path / "evil",
        config=lambda config: config | {"max_position_embeddings": EVIL, "hidden_act": EVIL},
    )
    assert "owned" in told("inspect", folder, donors["a"])[1]


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "model_type", "layer_types", "rope_parameters"]
)
def test_a_config_s_values_in_messages_are_shown_and_not_obeyed(told, donors, tmp_path, key):
    assert (
        told(
            "inspect",
            changed(
                donors["a"],
                tmp_path / "evil",
                config=lambda config: config | {key: EVIL.removesuffix("\udc80")},
            ),
        )[0]
        == 2
    )


def test_a_tensor_s_name_is_shown_and_not_obeyed(told, donors, tmp_path):
    name = f"model.layers.0.{EVIL.removesuffix(chr(0xDC80))}"
    folder = changed(
        donors["a"], tmp_path / "evil", lambda arrays: arrays | {name: arrays["model.norm.weight"]}
    )
    code, said = told("inspect", folder)
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


# Sizes that are none


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
def test_a_size_that_is_none_is_told_at_once(told, check, donors, tmp_path, key, value):
    folder = changed(donors["a"], tmp_path / "odd", config=lambda config: config | {key: value})
    told("inspect", folder)
    told("inspect", folder, donors["a"])
    check(stack(folder, donors["a"]))
    if key in ("num_hidden_layers", "hidden_size", "vocab_size"):
        assert told("inspect", folder)[0] == 2 or value is True


@pytest.mark.parametrize("value", [10**9, 10**30, 1 << 63, -1, 1.5, "4", None, True])
def test_a_range_that_is_none_is_told_at_once(check, donors, value):
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
def test_numbers_that_are_too_large_are_told(check, donors, keys):
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
def test_a_recipe_that_is_an_attack_is_told(check, text):
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


# Donors


@pytest.mark.parametrize(
    "dtype, shape, size",
    [
        ("F4", [2, 2], 2),
        ("F8_E4M3", [4], 4),
        ("U4", [4], 2),
        ("C64", [2], 16),
        ("F8_E8M0", [4], 4),
        ("BOOL", [4], 4),
        ("I64", [2], 16),
        ("F32", [], 4),
        ("F32", [0], 0),
        ("F32", [0, 9], 0),
    ],
)
def test_a_tensor_of_an_odd_type_or_shape_is_told(
    told, check, donors, tmp_path, dtype, shape, size
):
    def header(entries):
        name = "model.layers.1.input_layernorm.weight"
        moved = entries[name]["data_offsets"][1] - entries[name]["data_offsets"][0] - size
        start = entries[name]["data_offsets"][0]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        for other, entry in entries.items():
            if other not in (name, "__metadata__") and entry["data_offsets"][0] > start:
                entry["data_offsets"] = [offset - moved for offset in entry["data_offsets"]]
        return moved

    folder = with_header(donors["a"], tmp_path / "odd", header)
    assert check(stack(folder))[0] == 2


def with_header(source: Path, folder: Path, change) -> Path:
    """The donor with its header put through `change`, which returns by how many bytes the file gets shorter."""
    shutil.copytree(source, folder)
    content = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])
    shorter = change(entries) or 0
    text = json.dumps(entries).encode()
    data = content[8 + length :]
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + data[: len(data) - shorter]
    )
    return folder


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "device", "outside"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    ],
)
def test_a_file_that_is_none_ends_nothing(told, donors, tmp_path, name, kind):
    folder = Path(shutil.copytree(donors["a"], tmp_path / "odd"))
    if name.endswith("index.json"):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (tmp_path / name).write_text("{}")
        (folder / name).symlink_to(
            {"loop": name, "device": "/dev/zero", "outside": tmp_path / name}[kind]
        )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(stack(folder)))
    code, _ = told("merge", tmp_path / "r.yaml", tmp_path / "out")
    optional = name in ("generation_config.json", "chat_template.jinja") and kind in (
        "fifo",
        "folder",
        "loop",
    )
    assert code == 2 * (not optional) and (tmp_path / "out").exists() == optional


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "null",
        "NaN",
        '{"model": null}',
        '{"model": {"vocab": 3}}',
        '{"model": {"vocab": {"a": "x"}}}',
        '{"model": {"type": "BPE", "vocab": {"a": -1}}, "added_tokens": [{"id": 1}]}',
        "[" * 100000,
        "\xff",
        '{"model": {"type": "BPE", "vocab": {"a": 99999999999999999999}}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": 3}',
    ],
)
@pytest.mark.parametrize(
    "keys",
    [{}, {"tokenizer_source": "union"}, {"tokenizer_source": "base"}, {"chat_template": "auto"}],
)
def test_a_tokenizer_that_is_none_is_told(told, donors, tmp_path, content, keys):
    folder = Path(shutil.copytree(donors["b"], tmp_path / "odd"))
    (folder / "tokenizer.json").write_bytes(content.encode("latin-1"))
    (folder / "tokenizer_config.json").write_bytes(content.encode("latin-1"))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(stack(folder, donors["a"]) | keys))
    told("check", tmp_path / "r.yaml")


BYTES = st.one_of(
    st.binary(max_size=64),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "x"])
                | st.text(max_size=4),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=BYTES, length=st.none() | st.integers(0, (1 << 64) - 1), rest=st.binary(max_size=16))
def test_any_header_is_read_or_told(tmp_path, text, length, rest):
    from frankenmerge.errors import FrankenmergeError
    from frankenmerge.storage.safetensors_header import read_header

    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + rest)
    try:
        assert isinstance(read_header(file), dict)
    except FrankenmergeError as error:
        assert str(error)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 1 << 70),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.integers(-1, 9), max_size=5),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.just("full_attention"),
)
KEYS = """num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim vocab_size layer_types rope_theta rope_parameters
rope_scaling sliding_window use_sliding_window max_window_layers tie_word_embeddings model_type no_rope_layers hidden_act rms_norm_eps
num_kv_shared_layers torch_dtype architectures quantization_config""".split()


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3),
    family=st.sampled_from(["llama", "qwen2"]),
)
def test_any_config_is_read_or_told(tmp_path_factory, donors, changes, family):
    from frankenmerge.artefacts.recipe import Recipe
    from frankenmerge.errors import FrankenmergeError
    from frankenmerge.splicing.stages import checked

    root = tmp_path_factory.mktemp("odd")
    folder = changed(
        donors["a"], root / "donor", config=lambda config: config | {"model_type": family} | changes
    )
    (root / "scratch").mkdir()
    try:
        checked([Recipe.model_validate(stack(folder, folder))], root / "scratch")
    except FrankenmergeError as error:
        assert str(error)
    finally:
        shutil.rmtree(root)
