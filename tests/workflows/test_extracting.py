"""Extracted LoRAs: peft loads them over the base and gives the model; so does `BASE+LORA`."""

import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import changed, write_donor
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from transformers import AutoModelForCausalLM

from frankenmerge import api as fm
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging.lora_plan import LoraOptions

IDS = torch.tensor([[0, 7, 30, 7, 12, 41], [5, 5, 2, 47, 19, 1]])
FAMILIES = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
    "opt": ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}),  # not in the table
}
FULL = LoraOptions(rank=64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def extracted(model: Path, base: Path, output: Path, options: LoraOptions = FULL):
    return fm.extract_lora(model, base, output, options)


def refused(model: Path, base: Path, output: Path, options: LoraOptions = FULL) -> str:
    with pytest.raises(FrankenmergeError) as caught:
        extracted(model, base, output, options)
    assert not output.exists() and not list(output.parent.glob(f".{output.name}*"))
    assert all(all(fault) for fault in caught.value.faults)
    return str(caught.value)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def from_peft(base: Path, lora: Path, *, merged: bool = False):
    """The base with the LoRA by peft, with a place for every weight and no warning."""
    from peft import PeftConfig, PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("ignore", FutureWarning)  # peft uses deprecated names
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        wrapped = PeftModel(model, PeftConfig.from_pretrained(str(lora)))
        loaded = wrapped.load_adapter(str(lora), "default", torch_device="cpu")
        assert not loaded.missing_keys and not loaded.unexpected_keys
        return wrapped.merge_and_unload() if merged else wrapped


def same_logits(base: Path, lora: Path, model: Path, tolerance: float = 1e-5) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    for merged in (False, True):
        found = logits(from_peft(base, lora, merged=merged))
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def differences(model: Path, base: Path) -> dict[str, np.ndarray]:
    one, two = (load_file(path / "model.safetensors") for path in (model, base))
    return {name: one[name].astype(np.float64) - two[name] for name in one}


def products(lora: Path) -> dict[str, np.ndarray]:
    """What the factors of each module multiply to, in float64."""
    tensors = load_file(lora / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensors[
            name.replace("lora_A", "lora_B")
        ].astype(np.float64)
        @ tensor
        for name, tensor in tensors.items()
        if ".lora_A." in name
    }


# The model comes back


@pytest.mark.parametrize("title", FAMILIES)
def test_peft_and_recipes_give_the_model_at_full_rank(title, tmp_path):
    family, extra = FAMILIES[title]
    base, model = (
        write_donor(tmp_path / name, family, seed=seed, **extra)
        for name, seed in (("base", 1), ("model", 2))
    )
    result = extracted(model, base, tmp_path / "lora")
    assert max(module.error for module in result.modules) < 1e-6
    same_logits(base, tmp_path / "lora", model)
    opened = fm.open_donor(f"{base}+{tmp_path / 'lora'}")
    made = load_file(opened.path / "model.safetensors")
    for name, weight in load_file(model / "model.safetensors").items():
        np.testing.assert_allclose(made[name], weight, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_what_differs_besides_experts_comes_back(family, tmp_path):
    base, other = (write_donor(tmp_path / name, family, seed=len(name)) for name in ("a", "bb"))
    own = load_file(base / "model.safetensors")

    def attention(tensors):
        return {name: t if "self_attn" in name else own[name] for name, t in tensors.items()}

    model = changed(other, tmp_path / "model", attention)
    result = extracted(model, base, tmp_path / "lora")
    assert {module.name.split(".")[3] for module in result.modules} == {"self_attn"}
    same_logits(base, tmp_path / "lora", model)
    assert "experts.0" in (found := refused(other, base, tmp_path / "out")) and "more" in found


def test_norms_and_biases_are_held_in_full(tmp_path):
    base = write_donor(tmp_path / "base", "qwen2", seed=1)
    norm, bias = "model.layers.1.input_layernorm", "layers.2.self_attn.q_proj.bias"

    def moved(*parts):
        return lambda tensors: {
            name: t + 0.1 * any(part in name for part in parts) for name, t in tensors.items()
        }

    model = changed(base, tmp_path / "model", moved(norm, bias, "layers.3.mlp.up_proj"))
    result = extracted(model, base, tmp_path / "lora")
    assert [module.name for module in result.modules] == ["model.layers.3.mlp.up_proj"]
    assert result.saved == (norm,)
    same_logits(base, tmp_path / "lora", model)
    alone = changed(base, tmp_path / "alone", moved(norm))
    assert "linear maps that differ" in refused(alone, base, tmp_path / "out")


@pytest.mark.parametrize("tied", ["model", "base"])
def test_a_head_of_its_own_and_a_tied_one(tied, tmp_path):
    from peft import PeftModel

    base, model = (
        write_donor(tmp_path / name, seed=len(name), tie_word_embeddings=name == tied)
        for name in ("base", "model")
    )
    result = extracted(model, base, tmp_path / "lora")
    assert {"lm_head", "model.embed_tokens"} <= set(result.saved)
    if tied == "model":
        same_logits(base, tmp_path / "lora", model)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of the tied base: the remark says so
        wrapped = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "lora")
        )
    expected = logits(AutoModelForCausalLM.from_pretrained(model))
    assert float((logits(wrapped) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    with pytest.raises(FrankenmergeError, match="can fold"):
        fm.open_donor(f"{base}+{tmp_path / 'lora'}")


def test_bfloat16_comes_back_to_the_bit(tmp_path):
    base, model = (
        write_donor(tmp_path / name, seed=len(name), dtype="bfloat16") for name in ("base", "model")
    )
    extracted(model, base, tmp_path / "lora")
    opened = fm.open_donor(f"{base}+{tmp_path / 'lora'}")
    made, expected = (load_torch(p / "model.safetensors") for p in (opened.path, model))
    off = {name: int((made[name] != tensor).sum()) for name, tensor in expected.items()}
    # But where a weight is tiny beside its change, and float32's rounding shows.
    assert sum(off.values()) < 1e-3 * sum(tensor.numel() for tensor in expected.values())


def test_a_merge_of_base_and_lora_is_one_with_the_model(tmp_path, donors):
    model = write_donor(tmp_path / "model", seed=9)
    extracted(model, donors["a"], tmp_path / "lora")
    merged = {}
    for name in (f"{donors['a']}+{tmp_path / 'lora'}", str(model)):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"merge_method: linear\ndtype: float32\nmodels:\n"
            f"  - {{model: '{donors['a']}', parameters: {{weight: 1}}}}\n"
            f"  - {{model: '{name}', parameters: {{weight: 1}}}}\n"
        )
        output = tmp_path / f"merged{len(merged)}"
        fm.merge(recipe, output)
        merged[name] = load_file(output / "model.safetensors")
    one, two = merged.values()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-6, err_msg=name)


