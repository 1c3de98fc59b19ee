"""The merge methods against mergekit's, on the same tiny donors with the same recipes, mergekit in an environment of its own.

Donors are float32 Llamas with random weights, the models a few thousandths from the base, so that
no two changes are equal: which of equal changes stay is left to chance in mergekit. Both compute in
float32. For every recipe: the largest difference over the tensor's largest magnitude, and the share
of elements that differ once rounded to bfloat16. Random methods are compared by what they do to the
changes: their mean, their variance, the share that is not 0.

Then the same donors in bfloat16, merged into bfloat16: the share of elements that are not the
nearest to the float64 result, ours and mergekit's, its `dtype` bfloat16 as in most recipes, or
float32 with `out_dtype`. Of linear combinations the float64 result has its inner products and sums
in float64, the formulas of the coefficients being `methods/span.py`'s; of the other methods it is
mergekit's own with `dtype: float64`. These keep every element there (density 1, gamma 0, no
select_topk): which of equal changes stay, and which chance takes, is no matter of rounding.
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

from frankenmerge.splicing.methods import METHODS, span
from frankenmerge.splicing.methods.inputs import Operand, inputs_of

MERGEKIT = "0.1.5"
NEEDS = (
    "accelerate",
    "click",
    "huggingface_hub",
    "immutables",
    "peft",
    "protobuf",
    "pydantic",
    "safetensors",
    "scipy",
    "sentencepiece",
)
NEEDS += ("tokenizers", "tqdm", "transformers", "typing-extensions")
SEED = 0
WIDTH, INNER, VOCABULARY = 64, 160, 512

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
        """With what tells it from the other cases."""
        return str(self) + ", base" * (METHODS[self.method].base == "optional" and self.base)

    def recipe(self, donors: Path, **types: str) -> dict[str, Any]:
        """As mergekit reads it; where it wants the base among the models, it is there."""
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
    """Write them in a type; what is returned is what was written."""
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


def ours(recipes: list[Path]) -> None:
    """Merge every recipe as a user would, each into the folder of its name with `-ours` behind it."""
    for recipe in recipes:
        checked_run(
            [
                sys.executable,
                "-m",
                "frankenmerge",
                "merge",
                str(recipe),
                f"{recipe.with_suffix('')}-ours",
            ]
        )


def checked_run(command: list[Any]) -> None:
    """Run a program; end with what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{' '.join(map(str, command))[:300]} ended with {done.returncode}:\n{done.stderr}"
        )


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def peer_version(python: Path) -> str | None:
    """The version of the mergekit that an interpreter has; None without."""
    program = "from importlib.metadata import version; print(version('mergekit'))"
    done = (
        subprocess.run([python, "-c", program], capture_output=True, text=True)
        if python.exists()
        else None
    )
    return done.stdout.strip() if done and not done.returncode else None


def peer_python(folder: Path) -> Path:
    """The interpreter of the environment in `folder`, made with mergekit in it where it is not there yet."""
    python = folder / "bin" / "python"
    if peer_version(python) is None:
        venv.create(folder, with_pip=True)
        torch_version = torch.__version__.split("+")[0]
        for packages in (
            [f"torch=={torch_version}"],
            ["--no-deps", f"mergekit=={MERGEKIT}"],
            [f"torch=={torch_version}", *NEEDS],
        ):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


Listed = list[tuple[Case, dict[str, str]]]
"""Cases, and the types to merge them in."""


def recipes_in(folder: Path, listed: Listed, donors: Path) -> list[Path]:
    """The recipes' files, written."""
    folder.mkdir()
    recipes = [folder / f"{number:03}.yaml" for number in range(len(listed))]
    for recipe, (case, types) in zip(recipes, listed, strict=True):
        recipe.write_text(yaml.safe_dump(case.recipe(donors, **types)))
    return recipes


def theirs(recipes: list[Path], python: Path) -> list[dict[str, Tensor]]:
    """What mergekit makes of every recipe of a folder."""
    checked_run([python, "-c", PEER, recipes[0].parent])
    return [tensors_of(recipe.with_suffix("")) for recipe in recipes]


def merged(listed: Listed, donors: Path, folder: Path, python: Path) -> list[tuple[dict, dict]]:
    """Merge every case in its types by both programs: (ours, mergekit's) for each."""
    recipes = recipes_in(folder, listed, donors)
    ours(recipes)
    return [
        (tensors_of(folder / f"{recipe.stem}-ours"), peer)
        for recipe, peer in zip(recipes, theirs(recipes, python), strict=True)
    ]


def exact(case: Case, donors: dict[str, dict[str, Tensor]], name: str) -> np.ndarray:
    """One tensor of a linear combination, in float64."""

    def part(donor: str, parameters: dict[str, float]) -> Operand:
        flat = donors[donor][name].double().flatten().numpy()
        return Operand(lambda start, stop: flat[start:stop], parameters)

    parts = [part(str(number), own) for number, own in enumerate(case.models)]
    shape = tuple(donors["base"][name].shape)
    base = part("base", {}) if case.base else None
    inputs, coefficients, per = span.RULES[case.method](
        inputs_of(
            case.method, parts, base, shape=shape, parameters=case.parameters, name=name, seed=0
        )
    )
    start = inputs.base.read(0, inputs.size) if inputs.base else np.zeros(inputs.size)
    vectors = np.stack(
        [model.read(0, inputs.size) - (start if inputs.base else 0) for model in inputs.models]
    )
    matrices = (
        vectors.reshape(len(vectors), 1, -1)
        if per == "tensor"
        else vectors.reshape(len(vectors), -1, inputs.width)
    )
    if per == "column":
        matrices = matrices.swapaxes(1, 2)
    if callable(coefficients):
        found = coefficients(np.einsum("ikd,jkd->kij", matrices, matrices))
    else:
        found = coefficients[None]
    total = np.einsum("kn,nkd->kd", found, matrices)
    return start + (total.T if per == "column" else total).reshape(-1)


