"""Extracted LoRAs: peft loads them over the base and gives the model; so does `BASE+LORA`."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import changed, write_donor
from extraction import extracted, refused
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


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
