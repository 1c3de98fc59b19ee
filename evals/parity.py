"""The merge methods against mergekit's, on the same tiny donors with the same recipes, mergekit in an environment of its own.

Donors are float32 Llamas with random weights, the models a few thousandths from the base, so that no two changes are equal: which of
equal changes stay is left to chance in mergekit. Both compute in float32. For every recipe: the largest difference over
the tensor's largest magnitude, and the share of elements that differ once rounded to bfloat16. Random methods are compared by
what they do to the changes: their mean, their variance, the share that is not 0.
"""

import json
import platform
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from frankenmerge.merging.methods import METHODS

MERGEKIT = "0.1.5"
NEEDS = ("accelerate", "click", "huggingface_hub", "immutables", "peft", "protobuf", "pydantic", "safetensors", "scipy", "sentencepiece")
NEEDS += ("tokenizers", "tqdm", "transformers", "typing-extensions")
SEED = 0

PEER = """
import sys
from pathlib import Path
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

for recipe in sorted(Path(sys.argv[1]).glob("*.yaml")):
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    run_merge(config, str(recipe.with_suffix("")), MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
"""


class Case(NamedTuple):
    """One recipe."""

    method: str
    models: list[dict[str, float]]
    """Each model's own parameters."""
    parameters: dict[str, Any]
    base: bool

    def __str__(self) -> str:
        return ", ".join([self.method, *(f"{name} {value}" for name, value in self.parameters.items())])

    def recipe(self, donors: Path) -> dict[str, Any]:
        """As mergekit reads it; where it wants the base among the models, it is there."""
        models = [{"model": str(donors / str(number)), "parameters": own} for number, own in enumerate(self.models)]
        recipe: dict[str, Any] = {"merge_method": self.method, "dtype": "float32", "parameters": self.parameters}
        if self.base:
            recipe["base_model"] = str(donors / "base")
        if self.method in ("slerp", "nearswap", "arcee_fusion", "model_stock"):
            models.append({"model": str(donors / "base")})
        return recipe | {"models": models}


def cases() -> list[Case]:
    own = [{"weight": 0.5, "density": 0.53}, {"weight": 0.3, "density": 0.4}, {"weight": 0.4, "density": 0.6}]
    extra = {
        "slerp": [{"t": 0.3}],
        "nearswap": [{"t": 0.002}],
        "nuslerp": [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}],
        "sce": [{}, {"select_topk": 0.4}],
        "model_stock": [{}, {"filter_wise": True}],
        "ties": [{}, {"normalize": False, "rescale": True, "lambda": 0.7}],
        "karcher": [{}, {"max_iter": 50, "tol": 1e-7}],
    }
    found = []
    for method, spec in METHODS.items():
        known = [{"scale": 0.7, **values} for values in own[: spec.models[1] or 3]]
        models = [{name: value for name, value in values.items() if name in spec.parameters} for values in known]
        for base in {"none": [False], "optional": [False, True], "required": [True]}[spec.base]:
            found += [Case(method, models, parameters, base) for parameters in extra.get(method, [{}])]
    return found


