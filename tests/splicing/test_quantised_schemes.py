"""Every scheme of quantisation: passthrough copies all tensors, other methods are refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import write_donor
from safetensors.torch import load_file, save_file

GROUP, WEIGHTS, BLOCKS = 32, "model.safetensors", 4
Stored = Iterator[tuple[str, torch.Tensor]]


def bits(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Packed weights, whatever they mean: a copy does not unpack them."""
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, shape, dtype=dtype)


def gptq(name: str, weight: torch.Tensor) -> Stored:
    (rows, columns), base = weight.shape, name.removesuffix("weight")
    yield f"{base}qweight", bits(columns // 8, rows)
    yield f"{base}qzeros", bits(columns // GROUP, rows // 8)
    yield f"{base}scales", torch.rand(columns // GROUP, rows, dtype=torch.float16)
    yield f"{base}g_idx", torch.arange(columns, dtype=torch.int32) // GROUP


def awq(name: str, weight: torch.Tensor) -> Stored:
    (rows, columns), base = weight.shape, name.removesuffix("weight")
    yield f"{base}qweight", bits(columns, rows // 8)
    yield f"{base}qzeros", bits(columns // GROUP, rows // 8)
    yield f"{base}scales", torch.rand(columns // GROUP, rows, dtype=torch.float16)


def nf4(name: str, weight: torch.Tensor) -> Stored:
    size = weight.numel()
    yield name, bits(size // 2, 1, dtype=torch.uint8)
    yield f"{name}.absmax", bits(size // 64, dtype=torch.uint8)
    yield f"{name}.quant_map", torch.linspace(-1, 1, 16)
    yield f"{name}.nested_absmax", torch.rand(-(-size // 64 // 256))
    yield f"{name}.nested_quant_map", torch.linspace(-1, 1, 256)
    yield f"{name}.quant_state.bitsandbytes__nf4", bits(80, dtype=torch.uint8)


def int8(name: str, weight: torch.Tensor) -> Stored:
    yield name, bits(*weight.shape, dtype=torch.int8)
    yield f"{name.removesuffix('weight')}SCB", torch.rand(weight.shape[0])
    yield f"{name.removesuffix('weight')}weight_format", torch.zeros((), dtype=torch.uint8)


def packed(name: str, weight: torch.Tensor) -> Stored:
    rows, columns = weight.shape
    yield f"{name}_packed", bits(rows, columns // 8)
    yield f"{name}_scale", torch.rand(rows, columns // GROUP, dtype=torch.bfloat16)
    yield f"{name}_shape", torch.tensor([rows, columns])


def fp8_channels(name: str, weight: torch.Tensor) -> Stored:
    yield name, weight.to(torch.float8_e4m3fn)
    yield f"{name}_scale", torch.rand(weight.shape[0], 1, dtype=torch.bfloat16)


def mxfp4(name: str, weight: torch.Tensor) -> Stored:
    experts, inputs, outputs = weight.shape
    shape = (experts, outputs, inputs // 32)
    yield f"{name}_blocks", bits(*shape, 16, dtype=torch.uint8)
    yield f"{name}_scales", bits(*shape, dtype=torch.uint8)


LINEAR, EXPERTS = ("_proj.weight",), (".gate_up_proj", ".down_proj")
EXPERTS_ALONE = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
SCHEMES: dict[str, tuple[str, Callable, tuple[str, ...], dict]] = {
    "gptq": ("llama", gptq, LINEAR, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "awq": ("qwen2", awq, LINEAR, {"quant_method": "awq", "bits": 4, "group_size": GROUP}),
    "nf4": ("llama", nf4, LINEAR, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "int8": ("mistral", int8, LINEAR, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "packed": (
        "llama",
        packed,
        LINEAR,
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]},
    ),
    "fp8_channels": (
        "qwen3",
        fp8_channels,
        LINEAR,
        {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]},
    ),
    "mxfp4": (
        "gpt_oss",
        mxfp4,
        EXPERTS,
        {"quant_method": "mxfp4", "modules_to_not_convert": EXPERTS_ALONE},
    ),
    "gptq_beyond_the_table": (
        "starcoder2",
        gptq,
        LINEAR,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP},
    ),
}
"""Of each scheme a family, what becomes of a weight, which weights, and quantization_config."""


def quantised(folder: Path, kind: str, seed: int) -> Path:
    family, store, names, scheme = SCHEMES[kind]
    shape = {"hidden_size": 64, "intermediate_size": 96, "dtype": "bfloat16"}
    shape |= {"tie_word_embeddings": False}
    if family == "gpt_oss":
        shape |= {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    write_donor(folder, family, seed=seed, **shape)
    tensors = {}
    for name, value in load_file(folder / WEIGHTS).items():
        tensors |= dict(store(name, value)) if name.endswith(names) else {name: value}
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        folder / WEIGHTS,
        {"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    return folder


@pytest.fixture(scope="module", params=SCHEMES)
def pair(request, tmp_path_factory) -> tuple[str, list[Path]]:
    root = tmp_path_factory.mktemp(request.param)
    return request.param, [quantised(root / name, request.param, n) for n, name in enumerate("ab")]


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def stack(folders, *ranges) -> str:
    slices = "".join(
        f"- sources: [{{model: {folders[donor]}, layer_range: [{first}, {stop}]}}]\n"
        for donor, first, stop in ranges
    )
    return f"merge_method: passthrough\nslices:\n{slices}"


def test_passthrough_copies_the_bytes_of_all_tensors(pair, run, tmp_path):
    kind, folders = pair
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(stack(folders, (0, 0, 3), (1, 1, 4)))
    code, _, errors = run("merge", recipe, output)
    assert code == 0, errors
    merged = {k: v for file in output.glob("*.safetensors") for k, v in load_file(file).items()}
    sources = [load_file(folder / WEIGHTS) for folder in folders]
    expected = {}
    for place, (donor, index) in enumerate([(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]):
        own = f"model.layers.{index}."
        expected |= {
            f"model.layers.{place}.{name.removeprefix(own)}": value
            for name, value in sources[donor].items()
            if name.startswith(own)
        }
    ends = {name: sources["embed" not in name][name] for name in sources[0] if "layers" not in name}
    expected |= ends
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        assert value.dtype == expected[name].dtype and value.shape == expected[name].shape
        assert same_bytes(value, expected[name])
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"] == SCHEMES[kind][-1]
    assert config["num_hidden_layers"] == 6


def test_other_methods_are_refused_in_one_fault_for_each_donor(pair, run, tmp_path):
    kind, folders = pair
    recipe = tmp_path / "recipe.yaml"
    title = SCHEMES[kind][-1]["quant_method"]
    for method in ("linear", "slerp", "ties"):
        recipe.write_text(
            f"merge_method: {method}\nbase_model: {folders[0]}\nparameters: {{t: 0.5}}\nmodels:\n"
            + "".join(f"- {{model: {each}, parameters: {{weight: 1}}}}\n" for each in folders)
        )
        code, _, errors = run("check", recipe)
        assert code == 2 and errors.count("expected:") == 2, errors
        assert errors.count(f"quantised weights ({title}); {method} computes with them") == 2


def test_donors_of_different_schemes_are_not_spliced(run, tmp_path):
    folders = [quantised(tmp_path / name, kind, 1) for name, kind in (("a", "gptq"), ("b", "nf4"))]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(stack(folders, (0, 0, 2), (1, 2, 4)))
    code, _, errors = run("check", recipe)
    assert code == 2 and "Traceback" not in errors
    assert "quantisations are different" in errors
