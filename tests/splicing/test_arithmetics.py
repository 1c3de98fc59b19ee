"""C and torch compute the same bytes, and the provenance says which one did."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import meter, written
from means import NAME, tree
from safetensors.torch import load_file, save_file

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.methods import native_chunks

needs_extension = pytest.mark.skipif(
    native_chunks.extension is None and not shutil.which("cc"),
    reason="no compiler has built the extension",
)


@needs_extension
def test_the_provenance_says_what_computed(linear, pair, tmp_path, without_extension):
    def provenance(name):
        linear(*pair["F32"], tmp_path / name)
        return json.loads((tmp_path / name / "frankenmerge.json").read_text())

    by_c = provenance("c")
    assert by_c["arithmetic"] == ["C"] and by_c["versions"].keys() == {"python", "numpy"}
    without_extension()
    by_torch = provenance("torch")
    assert by_torch["arithmetic"] == ["torch"]
    assert by_torch["versions"].pop("torch").split("+")[0] == torch.__version__.split("+")[0]
    assert by_torch | {"arithmetic": ["C"]} == by_c


@pytest.mark.parametrize(
    "stored, made",
    [("F32", "F32"), ("BF16", "BF16"), ("F16", "F16"), ("F32", "BF16"), ("BF16", "F32")],
)
def test_without_the_extension_the_bytes_are_the_same(
    linear, pair, tmp_path, without_extension, stored, made
):
    how = {"dtype": made, "weights": (0.3, 0.7)}
    linear(*pair[stored], tmp_path / "c", **how)
    without_extension()
    linear(*pair[stored], tmp_path / "torch", **how)
    one, other = tree(tmp_path / "c"), tree(tmp_path / "torch")
    assert one.pop("frankenmerge.json") != other.pop("frankenmerge.json") and one == other


@needs_extension
@pytest.mark.parametrize("method", ["linear", "slerp", "model_stock", "ties", "dare_ties"])
@pytest.mark.parametrize(
    "stored, made",
    [("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16"), ("F32", "bfloat16")],
)
def test_without_the_extension_the_bytes_of_nan_are_the_same(
    pair, tmp_path, without_extension, method, stored, made
):
    donors = []
    for number, donor in enumerate(pair[stored]):
        donors.append(shutil.copytree(donor, tmp_path / f"donor{number}"))
        tensors = load_file(donors[-1] / "model.safetensors")
        for place, value in enumerate((math.nan, -math.nan, math.inf, -math.inf)):
            tensors[NAME].view(-1)[place + number :: 16] = value
        save_file(tensors, donors[-1] / "model.safetensors", {"format": "pt"})
    own = {
        "linear": {"weight": 0.4},
        "ties": {"weight": 0.4, "density": 0.6},
        "dare_ties": {"weight": 0.4, "density": 0.6},
    }
    weights = {"parameters": own.get(method, {})}
    recipe = {
        "models": [{"model": str(donor), **weights} for donor in (*donors, pair[stored][0])],
        "merge_method": method,
        "dtype": made,
    }
    recipe |= {} if method == "linear" else {"base_model": str(donors[0])}
    if method == "slerp":
        recipe |= {"models": recipe["models"][:2], "parameters": {"t": 0.3}}
    parsed = Recipe.model_validate(recipe)
    written(parsed, tmp_path / "c", allow_nan=True)
    without_extension()
    written(parsed, tmp_path / "torch", allow_nan=True)
    one, other = (tmp_path / name / "model.safetensors" for name in ("c", "torch"))
    assert one.read_bytes() == other.read_bytes() and load_file(one)[NAME].isnan().any()


@needs_extension
@pytest.mark.parametrize(
    "method",
    ["linear", "slerp", "task_arithmetic", "model_stock", "ties", "dare_linear", "breadcrumbs"],
)
def test_what_is_computed_in_c_is_so_without_torch(pair, tmp_path, method):
    first, second = map(str, pair["BF16"])
    weight = {} if method in ("slerp", "model_stock") else {"parameters": {"weight": 0.4}}
    listed = [{"model": name, **weight} for name in (first, second)]
    recipe = {"models": listed, "merge_method": method} | (
        {} if method == "linear" else {"base_model": first}
    )
    recipe |= {"parameters": {"t": 0.3}} if method == "slerp" else {}
    recipe |= {"models": [*listed, {"model": second}]} if method == "model_stock" else {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(tmp_path / "recipe.yaml"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


LIGHT = """
import sys
from frankenmerge.cli import main
try:
    main(["merge", *sys.argv[1:]])
except SystemExit as ended:
    assert not ended.code
print([name for name in ("torch", "transformers", "accelerate") if name in sys.modules])
"""


@needs_extension
def test_what_one_arithmetic_began_the_other_does_not_resume(
    linear, pair, tmp_path, without_extension
):
    def broken(done):
        raise OSError("the disk is gone")

    options = {"shard_size": 100_000, "resume": True}
    with pytest.raises(FrankenmergeError, match="the disk is gone"):
        linear(*pair["BF16"], tmp_path / "out", options=options, progress=meter(broken))
    without_extension()
    with pytest.raises(FrankenmergeError, match="another arithmetic"):
        linear(*pair["BF16"], tmp_path / "out", options=options)


def test_a_missing_extension_is_told_before_a_computed_merge(donors, run, tmp_path, monkeypatch):
    from frankenmerge.splicing.methods import native_chunks

    monkeypatch.setattr(native_chunks, "extension", None)
    models = [{"model": str(donors[name]), "parameters": {"weight": 1}} for name in ("a", "b")]
    for method, told in (("linear", True), ("passthrough", False)):
        recipe = tmp_path / f"{method}.yaml"
        recipe.write_text(json.dumps({"merge_method": method, "models": models[: 1 + told]}))
        code, _, err = run("merge", recipe, tmp_path / method)
        assert code == 0 and err.count("the C extension is not installed") == told
