"""What transformers, tokenizers or accelerate raise while loading is a fault with a remedy."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import DEMO, write_donor

PIECES = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
"""A tokenizer.model with the single piece `<unk>`."""


def with_config(donor: Path, folder: Path, **changes) -> Path:
    shutil.copytree(donor, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def with_pieces_alone(folder: Path, seed: int) -> Path:
    """A donor whose tokenizer is a tokenizer.model alone."""
    write_donor(folder, seed=seed)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(PIECES)
    settings = {"tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_missing_package_is_named(donors, run, text, tmp_path):
    if find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    wanted = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    donor = with_config(donors["a"], tmp_path / "bnb", quantization_config=wanted)
    code, _, errors = run("evaluate", donor, "--text", text)
    assert code == 2 and "Traceback" not in errors
    assert "requires bitsandbytes" in errors and "install the package that it names" in errors


def test_a_tokenizer_model_alone_needs_sentencepiece(run, text, tmp_path):
    if find_spec("sentencepiece"):
        pytest.skip("sentencepiece is installed")
    donor = with_pieces_alone(tmp_path / "pieces", seed=1)
    code, _, errors = run("evaluate", donor, "--text", text)
    assert code == 2 and "frankenmerge[sentencepiece]" in errors and str(donor) in errors


def test_a_broken_tokenizer_is_a_fault(donors, run, text, tmp_path):
    donor = Path(shutil.copytree(donors["a"], tmp_path / "broken"))
    (donor / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unknown"}}')
    code, _, errors = run("evaluate", donor, "--text", text)
    assert code == 2 and str(donor) in errors and "remedy" in errors


@pytest.mark.parametrize("command", ["evaluate", "analyze"])
def test_a_config_that_transformers_refuses_is_a_fault(donors, run, text, tmp_path, command):
    donor = with_config(donors["a"], tmp_path / "odd", hidden_act="no_such_function")
    options = ["--text", text] if command == "evaluate" else ["-o", tmp_path / "x.safetensors"]
    code, _, errors = run(command, donor, *options)
    assert code == 2 and "no_such_function" in errors and str(donor) in errors


@pytest.mark.parametrize("source", ["base", "union"])
def test_equal_tokenizer_models_are_not_read(run, tmp_path, source):
    a, b = (with_pieces_alone(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2)))
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n- {{model: {a}, parameters: {{weight: 1}}}}\n"
        f"- {{model: {b}, parameters: {{weight: 1}}}}\nbase_model: {a}\n"
        f"tokenizer_source: {source}\ndtype: float32\n"
    )
    code, _, errors = run("merge", recipe, output)
    assert code == 0, errors
    assert (output / "tokenizer.model").read_bytes() == PIECES


def test_a_terminal_without_unicode_gets_escapes(tmp_path):
    donor = Path(shutil.copytree(DEMO / "donors" / "base", tmp_path / "dönor"))
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "frankenmerge", "inspect", donor, donor, "--json"]
    found = subprocess.run(command, env=os.environ | plain, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr
    assert b"Traceback" not in found.stderr and b"d\\xf6nor" in found.stdout.replace(
        b"d\\udcc3\\udcb6nor", b"d\\xf6nor"
    )