# Ranks and errors


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_reported_error_is_that_of_the_file_and_optimal(family, dtype, tmp_path):
    base, model = (write_donor(tmp_path / n, family, seed=len(n)) for n in ("base", "model"))
    result = extracted(model, base, tmp_path / "lora", LoraOptions(rank=3, dtype=dtype))
    rounding = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 4e-3}[dtype]
    tensors = load_torch(tmp_path / "lora" / "adapter_model.safetensors")
    assert {t.dtype for n, t in tensors.items() if "lora_" in n} == {getattr(torch, dtype)}
    for module in result.modules:
        change = differences(model, base)[f"{module.name}.weight"]
        change = change.T if family == "gpt2" else change
        name = f"base_model.model.{module.name}.lora_"
        made = (tensors[f"{name}B.weight"].double() @ tensors[f"{name}A.weight"].double()).numpy()
        norm = np.linalg.norm(change)
        assert module.error == pytest.approx(np.linalg.norm(change - made) / norm, rel=1e-5)
        sizes = np.linalg.svd(change, compute_uv=False)
        best = np.sqrt((sizes[3:] ** 2).sum()) / norm
        assert best - 1e-6 <= module.error <= best + rounding
        assert module.rank == 3 and module.norm == pytest.approx(norm)


@pytest.mark.parametrize("bound", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_error_bound_is_kept_with_the_smallest_rank(bound, dtype, tmp_path, donors):
    model = write_donor(tmp_path / "model", seed=9)
    result = extracted(model, donors["a"], tmp_path / "lora", LoraOptions(error=bound, dtype=dtype))
    for module in result.modules:
        change = differences(model, donors["a"])[f"{module.name}.weight"]
        squares = np.linalg.svd(change, compute_uv=False) ** 2
        errors = np.sqrt(np.append(np.cumsum(squares[::-1])[::-1], 0.0) / squares.sum())
        smallest = int(np.argmax(errors <= bound))
        assert module.error <= bound
        assert module.rank == smallest or (dtype == "bfloat16" and module.rank == smallest + 1)
    same_logits(donors["a"], tmp_path / "lora", model, tolerance=10 * bound)


def test_energy_gives_ranks_of_their_own_that_peft_reads(tmp_path, donors):
    model = write_donor(tmp_path / "model", seed=9)
    result = extracted(model, donors["a"], tmp_path / "lora", LoraOptions(energy=0.8))
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert len({module.rank for module in result.modules}) > 1
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    for module in result.modules:
        squares = np.linalg.svd(
            differences(model, donors["a"])[f"{module.name}.weight"], compute_uv=False
        )
        kept = np.cumsum(squares**2) / (squares**2).sum()
        assert module.rank == int(np.argmax(kept >= 0.8)) + 1
        assert config["rank_pattern"].get(module.name, config["r"]) == module.rank
    wrapped = from_peft(donors["a"], tmp_path / "lora")
    for name, product in products(tmp_path / "lora").items():
        made = wrapped.base_model.model.get_submodule(name).get_delta_weight("default")
        np.testing.assert_allclose(made.detach().numpy(), product, atol=1e-5)


def test_equal_matrices_get_no_factors(tmp_path, donors):
    def one_map(tensors):
        name = "model.layers.2.mlp.up_proj.weight"
        return tensors | {name: tensors[name] + 1}

    model = changed(donors["a"], tmp_path / "model", one_map)
    result = extracted(model, donors["a"], tmp_path / "lora", LoraOptions(energy=1.0))
    (module,) = result.modules
    assert (module.name, module.rank) == ("model.layers.2.mlp.up_proj", 1)
    assert len(load_file(tmp_path / "lora" / "adapter_model.safetensors")) == 2
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == [module.name] and config["modules_to_save"] is None
    same_logits(donors["a"], tmp_path / "lora", model)


def test_other_types_of_the_same_values_are_equal(tmp_path):
    base = write_donor(tmp_path / "base", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    assert "equal in every tensor" in refused(tmp_path / "model", base, tmp_path / "out")


def test_the_same_inputs_give_the_same_bytes(tmp_path, donors):
    model = write_donor(tmp_path / "model", seed=9)
    for name in ("one", "two"):
        extracted(model, donors["a"], tmp_path / name, LoraOptions(rank=4))
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


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