def write_donors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Llamas of two blocks: a base and three models."""
    width, inner, vocabulary = 64, 160, 512
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for block in range(2):
        for name, shape in {
            **{f"self_attn.{letter}_proj": (width, width) for letter in "qkvo"},
            **{"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)},
            **{"input_layernorm": (width,), "post_attention_layernorm": (width,)},
        }.items():
            shapes[f"model.layers.{block}.{name}.weight"] = shape
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": vocabulary, "rms_norm_eps": 1e-5},
        **{"tie_word_embeddings": False, "torch_dtype": "float32", "max_position_embeddings": 64},
    }
    tokenizer = {"model": {"type": "BPE", "vocab": {f"t{index}": index for index in range(vocabulary)}, "merges": []}}
    generator = torch.Generator().manual_seed(SEED)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    donors = {"base": base}
    for number in range(3):
        donors[str(number)] = {name: tensor + 0.005 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    for name, tensors in donors.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
    return donors


def ours(recipes: list[Path]) -> None:
    """Merge every recipe as a user would, each into the folder of its name with `-ours` behind it."""
    for recipe in recipes:
        checked_run([sys.executable, "-m", "frankenmerge", "merge", str(recipe), f"{recipe.with_suffix('')}-ours"])


def checked_run(command: list[Any]) -> None:
    """Run a program; end with what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:300]} ended with {done.returncode}:\n{done.stderr}")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def peer_python(folder: Path) -> Path:
    """The interpreter of the environment in `folder`, made with mergekit in it where it is not there yet."""
    python = folder / "bin" / "python"
    ready = folder / f".mergekit-{MERGEKIT}"
    if not ready.exists():
        venv.create(folder, with_pip=True)
        torch_version = torch.__version__.split("+")[0]
        for packages in ([f"torch=={torch_version}"], ["--no-deps", f"mergekit=={MERGEKIT}"], [f"torch=={torch_version}", *NEEDS]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        ready.touch()
    return python


def compare(case: Case, found: dict[str, Tensor], peer: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Any]:
    if not METHODS[case.method].random:
        largest = max(float((found[name] - peer[name]).abs().max() / peer[name].abs().max()) for name in peer)
        differ = torch.cat([(found[name].bfloat16() != peer[name].bfloat16()).view(-1) for name in peer])
        return {"largest_difference": largest, "bf16_differ": float(differ.float().mean())}
    figures = {}
    for label, tensors in (("ours", found), ("mergekit", peer)):
        changes = np.concatenate([(tensors[name] - base[name]).double().view(-1).numpy() for name in peer if base[name].dim() > 1])
        figures[label] = {"mean": changes.mean(), "variance": changes.var(), "density": (changes != 0).mean()}
    return figures


@click.command()
@click.option(
    "--venv", "environment", type=click.Path(path_type=Path), default=Path(".mergekit"), show_default=True, help="mergekit's own."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(environment: Path, as_json: bool) -> None:
    """Merge by every method with `frankenmerge merge` and with mergekit, and print how far the results are apart."""
    python = peer_python(environment.absolute())
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        donors = write_donors(folder)
        listed = cases()
        recipes = [folder / f"{number:02}.yaml" for number in range(len(listed))]
        for recipe, case in zip(recipes, listed, strict=True):
            recipe.write_text(yaml.safe_dump(case.recipe(folder)))
        ours(recipes)
        checked_run([python, "-c", PEER, folder])
        rows = []
        for recipe, case in zip(recipes, listed, strict=True):
            found, peer = tensors_of(folder / f"{recipe.stem}-ours"), tensors_of(folder / recipe.stem)
            assert found.keys() == peer.keys() == donors["base"].keys()
            rows.append({"recipe": str(case) + ", base" * (METHODS[case.method].base == "optional" and case.base)})
            rows[-1] |= compare(case, found, peer, donors["base"])
    versions = {"mergekit": MERGEKIT, "torch": torch.__version__, "python": platform.python_version()}
    if as_json:
        click.echo(json.dumps({"rows": rows, "seed": SEED, "versions": versions}))
        return
    console = Console()
    exact = Table("recipe", "largest difference", "bf16 that differ", title=f"deterministic, against mergekit {MERGEKIT}")
    chance = Table("recipe", "figure", "ours", "mergekit", title=f"random, seed {SEED}")
    for row in rows:
        if "ours" in row:
            for figure, value in row["ours"].items():
                chance.add_row(row["recipe"], figure, f"{value:.4g}", f"{row['mergekit'][figure]:.4g}")
        else:
            exact.add_row(row["recipe"], f"{row['largest_difference']:.1e}", f"{row['bf16_differ']:.2%}")
    console.print(exact)
    console.print(chance)


if __name__ == "__main__":
    main()
