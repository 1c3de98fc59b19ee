"""Compare the merge methods with mergekit's, on the same tiny donors with the same recipes.

Donors are float32 Llamas with random weights, the models a few thousandths from the base, so that
no two changes are equal: which of equal changes are kept is arbitrary in mergekit. Both compute in
float32. For every recipe: the largest difference over the tensor's largest magnitude, and the share
of elements that differ when rounded to bfloat16. Random methods are compared by their effect on
the changes: mean, variance and the share that is not 0.

Then the same donors in bfloat16, merged into bfloat16: the share of elements that are not the
nearest to the float64 result, ours and mergekit's, its `dtype` bfloat16 as in most recipes, or
float32 with `out_dtype`. Of linear combinations the float64 result has its inner products and sums
in float64, the formulas of the coefficients being `methods/span.py`'s; of the other methods it is
mergekit's own with `dtype: float64`. These keep every element there (density 1, gamma 0, no
select_topk): which of equal changes are kept, and which are dropped at random, is no rounding.
"""

import json
import platform
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from mergekit_peer import environment_option, merged, peer_python, peer_version, recipes_in, theirs
from parity_cases import SEED, Case, cases, made_donors, write_donors
from rich.console import Console
from rich.table import Table
from torch import Tensor

from frankenmerge.splicing.methods import METHODS, span
from frankenmerge.splicing.methods.inputs import Operand, inputs_of


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
    """Round float64 to the nearest bfloat16, ties to even: 45 of 52 bits are dropped.

    None of the values is subnormal.
    """
    bits = values.view(np.int64)
    return ((bits + (1 << 44) - 1 + (bits >> 45 & 1)) >> 45 << 45).view(np.float64)


def wrong(found: dict[str, Tensor], values: dict[str, np.ndarray]) -> float:
    """The share of elements that are not the bfloat16 nearest to the float64 result.

    Of two that are equally near, either is right: with weights such as 5/12, a few percent of the
    elements are halfway between two, but for float64's own rounding.
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
    """How often an element in bfloat16 is not the nearest to the float64 result, by recipe."""
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
    """Figures of one recipe; those of random methods for each program."""
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
@environment_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(environment: Path, as_json: bool) -> None:
    """Merge by every method with frankenmerge and mergekit, and print how far results differ."""
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
    _print(rows, off, versions["mergekit"])


def _print(rows: list[dict[str, Any]], off: list[dict[str, Any]], version: str | None) -> None:
    console = Console()
    exact = Table(
        "recipe",
        "largest difference",
        "bf16 elements that differ",
        title=f"Deterministic methods, compared with mergekit {version}",
    )
    chance = Table("recipe", "figure", "ours", "mergekit", title=f"Random methods, seed {SEED}")
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
        title="Share of bf16 elements that are not the nearest to the float64 result",
    )
    for row in off:
        rounds.add_row(
            row["recipe"],
            *(f"{row[name]:.3%}" for name in ("ours", "mergekit", "mergekit_float32")),
        )
    console.print(rounds)


if __name__ == "__main__":
    main()
