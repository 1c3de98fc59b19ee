"""LoRAs compared with W + scaling * B A, computed here from the files."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import changed, write_donor, written
from safetensors.numpy import load_file, save_file

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.opening import open_donor

RANK = 3
PROJECTIONS = ("self_attn.q_proj", "mlp.down_proj")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frankenmerge" / "folded"


def write_lora(
    folder: Path, base: Path, *, modules=PROJECTIONS, without: str = "?", **settings
) -> Path:
    """Write an adapter's two files for the blocks of `base` by hand, as peft names them."""
    weights = load_file(base / "model.safetensors")
    random = np.random.default_rng(7)
    tensors = {}
    for name, weight in weights.items():
        if name.removesuffix(".weight").endswith(modules):
            rows, columns = weight.shape[::-1] if settings.get("fan_in_fan_out") else weight.shape
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = random.normal(size=(RANK, columns)).astype(
                np.float32
            )
            tensors[f"{prefix}.lora_B.weight"] = random.normal(size=(rows, RANK)).astype(np.float32)
    folder.mkdir()
    save_file(
        {name: tensor for name, tensor in tensors.items() if without not in name},
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 5,
        "lora_dropout": 0.1,
        "bias": "none",
    }
    config |= {
        "target_modules": [module.rpartition(".")[2] for module in modules],
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


def by_hand(base: Path, lora: Path, scaling: float) -> dict[str, np.ndarray]:
    """What folding gives, in float64."""
    adapter = load_file(lora / "adapter_model.safetensors")
    transposed = json.loads((lora / "adapter_config.json").read_text()).get("fan_in_fan_out")
    made = {
        name: weight.astype(np.float64)
        for name, weight in load_file(base / "model.safetensors").items()
    }
    for name in [name for name in adapter if ".lora_A." in name]:
        change = (
            scaling * adapter[name.replace("lora_A", "lora_B")].astype(np.float64) @ adapter[name]
        )
        made[name.removeprefix("base_model.model.").replace("lora_A.", "")] += (
            change.T if transposed else change
        )
    return made


def differing(base: Path, made: dict[str, np.ndarray]) -> set[str]:
    return {
        name
        for name, weight in load_file(base / "model.safetensors").items()
        if not np.array_equal(weight, made[name])
    }


def refused(name: str, **options):
    with pytest.raises(FrankenmergeError) as caught:
        open_donor(name, **options)
    (fault,) = caught.value.faults
    assert all(fault)
    return fault


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({}, 5 / RANK),
        ({"use_rslora": True}, 5 / RANK**0.5),
        ({"alpha_pattern": {"q_proj": 2, "down_proj": 2}}, 2 / RANK),
    ],
    ids=["plain", "rslora", "alpha pattern"],
)
def test_a_lora_is_what_it_says_by_hand(donors, tmp_path, settings, scaling):
    lora = write_lora(tmp_path / "lora", donors["a"], **settings)
    opened = open_donor(f"{donors['a']}+{lora}")
    made, expected = (
        load_file(opened.path / "model.safetensors"),
        by_hand(donors["a"], lora, scaling),
    )
    assert opened.name == f"{donors['a']}+{lora}"
    assert made.keys() == expected.keys()
    touched = {
        f"model.layers.{block}.{module}.weight" for block in range(4) for module in PROJECTIONS
    }
    assert differing(donors["a"], made) == touched
    for name, weight in made.items():
        np.testing.assert_allclose(weight, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_gpt2_whose_weights_lie_the_other_way(donors, tmp_path):
    lora = write_lora(tmp_path / "lora", donors["g"], modules=("attn.c_attn",), fan_in_fan_out=True)
    made = load_file(open_donor(f"{donors['g']}+{lora}").path / "model.safetensors")
    expected = by_hand(donors["g"], lora, 5 / RANK)
    assert {name.partition(".attn.")[2] for name in differing(donors["g"], made)} == {
        "c_attn.weight"
    }
    for name, weight in made.items():
        np.testing.assert_allclose(weight, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("dtype", "digits"), [("bfloat16", 8), ("float16", 11)])
def test_what_is_computed_is_rounded_once(tmp_path, dtype, digits):
    import torch
    from safetensors.torch import load_file as load_torch

    base = write_donor(tmp_path / "base", seed=8, dtype=dtype)
    weights = load_torch(base / "model.safetensors")
    wide = tmp_path / "wide"
    wide.mkdir()
    save_file(
        {name: weight.float().numpy() for name, weight in weights.items()},
        wide / "model.safetensors",
    )
    lora = write_lora(tmp_path / "lora", wide)
    made = load_torch(open_donor(f"{base}+{lora}").path / "model.safetensors")
    for name, exact in by_hand(wide, lora, 5 / RANK).items():
        assert made[name].dtype == getattr(torch, dtype)
        half_a_step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-14))) - digits)
        # One rounding is off by half a step at most, two by a whole one; the sum in float32 adds a
        # little.
        assert (np.abs(made[name].double().numpy() - exact) <= half_a_step + 1e-5).all(), name


