"""The recipes and the tiny donors on which merge methods are compared with mergekit's."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from frankenmerge.splicing.methods import METHODS

SEED = 0
WIDTH, INNER, VOCABULARY = 64, 160, 512


class Case(NamedTuple):
    """One recipe."""

    method: str
    models: list[dict[str, float]]
    """Each model's own parameters."""
    parameters: dict[str, Any]
    base: bool

    def __str__(self) -> str:
        return ", ".join(
            [self.method, *(f"{name} {value}" for name, value in self.parameters.items())]
        )

    @property
    def whole(self) -> "Case":
        """Without dropping anything."""
        none = {"density": 1.0, "gamma": 0.0}
        return self._replace(
            models=[
                {name: none.get(name, value) for name, value in own.items()} for own in self.models
            ]
        )

    @property
    def title(self) -> str:
        """A name that is different for every case."""
        return str(self) + ", base" * (METHODS[self.method].base == "optional" and self.base)

    def recipe(self, donors: Path, **types: str) -> dict[str, Any]:
        """As mergekit reads it, with the base among the models for methods that expect it there."""
        models = [
            {"model": str(donors / str(number)), "parameters": own}
            for number, own in enumerate(self.models)
        ]
        recipe: dict[str, Any] = {
            "merge_method": self.method,
            "parameters": self.parameters,
        } | types
        if self.base:
            recipe["base_model"] = str(donors / "base")
        if self.method in ("slerp", "nearswap", "arcee_fusion", "model_stock"):
            models.append({"model": str(donors / "base")})
        return recipe | {"models": models}


def cases() -> list[Case]:
    """Recipes for every method."""
    own = [
        {"weight": 0.5, "density": 0.53},
        {"weight": 0.3, "density": 0.4},
        {"weight": 0.4, "density": 0.6},
    ]
    extra = {
        "slerp": [{"t": 0.3}],
        "nearswap": [{"t": 0.002}],
        "nuslerp": [
            {},
            {"nuslerp_flatten": False},
            {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        ],
        "sce": [{}, {"select_topk": 0.4}],
        "model_stock": [{}, {"filter_wise": True}],
        "ties": [{}, {"normalize": False, "rescale": True, "lambda": 0.7}],
        "karcher": [{}, {"max_iter": 50, "tol": 1e-7}],
    }
    found = []
    for method, spec in METHODS.items():
        known = [{"scale": 0.7, **values} for values in own[: spec.models[1] or 3]]
        models = [
            {name: value for name, value in values.items() if name in spec.parameters}
            for values in known
        ]
        for base in {"none": [False], "optional": [False, True], "required": [True]}[spec.base]:
            found += [
                Case(method, models, parameters, base) for parameters in extra.get(method, [{}])
            ]
    return found


def made_donors() -> dict[str, dict[str, Tensor]]:
    """Llamas of two blocks: a base and three models."""
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for block in range(2):
        for name, shape in {
            **{f"self_attn.{letter}_proj": (WIDTH, WIDTH) for letter in "qkvo"},
            **{
                "mlp.gate_proj": (INNER, WIDTH),
                "mlp.up_proj": (INNER, WIDTH),
                "mlp.down_proj": (WIDTH, INNER),
            },
            **{"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)},
        }.items():
            shapes[f"model.layers.{block}.{name}.weight"] = shape
    generator = torch.Generator().manual_seed(SEED)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    donors = {"base": base}
    for number in range(3):
        donors[str(number)] = {
            name: tensor + 0.005 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.items()
        }
    return donors


def write_donors(
    donors: dict[str, dict[str, Tensor]], dtype: torch.dtype, folder: Path
) -> dict[str, dict[str, Tensor]]:
    """Write donors in a type; return the tensors as written."""
    config = {
        **{
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
        },
        **{
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": VOCABULARY,
            "rms_norm_eps": 1e-5,
        },
        **{
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "max_position_embeddings": 64,
        },
    }
    tokenizer = {
        "model": {
            "type": "BPE",
            "vocab": {f"t{index}": index for index in range(VOCABULARY)},
            "merges": [],
        }
    }
    written = {
        name: {key: tensor.to(dtype) for key, tensor in tensors.items()}
        for name, tensors in donors.items()
    }
    for name, tensors in written.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
    return written