def rounded_once(values: np.ndarray) -> np.ndarray:
    """Float64 to the nearest bfloat16, of two the even one: 45 of 52 binary places go. None is subnormal here."""
    bits = values.view(np.int64)
    return ((bits + (1 << 44) - 1 + (bits >> 45 & 1)) >> 45 << 45).view(np.float64)


def wrong(found: dict[str, Tensor], values: dict[str, np.ndarray]) -> float:
    """The share of elements that are not the bfloat16 nearest to the float64 result; of two as near, either will do.

    Weights such as 5/12 put percents of the elements halfway between two, but for float64's own
    rounding.
    """
    off = count = 0
    for name, tensor in found.items():
        made, value = tensor.double().flatten().numpy(), values[name]
        off += int((abs(made - value) > (1 + 1e-9) * abs(rounded_once(value) - value)).sum())
        count += len(made)
    return off / count


def rounding(
    donors: dict[str, dict[str, Tensor]], folder: Path, python: Path
) -> list[dict[str, Any]]:
    """How often an element of bfloat16 is not the nearest to the float64 result."""
    written = write_donors(donors, torch.bfloat16, folder / "bf16")
    usual, wide = {"dtype": "bfloat16"}, {"dtype": "float32", "out_dtype": "bfloat16"}
    listed = [case.whole for case in cases() if "select_topk" not in case.parameters]
    made = merged(
        [(case, types) for case in listed for types in (usual, wide)],
        folder / "bf16",
        folder / "rounding",
        python,
    )
    others = [case for case in listed if case.method not in span.RULES]
    widest = theirs(
        recipes_in(
            folder / "float64", [(case, {"dtype": "float64"}) for case in others], folder / "bf16"
        ),
        python,
    )
    values = {
        case.title: {name: tensor.flatten().numpy() for name, tensor in found.items()}
        for case, found in zip(others, widest, strict=True)
    }
    rows = []
    for case, narrow, other in zip(listed, made[::2], made[1::2], strict=True):
        known = values.get(case.title) or {name: exact(case, written, name) for name in narrow[0]}
        shares = {"ours": narrow[0], "mergekit": narrow[1], "mergekit_float32": other[1]}
        rows.append(
            {"recipe": case.title} | {name: wrong(found, known) for name, found in shares.items()}
        )
    return rows


def compare(
    case: Case, found: dict[str, Tensor], peer: dict[str, Tensor], base: dict[str, Tensor]
) -> dict[str, Any]:
    if not METHODS[case.method].random:
        largest = max(
            float((found[name] - peer[name]).abs().max() / peer[name].abs().max()) for name in peer
        )
        differ = torch.cat(
            [(found[name].bfloat16() != peer[name].bfloat16()).view(-1) for name in peer]
        )
        return {"largest_difference": largest, "bf16_differ": float(differ.float().mean())}
    figures = {}
    for label, tensors in (("ours", found), ("mergekit", peer)):
        changes = np.concatenate(
            [
                (tensors[name] - base[name]).double().view(-1).numpy()
                for name in peer
                if base[name].dim() > 1
            ]
        )
        figures[label] = {
            "mean": changes.mean(),
            "variance": changes.var(),
            "density": (changes != 0).mean(),
        }
    return figures


@click.command()
@click.option(
    "--venv",
    "environment",
    type=click.Path(path_type=Path),
    default=Path(".mergekit"),
    show_default=True,
    help="An environment with mergekit; made where there is none.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(environment: Path, as_json: bool) -> None:
    """Merge by every method with `frankenmerge merge` and with mergekit, and print how far the results are apart."""
    python = peer_python(environment.absolute())
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        donors = write_donors(made_donors(), torch.float32, folder / "float32")
        listed = cases()
        rows = []
        made = merged(
            [(case, {"dtype": "float32"}) for case in listed],
            folder / "float32",
            folder / "recipes",
            python,
        )
        for case, (found, peer) in zip(listed, made, strict=True):
            assert found.keys() == peer.keys() == donors["base"].keys()
            rows.append({"recipe": case.title} | compare(case, found, peer, donors["base"]))
        off = rounding(donors, folder, python)
    versions = {
        "mergekit": peer_version(python),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if as_json:
        click.echo(json.dumps({"rows": rows, "rounding": off, "seed": SEED, "versions": versions}))
        return
    console = Console()
    exact = Table(
        "recipe",
        "largest difference",
        "bf16 that differ",
        title=f"deterministic, against mergekit {versions['mergekit']}",
    )
    chance = Table("recipe", "figure", "ours", "mergekit", title=f"random, seed {SEED}")
    for row in rows:
        if "ours" in row:
            for figure, value in row["ours"].items():
                chance.add_row(
                    row["recipe"], figure, f"{value:.4g}", f"{row['mergekit'][figure]:.4g}"
                )
        else:
            exact.add_row(
                row["recipe"], f"{row['largest_difference']:.1e}", f"{row['bf16_differ']:.2%}"
            )
    console.print(exact)
    console.print(chance)
    rounds = Table(
        "recipe",
        "ours",
        "mergekit",
        "mergekit, float32",
        title="bf16 elements that are not the nearest to the float64 result",
    )
    for row in off:
        rounds.add_row(
            row["recipe"],
            *(f"{row[name]:.3%}" for name in ("ours", "mergekit", "mergekit_float32")),
        )
    console.print(rounds)


if __name__ == "__main__":
    main()