def test_all_but_the_weights_is_the_bases_byte_by_byte(donors, tmp_path):
    lora = write_lora(tmp_path / "lora", donors["a"])
    opened, base = open_donor(f"{donors['a']}+{lora}"), open_checkpoint(str(donors["a"]))
    assert {file.name for file in opened.path.iterdir()} == {
        file.name for file in base.path.iterdir()
    }
    for file in base.path.glob("*.json"):
        assert (opened.path / file.name).read_bytes() == file.read_bytes()
    assert {name: tensor[1:] for name, tensor in opened.tensors.items()} == {
        name: tensor[1:] for name, tensor in base.tensors.items()
    }
    assert opened.fingerprint != base.fingerprint


def test_names_and_shards_of_an_old_file_stay(donors, tmp_path):
    def old(tensors):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return tensors | {"h.0.attn.bias": np.ones((1, 1), np.uint8)}

    base = changed(donors["g"], tmp_path / "base", old)
    lora = write_lora(tmp_path / "lora", donors["g"], modules=("attn.c_attn",), fan_in_fan_out=True)
    made = load_file(open_donor(f"{base}+{lora}").path / "model.safetensors")
    expected = old(by_hand(donors["g"], lora, 5 / RANK))
    assert made.keys() == expected.keys()
    for name, weight in made.items():
        np.testing.assert_allclose(weight, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_fold_is_made_once_and_again_for_other_weights(donors, tmp_path, cache, monkeypatch):
    lora = write_lora(tmp_path / "lora", donors["a"])
    first = open_donor(f"{donors['a']}+{lora}")
    times = [file.stat().st_mtime_ns for file in sorted(first.path.iterdir())]
    again = open_donor(f"{donors['a']}+{lora}")
    assert (
        again.path == first.path
        and [file.stat().st_mtime_ns for file in sorted(again.path.iterdir())] == times
    )
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file(
        {name: tensor * 2 for name, tensor in tensors.items()}, lora / "adapter_model.safetensors"
    )
    assert open_donor(f"{donors['a']}+{lora}").path != first.path
    assert len(list(cache.iterdir())) == 2


def test_a_fold_that_is_cut_off_leaves_nothing(donors, tmp_path, cache, monkeypatch):
    lora = write_lora(tmp_path / "lora", donors["a"])

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("frankenmerge.models.lora._overwrite", cut)
    with pytest.raises(KeyboardInterrupt):
        open_donor(f"{donors['a']}+{lora}")
    assert list(cache.iterdir()) == []


def test_a_merge_takes_the_folded_tensors_and_the_recipe_keeps_the_name(donors, tmp_path):
    lora = write_lora(tmp_path / "lora", donors["a"])
    name = f"{donors['a']}+{lora}"
    recipe = recipe_of([Block(name, 0), Block(name, 1), Block(str(donors["b"]), 2)])
    output = written(recipe, tmp_path / "out").output
    made, expected = load_file(output / "model.safetensors"), by_hand(donors["a"], lora, 5 / RANK)
    for key in (
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.embed_tokens.weight",
    ):
        np.testing.assert_allclose(made[key], expected[key], rtol=1e-5, atol=1e-5)
    other = load_file(donors["b"] / "model.safetensors")
    assert np.array_equal(
        made["model.layers.2.mlp.down_proj.weight"], other["model.layers.2.mlp.down_proj.weight"]
    )
    provenance = json.loads((output / "frankenmerge.json").read_text())
    assert set(provenance["donors"]) == {name, str(donors["b"])}
    assert name in (output / "recipe.yaml").read_text()


def test_commands_take_a_lora(donors, tmp_path, run, text, cache):
    lora = write_lora(tmp_path / "lora", donors["a"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: passthrough\n"
        f"slices: [{{sources: [{{model: {{model: {donors['a']}, lora: {lora}}}, "
        f"layer_range: [0, 4]}}]}}]\n"
    )
    for command in (
        ["check", recipe, "--json"],
        ["merge", recipe, tmp_path / "out", "--dry-run", "--json"],
    ):
        code, out, err = run(*command)
        assert (code, err) == (0, "") and json.loads(out)["depth"] == 4
    assert not cache.exists()  # neither folds
    code, _, err = run("merge", recipe, tmp_path / "out")
    assert code == 0, err
    code, out, err = run("check", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["absent"] == [], err
    code, out, err = run(
        "evaluate", recipe, tmp_path / "out", donors["a"], "--text", text, "--json"
    )
    assert code == 0, err
    bits = {model["name"]: model["bits_per_byte"] for model in json.loads(out)["models"]}
    assert (
        bits[str(recipe)]
        == bits[str(tmp_path / "out")]
        == bits[f"{donors['a']}+{lora}"]
        != bits[str(donors["a"])]
    )


def test_check_reads_no_weights(donors, tmp_path):
    base = Path(shutil.copytree(donors["a"], tmp_path / "base"))
    lora = write_lora(tmp_path / "lora", base)
    opened = open_donor(f"{base}+{lora}", weights=False)
    assert (opened.name, opened.path) == (f"{base}+{lora}", base)


def test_a_lora_of_another_base_is_refused(donors, tmp_path):
    lora = write_lora(tmp_path / "lora", donors["wide"])
    fault = refused(f"{donors['a']}+{lora}")
    assert (
        fault.place.startswith(str(lora))
        and "shape [32, 3]" in fault.found
        and str(donors["a"]) in fault.expected
    )


def test_a_lora_of_a_deeper_base_is_refused(donors, tmp_path):
    deep = write_donor(tmp_path / "deep", num_hidden_layers=6)
    lora = write_lora(tmp_path / "lora", deep)
    assert "layers.4" in refused(f"{donors['a']}+{lora}").found


def test_a_lora_that_lacks_weights_is_refused(donors, tmp_path):
    lora = write_lora(tmp_path / "lora", donors["a"], without="layers.2.mlp.down_proj.lora_B")
    assert "layers.2.mlp.down_proj.lora_B" in refused(f"{donors['a']}+{lora}").found


def test_a_lora_on_tied_embeddings_is_refused(donors, tmp_path):
    lora = write_lora(tmp_path / "lora", donors["a"], modules=("lm_head",))
    assert "tie_word_embeddings" in refused(f"{donors['b']}+{lora}").found


def test_a_lora_that_is_not_finite_is_refused(donors, tmp_path):
    lora = write_lora(tmp_path / "lora", donors["a"])
    tensors = load_file(lora / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, lora / "adapter_model.safetensors")
    assert "NaN" in refused(f"{donors['a']}+{lora}").found


@pytest.mark.parametrize("weights", [True, False])
def test_other_adapters_are_refused(donors, tmp_path, weights):
    lora = write_lora(tmp_path / "lora", donors["a"], peft_type="IA3")
    fault = refused(f"{donors['a']}+{lora}", weights=weights)
    assert fault.place == f"{lora / 'adapter_config.json'}: peft_type" and "IA3" in fault.found


def test_a_lora_setting_that_peft_does_not_know_is_refused(donors, tmp_path):
    lora = write_lora(tmp_path / "lora", donors["a"], r=0)
    assert refused(f"{donors['a']}+{lora}").place == str(lora)


@pytest.mark.parametrize("weights", [True, False])
def test_a_lora_without_its_config_is_refused(donors, tmp_path, weights):
    lora = write_lora(tmp_path / "lora", donors["a"])
    (lora / "adapter_config.json").unlink()
    assert refused(f"{donors['a']}+{lora}", weights=weights).place == str(
        lora / "adapter_config.json"
    )


@pytest.mark.parametrize("weights", [True, False])
def test_a_pickled_lora_is_refused(donors, tmp_path, weights):
    lora = write_lora(tmp_path / "lora", donors["a"])
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    fault = refused(f"{donors['a']}+{lora}", weights=weights, allow_pickle=True)
    assert fault.place == str(lora) and "adapter_model.bin" in fault.found


def test_a_lora_that_is_not_there_is_refused(donors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(f"{donors['a']}+some/lora").place == "some/lora"


def test_without_peft_the_remedy_is_to_install_it(donors, tmp_path, monkeypatch):
    lora = write_lora(tmp_path / "lora", donors["a"])
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "frankenmerge[lora]" in refused(f"{donors['a']}+{lora}").remedy


def test_a_base_of_other_types_is_refused(donors, tmp_path):
    lora = write_lora(tmp_path / "lora", donors["a"])
    wide = changed(
        donors["a"],
        tmp_path / "f64",
        lambda all: all | {"model.norm.weight": all["model.norm.weight"].astype(np.float64)},
    )
    assert refused(f"{wide}+{lora}").place == f"{wide}: model.norm.weight"


def test_check_says_that_a_lora_does_not_fit(donors, tmp_path, run):
    wide = write_lora(tmp_path / "wide", donors["wide"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: passthrough\nslices:\n"
        f'- sources: [{{model: "{donors["a"]}+{wide}", layer_range: [0, 4]}}]\n'
    )
    code, _, errors = run("check", recipe)
    assert code == 2 and "lora_B" in errors and "[32, 3]" in errors and "[16, 24]" in errors


def test_check_says_that_a_lora_has_more_blocks(donors, tmp_path):
    deep = tmp_path / "six"
    write_donor(deep, seed=3, num_hidden_layers=6)
    lora = write_lora(tmp_path / "deep", deep)
    with pytest.raises(FrankenmergeError, match=r"no model.layers.4"):
        open_donor(f"{donors['a']}+{lora}", weights=False)


@pytest.mark.parametrize("donor", ["a", "g"])
def test_check_accepts_a_lora_that_fits(donors, tmp_path, donor):
    modules = PROJECTIONS if donor == "a" else ("attn.c_attn", "mlp.c_proj")
    transposed = donor == "g"
    lora = write_lora(tmp_path / "fits", donors[donor], modules=modules, fan_in_fan_out=transposed)
    assert open_donor(f"{donors[donor]}+{lora}", weights=False).remarks == ()


def test_a_loras_own_tokenizer_and_template_are_mentioned(donors, tmp_path):
    lora = write_lora(tmp_path / "lora", donors["a"])
    shutil.copy(donors["a"] / "tokenizer.json", lora)
    assert open_donor(f"{donors['a']}+{lora}", weights=False).remarks == ()
    (lora / "chat_template.jinja").write_text("{{ messages }}")
    (remark,) = open_donor(f"{donors['a']}+{lora}", weights=False).remarks
    assert "chat_template.jinja" in remark and "tokenizer.json" not in remark
    (remark,) = open_donor(f"{donors['a']}+{lora}").remarks
    assert "not used" in remark
