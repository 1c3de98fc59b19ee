"""Every method from recipe file to checkpoint: each tensor equals the formula's, computed here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_donor
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from frankenmerge.splicing import computing
from frankenmerge.splicing.methods import METHODS
from frankenmerge.splicing.methods.combine import Operand, combine

RANGES = [(0, 3), (1, 4)]
"""The slices of the recipes with slices: six blocks."""
OF_MODELS = {
    "scale": [0.5, 0.25],
    "weight": [0.75, 0.25],
    "density": [0.5, 0.75],
    "gamma": [0.01, 0.02],
    "epsilon": [0.1, 0.05],
}
"""What the first and the second model have; the second only in the attention, and the first a third
of it more at the end of a slice.
"""
OF_ALL = {
    **{
        "normalize": False,
        "rescale": False,
        "lambda": 0.75,
        "t": 0.25,
        "nuslerp_flatten": False,
        "filter_wise": True,
    },
    **{"max_iter": 3, "select_topk": 0.5, "r": 0.25, "normalize_weights": False},
}
"""What the tensors of the feed-forward have; the others have twice or half of it, or the contrary.
"""
CASES = [
    (method, base)
    for method, spec in METHODS.items()
    for base in ([False, True] if spec.base == "optional" else [spec.base == "required"])
]


def other(value):
    return (
        not value
        if isinstance(value, bool)
        else value * 2
        if value < 0.5
        else value / 2
        if value < 1
        else value + 1
    )


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> dict[str, Path]:
    """Fine-tunes of one model."""
    root = tmp_path_factory.mktemp("three")
    base = write_donor(root / "base", seed=1)
    made = {"base": base}
    for number, name in enumerate(("x", "y")):
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(root / name)
        (root / name / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
        made[name] = root / name
    return made


def recipe_of(method: str, base: bool, slices: bool, donors: dict[str, Path]) -> dict:
    spec = METHODS[method]
    sources = []
    for number, name in enumerate(("x", "y")[: spec.models[1] or 2]):
        own = {}
        for parameter in (
            name
            for name in OF_MODELS
            if name in spec.parameters and spec.parameters[name].per_model
        ):
            value = OF_MODELS[parameter][number]
            own[parameter] = (
                [value, value * 4 / 3]
                if not number
                else [{"filter": "self_attn", "value": value}, {"value": other(value)}]
            )
        sources.append({"model": str(donors[name]), "parameters": own})
    common = {
        name: value
        for name, value in OF_ALL.items()
        if name in spec.parameters and not spec.parameters[name].per_model
    }
    parameters = {
        name: [{"filter": "mlp", "value": value}, {"value": other(value)}]
        for name, value in common.items()
    }
    recipe = {"merge_method": method, "parameters": parameters, "seed": 7}
    if base:
        recipe["base_model"] = str(donors["base"])
        if slices:
            sources.insert(1, {"model": str(donors["base"])})
    if not slices:
        return recipe | {"models": sources}
    return recipe | {
        "slices": [
            {"sources": [source | {"layer_range": list(span)} for source in sources]}
            for span in RANGES
        ]
    }


def expected(
    method: str, base: bool, slices: bool, name: str, tensors: dict[str, dict], seed: int
) -> torch.Tensor:
    """One tensor of the result, from whole tensors."""
    spec, spans = METHODS[method], RANGES if slices else [(0, 4)]
    source, t = name, 0.0
    if "layers" in name:
        position, at = int(name.split(".")[2]), 0
        start, stop = spans[0]
        if position >= stop - start:
            position, (start, stop), at = position - (stop - start), spans[1], 3
        source = name.replace(f"layers.{position + at}.", f"layers.{start + position}.")
        t = position / (stop - start - 1)
    common = {}
    for parameter, value in OF_ALL.items():
        if parameter in spec.parameters and not spec.parameters[parameter].per_model:
            common[parameter] = value if "mlp" in name else other(value)
    models = []
    for number in range(spec.models[1] or 2):
        own = {
            key: values[number]
            for key, values in OF_MODELS.items()
            if key in spec.parameters and spec.parameters[key].per_model
        }
        if number:
            models.append(
                {key: value if "self_attn" in name else other(value) for key, value in own.items()}
            )
        else:
            models.append({key: value + (value * 4 / 3 - value) * t for key, value in own.items()})
    shape = tensors["x"][source].shape

    def part(donor, parameters):
        flat = tensors[donor][source].reshape(-1)
        return Operand(lambda start, stop: flat[start:stop].clone(), parameters)

    parts = [part(donor, own) for donor, own in zip("xy", models, strict=False)]
    chunks = combine(
        method,
        parts,
        part("base", {}) if base else None,
        shape=tuple(shape),
        parameters=common,
        name=name,
        seed=seed,
        chunk=1 << 30,
    )
    return torch.cat([chunk.clone() for chunk in chunks]).view(shape)


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("method, base", CASES)
def test_a_recipe_file_becomes_what_the_method_gives_on_whole_tensors(
    three, tmp_path, run, monkeypatch, method, base, slices
):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_of(method, base, slices, three), sort_keys=False))
    for threads in (1, 4):
        monkeypatch.setattr(computing, "cores", lambda threads=threads: threads)
        code, _, err = run("merge", path, tmp_path / f"out{threads}", "--shard-size", "20kB")
        assert code == 0, err
    files = sorted((tmp_path / "out1").iterdir())
    assert all(file.read_bytes() == (tmp_path / "out4" / file.name).read_bytes() for file in files)
    tensors = {name: load_file(folder / "model.safetensors") for name, folder in three.items()}
    made = {
        name: tensor
        for file in (tmp_path / "out1").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    seeds = {
        name: entry["seed"]
        for name, entry in json.loads((tmp_path / "out1" / "frankenmerge.json").read_text())[
            "tensors"
        ].items()
    }
    assert len(set(seeds.values())) == len(made)
    for name, tensor in made.items():
        assert torch.equal(tensor, expected(method, base, slices, name, tensors, seeds[name])), name
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out1", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(made) == 9 * (6 if slices else 4) + 3


def test_two_processes_write_a_random_method_s_bytes_as_one_does(three, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_of("dare_ties", True, True, three)))

    def start(output: str, **environment: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "frankenmerge",
            "merge",
            str(path),
            str(tmp_path / output),
            "--shard-size",
            "20kB",
        ]
        return subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    started = [
        start("one"),
        *(start("two", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in (0, 1)),
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two and len([name for name in one if name.endswith(".safetensors")]) > 2
