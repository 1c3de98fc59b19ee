"""Quantised donors: copied whole with their scales, or refused in one line for each donor."""

import json

import pytest
import torch
from conftest import write_donor
from safetensors.torch import load_file, save_file

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.loading import load_model

BLOCK, WEIGHTS = 128, "model.safetensors"
SCHEME = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head"],
}


def quantised(folder, seed, scheme=SCHEME):
    """A donor in FP8 with a float32 `weight_scale_inv` for each block, as DeepSeek and Qwen."""
    shape = {"hidden_size": 256, "intermediate_size": 384, "dtype": "bfloat16"}
    write_donor(folder, "qwen3", seed=seed, **shape)
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        rows, columns = value.shape
        padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
        padded[:rows, :columns] = value.float()
        tiles = padded.view(-1, BLOCK, padded.shape[1] // BLOCK, BLOCK)
        scales = tiles.abs().amax((1, 3)).clamp_min(1e-6) / 448
        stored = (tiles / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
        tensors[name] = stored.to(torch.float8_e4m3fn).contiguous()
        tensors[f"{name}_scale_inv"] = scales.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    return folder


def dequantised(tensors: dict, name: str) -> torch.Tensor:
    """Each value times the scale of its block of 128 x 128."""
    value = tensors[name].float()
    scales = tensors[f"{name}_scale_inv"]
    rows = torch.arange(value.shape[0]) // BLOCK
    columns = torch.arange(value.shape[1]) // BLOCK
    return value * scales[rows][:, columns]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("fp8")
    return quantised(root / "a", 1), quantised(root / "b", 2)


@pytest.fixture
def recipe(pair, tmp_path):
    def write(method="passthrough", first=None, extra=""):
        path, (a, b) = tmp_path / "recipe.yaml", pair
        path.write_text(
            f"merge_method: passthrough\n{extra}slices:\n"
            f"- sources: [{{model: {first or a}, layer_range: [0, 2]}}]\n"
            f"- sources: [{{model: {b}, layer_range: [2, 4]}}]\n"
            if method == "passthrough"
            else f"merge_method: linear\nbase_model: {a}\nmodels:\n"
            f"- {{model: {first or a}, parameters: {{weight: 1}}}}\n"
            f"- {{model: {b}, parameters: {{weight: 1}}}}\n{extra}"
        )
        return path

    return write


def test_passthrough_copies_weights_and_scales(pair, recipe, run, tmp_path):
    output = tmp_path / "out"
    code, _, errors = run("merge", recipe(), output)
    assert code == 0, errors
    merged = {k: v for file in output.glob("*.safetensors") for k, v in load_file(file).items()}
    a, b = (load_file(folder / "model.safetensors") for folder in pair)
    assert merged.keys() == a.keys()
    for name, value in merged.items():
        second = (
            ".layers.2." in name or ".layers.3." in name or name.startswith(("model.norm", "lm_"))
        )
        source = b if second else a
        assert value.dtype == source[name].dtype
        assert torch.equal(value.view(torch.uint8), source[name].view(torch.uint8))
        if f"{name}_scale_inv" in merged:
            assert torch.equal(dequantised(merged, name), dequantised(source, name))
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"] == SCHEME and config["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("method", "extra", "reason"),
    [
        ("linear", "", "linear computes with them"),
        ("linear", "dtype: float32\n", "linear computes with them"),
        ("passthrough", "dtype: float32\n", "dtype float32 would convert them"),
        ("passthrough", "parameters: {scale: 0.5}\n", "parameters compute with them"),
    ],
)
def test_computing_with_them_is_refused_in_one_fault_for_each_donor(
    pair, recipe, run, method, extra, reason
):
    code, _, errors = run("check", recipe(method, extra=extra))
    assert code == 2 and errors.count("expected:") == 2
    assert errors.count("quantised weights (fp8)") == 2 and errors.count(reason) == 2
    assert all(str(folder) in errors for folder in pair)


def test_inspect_and_merge_agree(pair, recipe, run, tmp_path):
    code, out, _ = run("inspect", *pair, "--json")
    verdict = json.loads(out)
    assert code == 0 and verdict["spliceable"]
    assert any("quantised (fp8)" in remark for remark in verdict["remarks"])
    other = quantised(tmp_path / "c", 3, SCHEME | {"activation_scheme": "static"})
    code, out, _ = run("inspect", other, pair[1], "--json")
    assert code == 0 and not json.loads(out)["spliceable"]
    assert run("check", recipe(first=other))[0] == 2


def test_a_scheme_that_names_blocks_is_not_spliced(pair, recipe, run, tmp_path):
    scheme = SCHEME | {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.up_proj"]}
    donors = [quantised(tmp_path / name, seed, scheme) for name, seed in (("c", 3), ("d", 4))]
    code, out, _ = run("inspect", *donors, "--json")
    assert code == 0 and not json.loads(out)["spliceable"]
    path = tmp_path / "named.yaml"
    path.write_text(
        "merge_method: passthrough\nslices:\n"
        f"- sources: [{{model: {donors[0]}, layer_range: [1, 4]}}]\n"
    )
    code, _, errors = run("check", path)
    assert code == 2 and "names single blocks" in errors


def test_a_donor_that_is_run_is_dequantised(pair, run, tmp_path):
    model, tensors = load_model(open_checkpoint(str(pair[0]))), load_file(pair[0] / WEIGHTS)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        expected = dequantised(tensors, name) if f"{name}_scale_inv" in tensors else tensors[name]
        # transformers rounds to bfloat16 on the way
        torch.testing.assert_close(value, expected.float(), rtol=2**-7, atol=0)
    code, _, errors = run("analyze", pair[0], "-o", tmp_path / "a.atlas.safetensors")
    assert code == 0, errors


def test_gguf_is_refused_with_the_way_to_dequantise_it(run, tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "model-Q4_K_M.gguf"):
        code, _, errors = run("inspect", name)
        assert code == 2 and "gguf_file='model-Q4_K_M.gguf'" in errors
        assert "save_pretrained" in errors


def test_a_scheme_that_plain_weights_have_kept_does_not_count(run, tmp_path):
    donors = [write_donor(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    config = json.loads((donors[0] / "config.json").read_text())
    (donors[0] / "config.json").write_text(json.dumps(config | {"quantization_config": SCHEME}))
    path = tmp_path / "plain.yaml"
    path.write_text(
        f"merge_method: linear\nmodels:\n- {{model: {donors[0]}, parameters: {{weight: 1}}}}\n"
        f"- {{model: {donors[1]}, parameters: {{weight: 1}}}}\n"
    )
    assert run("check", path)[0] == 0
