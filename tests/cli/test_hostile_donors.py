"""Donors whose files are attacks: one message and exit status 2, never a hang or a traceback."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import yaml
from hostile import stack


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
def test_a_tensor_of_an_odd_type_or_shape_is_reported(
    answer, check, donors, tmp_path, dtype, shape, size
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
    """Copy a donor with another header; `change` returns how many bytes shorter the data is."""
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
def test_a_file_that_is_no_regular_file_is_reported(answer, donors, tmp_path, name, kind):
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
    code, _ = answer("merge", tmp_path / "r.yaml", tmp_path / "out")
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
def test_a_tokenizer_that_is_none_is_reported(answer, donors, tmp_path, content, keys):
    folder = Path(shutil.copytree(donors["b"], tmp_path / "odd"))
    (folder / "tokenizer.json").write_bytes(content.encode("latin-1"))
    (folder / "tokenizer_config.json").write_bytes(content.encode("latin-1"))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(stack(folder, donors["a"]) | keys))
    answer("check", tmp_path / "r.yaml")
