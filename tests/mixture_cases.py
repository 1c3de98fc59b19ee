"""Mixtures of experts of tiny donors, and what they compute by the definition."""

import json
from pathlib import Path

import torch
import yaml
from conftest import write_donor
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

PROMPTS = (["the quick", "brown", "a fox"], ["jumps over", "lazy dogs"], ["Sat on", "a mat", "x"])
CASES = {
    "mixtral": ("llama", None),
    "mixtral of mistral": ("mistral", None),
    "qwen3_moe": ("qwen3", None),
    "qwen2_moe": ("qwen2", ["the end"]),
    "qwen2_moe of llama": ("llama", ["the end"]),
    "deepseek": ("llama", []),
}
"""By what they become: the donors' family, and the shared expert's prompts, None without one."""
RUNNABLE = [name for name in CASES if name != "deepseek"]


def write_donors(root: Path, family: str, count: int = 3, **changes) -> list[Path]:
    """Donors of one shape: the base, then others."""
    return [
        write_donor(root / f"{family}{number}", family, seed=number, **changes)
        for number in range(count + 1)
    ]


def mixture(case: str, donors: list[Path], **changes) -> dict:
    """The YAML of a case; donors are the base and the experts."""
    _, shared = CASES[case]
    base, *experts = map(str, donors)
    data = {
        "base_model": base,
        "gate_mode": "hidden",
        "experts": [
            {"source_model": name, "positive_prompts": prompts}
            for name, prompts in zip(experts, PROMPTS, strict=False)
        ],
    }
    if shared is not None:
        own = {"positive_prompts": shared} if shared else {}
        data["shared_experts"] = [{"source_model": base, "residual_scale": 0.25, **own}]
    return data | changes


def write_config(path: Path, data: dict) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def loaded(folder: Path):
    """The model that transformers loads, with no tensor missing, unexpected or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


class Defined(torch.nn.Module):
    """A mixture of experts by its definition, from the donors' own MLPs."""

    def __init__(self, experts, gate, per_token, shared=None, shared_gate=None, scale=0.25):
        super().__init__()
        self.experts, self.shared = torch.nn.ModuleList(experts), shared
        self.gate, self.shared_gate, self.count = gate, shared_gate, per_token
        self.scale = scale

    def forward(self, states):
        scores = linear(states, self.gate).softmax(-1)
        result = torch.zeros_like(states)
        for place in [(b, s) for b in range(states.shape[0]) for s in range(states.shape[1])]:
            best = scores[place].argsort(descending=True)[: self.count]
            weights = scores[place][best] / scores[place][best].sum()
            for weight, number in zip(weights, best.tolist(), strict=True):
                result[place] += weight * self.experts[number](states[place])
        if self.shared is not None:
            weight = self.scale
            if self.shared_gate is not None:
                weight = weight * linear(states, self.shared_gate).sigmoid()
            result = result + weight * self.shared(states)
        return result


def defined(data: dict, folder: Path):
    """A dense base whose MLPs are replaced by mixtures with the gates in `folder`."""
    stored = tensors_of(folder)
    models = [
        AutoModelForCausalLM.from_pretrained(name).eval()
        for name in (data["base_model"], *(each["source_model"] for each in data["experts"]))
    ]
    base, *experts = models
    shared = (
        AutoModelForCausalLM.from_pretrained(data["base_model"])
        if "shared_experts" in data
        else None
    )
    for index, block in enumerate(base.model.layers):
        prefix = f"model.layers.{index}."
        gate = next(
            value
            for name, value in stored.items()
            if name.startswith(prefix) and name.endswith((".mlp.gate.weight", "moe.gate.weight"))
        )
        block.mlp = Defined(
            [model.model.layers[index].mlp for model in experts],
            gate,
            data.get("experts_per_token", 2),
            shared and shared.model.layers[index].mlp,
            stored.get(f"{prefix}mlp.shared_expert_gate.weight"),
        )
    return base


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
