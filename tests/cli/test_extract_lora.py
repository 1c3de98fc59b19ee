"""What `extract-lora` refuses, prints and leaves; how it is resumed."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import changed, write_donor
from extraction import extracted, refused
from safetensors.numpy import load_file

from frankenmerge import api as fm
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging.lora_plan import LoraOptions


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Refused before anything is written


def test_a_model_that_is_the_base(tmp_path, donors):
    assert "equal in every tensor" in refused(donors["a"], donors["a"], tmp_path / "out")


@pytest.mark.parametrize(
    "other, words",
    [
        ({"num_hidden_layers": 5}, "blocks: 4 and 5"),
        ({"hidden_size": 32}, "hidden_size: 16 and 32"),
        ({"intermediate_size": 40}, "intermediate_size: 24 and 40"),
        ({"rope_theta": 5e5}, "rope"),
    ],
)
def test_another_base(other, words, tmp_path, donors):
    base = write_donor(tmp_path / "base", seed=3, **other)
    assert words in refused(donors["a"], base, tmp_path / "out")


def test_another_family(tmp_path, donors):
    assert "gpt2" in refused(donors["a"], donors["g"], tmp_path / "out")


def test_another_vocabulary(tmp_path, donors):
    base = write_donor(tmp_path / "base", seed=3, vocab_size=56)
    found = refused(donors["a"], base, tmp_path / "out")
    assert "embed_tokens.weight" in found and "lm_head.weight" in found and "resize" in found


def test_a_tensor_that_only_one_has(tmp_path, donors):
    base = write_donor(tmp_path / "base", seed=3, attention_bias=True)
    assert "attention_bias" in refused(donors["a"], base, tmp_path / "out")


def test_an_output_that_is_there(tmp_path, donors):
    model = write_donor(tmp_path / "model", seed=9)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(FrankenmergeError, match="something is there"):
        extracted(model, donors["a"], tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["file"]


@pytest.mark.parametrize(
    "options, words",
    [
        (LoraOptions(rank=4, energy=0.5), "--rank and --energy"),
        (LoraOptions(rank=0), "1 or more"),
        (LoraOptions(energy=1.5), "at most 1"),
        (LoraOptions(error=0.0), "--error"),
        (LoraOptions(error=0.001, dtype="bfloat16"), "rounding to bfloat16"),
    ],
)
def test_options_that_cannot_be_kept(options, words, tmp_path, donors):
    model = write_donor(tmp_path / "model", seed=9)
    assert words in refused(model, donors["a"], tmp_path / "out", options)


def test_quantised_weights_and_equal_integers(tmp_path, donors):
    name = "model.layers.1.mlp.up_proj.weight"

    def with_integers(value):
        return lambda tensors: tensors | {name: np.full(tensors[name].shape, value, np.int8)}

    base = changed(donors["a"], tmp_path / "base", with_integers(1))
    model = changed(donors["a"], tmp_path / "model", with_integers(2))
    assert "I8" in refused(model, base, tmp_path / "out")
    other = write_donor(tmp_path / "other", seed=9)
    alike = changed(other, tmp_path / "alike", with_integers(1))
    assert len(extracted(alike, base, tmp_path / "lora").modules) == 27


def test_numbers_that_are_not_finite(tmp_path, donors):
    def broken(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
        return tensors

    model = changed(donors["a"], tmp_path / "model", broken)
    assert "up_proj.weight" in (found := refused(model, donors["a"], tmp_path / "out"))
    assert "NaN or Inf" in found


def test_a_base_that_is_a_lora_itself(tmp_path, donors):
    model = write_donor(tmp_path / "model", seed=9)
    extracted(model, donors["a"], tmp_path / "lora")
    with pytest.raises(FrankenmergeError, match="a base without a LoRA"):
        fm.extract_lora(donors["a"], f"{donors['a']}+{tmp_path / 'lora'}", tmp_path / "out")


# The command


def test_the_command_reports_every_module(run, tmp_path, donors):
    model = write_donor(tmp_path / "model", seed=9)
    given = "extract-lora", model, donors["a"], tmp_path / "lora", "--rank", 12
    code, out, err = run(*given, "--dry-run", "--json")
    assert code == 0 and not (tmp_path / "lora").exists()
    planned = json.loads(out)
    assert planned["matrices"] == 28 and "rank 12 is above that of 8 matrices" in err
    code, out, _ = run(*given, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["bytes"] == planned["bytes"]
    assert found["tensors"] == len(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert [set(module) for module in found["modules"]] == [{"name", "rank", "error"}] * 28
    assert {module["rank"] for module in found["modules"]} == {8, 12}
    assert found["saved"] == planned["saved"] and "lm_head" in found["saved"]


def test_the_command_prints_errors_by_kind_or_one_by_one(run, tmp_path, donors):
    model = write_donor(tmp_path / "model", seed=9)
    code, out, _ = run("extract-lora", model, donors["a"], tmp_path / "lora")
    assert code == 0 and "self_attn.q_proj" in out and "layers.0" not in out.split("Held")[0]
    own = load_file(donors["a"] / "model.safetensors")

    def block(tensors):
        return {name: t if "layers.2.mlp" in name else own[name] for name, t in tensors.items()}

    few = changed(model, tmp_path / "few", block)
    code, out, _ = run("extract-lora", few, donors["a"], tmp_path / "few-lora", "--rank", 2)
    assert code == 0 and out.count("model.layers.2.mlp.") == 3


def test_check_verifies_an_adapter(run, tmp_path, donors):
    model = write_donor(tmp_path / "model", seed=9)
    extracted(model, donors["a"], tmp_path / "lora")
    code, out, _ = run("check", tmp_path / "lora", "--json")
    assert code == 0 and json.loads(out)["hashed"] == 3
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = run("check", tmp_path / "lora")
    assert code == 2 and "adapter_model.safetensors" in err


def test_the_card_and_the_chart_show_the_errors(tmp_path, donors):
    from xml.etree import ElementTree

    model = write_donor(tmp_path / "model", seed=9)
    extracted(model, donors["a"], tmp_path / "lora", LoraOptions(error=0.2))
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "library_name: peft" in card and "relative error of 0.2" in card
    assert (
        "| self_attn.q_proj | 4 |" in card
        and "- lm_head\n" in card
        and "- input_layernorm in 4 blocks\n" in card
    )
    chart = (tmp_path / "lora" / "errors.svg").read_text()
    ElementTree.fromstring(chart)
    assert "mlp.down_proj" in chart
    record = json.loads((tmp_path / "lora" / "frankenmerge.json").read_text())
    assert record["options"]["error"] == 0.2 and len(record["modules"]) == 28


def test_a_tokenizer_of_its_own_is_kept(tmp_path, donors):
    model = write_donor(tmp_path / "model", seed=9)
    extracted(model, donors["a"], tmp_path / "plain")
    assert not (tmp_path / "plain" / "tokenizer.json").exists()
    (model / "chat_template.jinja").write_text("{{ messages }}")
    extracted(model, donors["a"], tmp_path / "lora")
    assert (tmp_path / "lora" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("resume", [False, True])
def test_a_killed_extraction_is_resumed_or_started_anew(resume, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    base, model = (write_donor(tmp_path / n, seed=len(n), **sizes) for n in ("base", "model"))
    whole = extracted(model, base, tmp_path / "whole", LoraOptions(energy=0.9))
    command = [sys.executable, "-m", "frankenmerge", "extract-lora", model, base, tmp_path / "lora"]
    command += ["--energy", "0.9", *(["--resume"] if resume else [])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / ".lora.partial" / "matrices"
    while len(list(parts.glob("*.safetensors"))) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "lora").exists()
    kept = {file.name: file.stat().st_mtime_ns for file in parts.glob("*.safetensors")}
    assert len(kept) >= 3
    options = LoraOptions(energy=0.9, resume=resume)
    if not resume:
        with pytest.raises(FrankenmergeError, match="--resume"):
            extracted(model, base, tmp_path / "lora", options)
        shutil.rmtree(tmp_path / ".lora.partial")
    result = extracted(model, base, tmp_path / "lora", options)
    assert [each[:4] for each in result.modules] == [each[:4] for each in whole.modules]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "lora" / file.name).read_bytes()
    assert not (tmp_path / ".lora.partial").exists()


def test_an_interruption_leaves_nothing(tmp_path, donors):
    from contextlib import contextmanager

    model = write_donor(tmp_path / "model", seed=9)

    @contextmanager
    def interrupting(what, _total, _unit):
        def advance(_count):
            if what == "decomposing":
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        fm.extract_lora(model, donors["a"], tmp_path / "lora", progress=interrupting)
    assert not list(tmp_path.glob("*lora*")) and not list(tmp_path.glob(".lora*"))
