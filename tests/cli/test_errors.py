"""A user's mistakes: exit status 2, one message with a remedy, no output, nothing written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import changed, write_donor

from frankenmerge.artefacts.recipe import Block, recipe_of

WORDS = ("expected:", "found:", "remedy:")


@pytest.fixture
def refused(run, tmp_path):
    """Run a command that must report a mistake; returns the message."""

    def call(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        assert all(word in err for word in WORDS), err
        assert [path for path in sorted(tmp_path.rglob("*")) if "cache" not in path.parts] == [
            p for p in before if "cache" not in p.parts
        ]
        return err

    return call


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe of (folder, index) pairs and return its path."""

    def write(*blocks: tuple[object, int], more: str = "") -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            recipe_of([Block(str(folder), index) for folder, index in blocks]).dump() + more
        )
        return path

    return write


@pytest.fixture(scope="module")
def alignment(donors, tmp_path_factory) -> Path:
    from frankenmerge.analysis.align import align
    from frankenmerge.analysis.analyze import analyze
    from frankenmerge.artefacts.alignment import save_alignment
    from frankenmerge.donors.checkpoint import open_checkpoint

    path = tmp_path_factory.mktemp("alignment") / "ab.alignment.safetensors"
    save_alignment(align(*(analyze(open_checkpoint(str(donors[name]))) for name in "ab")), path)
    return path


def commands(donor: object, recipe: Path, text: Path, tmp_path: Path) -> dict[str, tuple]:
    """Every command that opens a donor."""
    return {
        "inspect": ("inspect", donor),
        "analyze": ("analyze", donor, "-o", tmp_path / "x.atlas.safetensors"),
        "align": ("align", donor, donor, "-o", tmp_path / "x.alignment.safetensors"),
        "check": ("check", recipe),
        "merge": ("merge", recipe, tmp_path / "out"),
        "evaluate": ("evaluate", recipe, "--text", text),
        "evaluate a donor": ("evaluate", donor, "--text", text),
        "tune": ("tune", recipe, "--on", text, "-o", tmp_path / "tuned.yaml"),
        "sweep": ("plan", donor, "--sweep", "--on", text, "-o", tmp_path / "swept.yaml"),
    }


NAMES = sorted(commands("", Path(), Path(), Path()))


# Donors


@pytest.mark.parametrize("command", NAMES)
def test_a_donor_that_is_not_there(refused, recipe, text, tmp_path, command):
    donor = tmp_path / "nowhere"
    assert str(donor) in refused(*commands(donor, recipe((donor, 0)), text, tmp_path)[command])


@pytest.mark.parametrize("command", NAMES)
def test_a_truncated_donor(refused, donors, recipe, text, tmp_path, command):
    donor = Path(shutil.copytree(donors["a"], tmp_path / "donor"))
    file = donor / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    err = refused(*commands(donor, recipe((donor, 0)), text, tmp_path)[command])
    assert str(file) in err and "truncated" in err


@pytest.mark.parametrize("command", NAMES)
def test_a_missing_shard(refused, donors, recipe, text, tmp_path, command):
    donor = Path(shutil.copytree(donors["deep"], tmp_path / "donor"))
    shard = sorted(donor.glob("*.safetensors"))[1]
    shard.unlink()
    assert str(shard) in refused(*commands(donor, recipe((donor, 0)), text, tmp_path)[command])


@pytest.mark.parametrize("command", NAMES)
def test_a_tensor_of_a_wrong_shape(refused, donors, recipe, text, tmp_path, command):
    name = "model.layers.1.mlp.up_proj.weight"
    donor = changed(
        donors["a"], tmp_path / "donor", lambda all: all | {name: np.zeros((25, 16), np.float32)}
    )
    err = refused(*commands(donor, recipe((donor, 0)), text, tmp_path)[command])
    assert name in err and "(25, 16)" in err


@pytest.mark.parametrize("command", [name for name in NAMES if name not in ("inspect", "tune")])
def test_a_donor_without_a_tokenizer(refused, donors, recipe, text, tmp_path, command):
    donor = Path(shutil.copytree(donors["a"], tmp_path / "donor"))
    (donor / "tokenizer.json").unlink()
    err = refused(*commands(donor, recipe((donor, 0)), text, tmp_path)[command])
    assert str(donor) in err and "tokenizer" in err


def test_a_donor_of_an_unknown_family(refused, donors, tmp_path):
    donor = changed(
        donors["a"], tmp_path / "donor", config=lambda config: config | {"model_type": "novel"}
    )
    layers = [
        {"sources": [{"model": str(donor), "layer_range": span}]} for span in ([0, 3], [1, 4])
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": layers}))
    assert "novel" in refused("check", recipe)


def test_a_hub_id_that_is_not_in_the_cache(refused):
    assert "--download" in refused("inspect", "organisation/of-no-such-model")


def test_two_wrong_donors_of_a_recipe_are_reported_together(refused, recipe, tmp_path):
    err = refused("check", recipe((tmp_path / "x", 0), (tmp_path / "y", 0)))
    assert str(tmp_path / "x") in err and str(tmp_path / "y") in err


# Recipes


@pytest.mark.parametrize("command", ["check", "merge", "evaluate"])
def test_unknown_keys(refused, donors, recipe, text, tmp_path, command):
    path = recipe((donors["a"], 0), more="speed: 3\nmerge: x\n")
    err = refused(*commands("", path, text, tmp_path)[command])
    assert f"{path}: speed" in err and f"{path}: merge\n" in err


@pytest.mark.parametrize("command", ["check", "merge", "evaluate"])
def test_a_range_past_the_end(refused, donors, recipe, text, tmp_path, command):
    err = refused(
        *commands("", recipe((donors["a"], 3), (donors["a"], 4)), text, tmp_path)[command]
    )
    assert "slices[0].sources[0].layer_range" in err and "[0, 4]" in err and "[3, 5]" in err


@pytest.mark.parametrize("command", ["check", "merge", "evaluate"])
@pytest.mark.parametrize("other, key", [("wide", "hidden_size"), ("g", "family")])
def test_donors_that_do_not_fit(refused, donors, recipe, text, tmp_path, command, other, key):
    assert key in refused(
        *commands("", recipe((donors["a"], 0), (donors[other], 1)), text, tmp_path)[command]
    )


@pytest.mark.parametrize("command", ["check", "merge", "evaluate"])
def test_a_recipe_that_is_not_there(refused, text, tmp_path, command):
    path = tmp_path / "none.yaml"
    assert str(path) in refused(*commands("", path, text, tmp_path)[command])


@pytest.mark.parametrize("command", ["check", "merge", "evaluate"])
@pytest.mark.parametrize("content", [b"", b"- 1", b"a: [", b"\xff\xfe", b"a: 1\na: 2\n"])
def test_a_file_that_is_no_recipe(refused, text, tmp_path, command, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert str(path) in refused(*commands("", path, text, tmp_path)[command])


# Outputs


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_an_output_that_is_there_already(refused, donors, recipe, tmp_path, kind, options):
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
        (output / "mine").touch()
    elif kind == "file":
        output.touch()
    else:
        output.symlink_to(tmp_path / "nowhere")
    assert str(output) in refused("merge", recipe((donors["a"], 0)), output, *options)


def test_an_output_inside_a_donor(refused, donors, recipe, tmp_path):
    donor = shutil.copytree(donors["a"], tmp_path / "donor")
    assert "outside the donors" in refused("merge", recipe((donor, 0)), donor / "out")


@pytest.mark.parametrize("command", ["analyze", "align", "plan"])
def test_an_output_below_a_file(refused, donors, alignment, tmp_path, command):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "x.safetensors"
    arguments = {
        "analyze": [donors["a"]],
        "align": [donors["a"], donors["b"]],
        "plan": [alignment],
    }[command]
    assert str(output) in refused(command, *arguments, "-o", output)


# Alignments and plans


@pytest.mark.parametrize("what", ["absent", "text", "weights", "atlas", "folder", "cut"])
def test_a_file_that_is_no_alignment(refused, run, donors, alignment, tmp_path, what):
    path = tmp_path / "x.alignment.safetensors"
    match what:
        case "text":
            path.write_text("no alignment")
        case "weights":
            shutil.copy(donors["a"] / "model.safetensors", path)
        case "atlas":
            assert run("analyze", donors["a"], "-o", path)[0] == 0
        case "folder":
            path.mkdir()
        case "cut":
            path.write_bytes(alignment.read_bytes()[:-1])
    err = refused("plan", path, "-o", tmp_path / "recipe.yaml")
    assert str(path) in err and "an alignment" in err


@pytest.mark.parametrize(
    "options",
    [
        ("--depth", 1),
        ("--depth", 100),
        ("--depth", 6, "--min-slice", 5),
        ("--depth", 3, "--protect-first", 4),
        ("--depth", 40, "--max-seams", 1),
    ],
)
def test_a_depth_that_no_recipe_has(refused, alignment, tmp_path, options):
    assert f"depth {options[1]}" in refused(
        "plan", alignment, "-o", tmp_path / "recipe.yaml", *options
    )


def test_donors_of_other_vocabularies_are_not_aligned(refused, donors, tmp_path):
    other = write_donor(tmp_path / "other", vocab_size=60)
    assert "vocabulary" in refused(
        "align", donors["a"], other, "-o", tmp_path / "x.alignment.safetensors"
    )


def test_a_context_that_a_donor_lacks(refused, donors, tmp_path):
    other = changed(
        donors["a"], tmp_path / "other", config=lambda config: config | {"bos_token_id": None}
    )
    assert "'bos'" in refused(
        "align", donors["a"], other, "--bos", "-o", tmp_path / "x.alignment.safetensors"
    )


# Texts


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\xfe\xfa"], ids=["absent", "empty", "no text"]
)
def test_a_file_that_is_no_text(refused, donors, tmp_path, content):
    path = tmp_path / "held-out.txt"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refused("evaluate", donors["a"], "--text", path)


# Usage


@pytest.mark.parametrize(
    "size", ["", "x", "0", "-5GB", "5 PB", "GB", "B", "1BB", "1e3", "0.1", "nan", "9" * 400]
)
def test_an_invalid_shard_size(refused, donors, recipe, tmp_path, size):
    assert "--shard-size" in refused(
        "merge", recipe((donors["a"], 0)), tmp_path / "out", "--shard-size", size
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("mrge",), "mrge"),
        (("--loud",), "--loud"),
        (("inspect",), "DONORS"),
        (("merge",), "RECIPE"),
        (("merge", "r.yaml"), "OUTPUT"),
        (("plan", "x"), "--output"),
        (("plan", "x", "-o", "y", "--depth", "many"), "--depth"),
        (("plan", "x", "-o", "y", "--depth", "0"), "--depth"),
        (("plan", "x", "-o", "y", "--top", "0"), "--top"),
        (("plan", "x", "-o", "y", "--on", "sampled", "--on", "text.txt"), "'sampled'"),
        (("plan", "x", "-o", "y", "--objective", "profit"), "--objective"),
        (("tune", "r.yaml"), "--output"),
        (("tune", "r.yaml", "-o", "y", "--per", "neuron"), "--per"),
        (("tune", "r.yaml", "-o", "y", "--steps", "0"), "--steps"),
        (("align", "a", "-o", "x"), "'B'"),
        (("evaluate", "a"), "--text"),
        (("evaluate", "a", "--text", "b", "--dtype", "int8"), "--dtype"),
        (("evaluate", "a", "--text", "b", "--context", "1"), "--context"),
    ],
)
def test_invalid_arguments(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
@pytest.mark.parametrize("command", ["analyze", "align", "evaluate"])
def test_a_device_that_is_not_there(refused, donors, text, tmp_path, command, device):
    assert device in refused(
        *commands(donors["a"], Path(), text, tmp_path)[
            command.replace("evaluate", "evaluate a donor")
        ],
        "--device",
        device,
    )


def test_errors_are_on_standard_error_with_json_too(refused, tmp_path):
    for arguments in (
        ["inspect", tmp_path / "x"],
        ["check", tmp_path / "x.yaml"],
        ["merge", tmp_path / "x.yaml", tmp_path / "out"],
    ):
        refused(*arguments, "--json")


def test_a_config_of_odd_values_does_not_stop_inspect(run, donors, tmp_path):
    odd = changed(
        donors["a"],
        tmp_path / "odd",
        config=lambda config: config | {"rms_norm_eps": None, "novelty": [1]},
    )
    code, out, _ = run("inspect", odd, donors["a"], "--json")
    assert code == 0 and json.loads(out)["spliceable"]


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": "x"},
        {"rope_theta": "x"},
        {"rope_scaling": [1]},
        {"layer_types": "x"},
        {"hidden_act": [1]},
    ],
)
def test_a_config_of_impossible_values_stops_inspect_with_a_message(run, donors, tmp_path, change):
    odd = changed(
        donors["a"],
        tmp_path / "odd",
        config=lambda config: config | {"rope_parameters": None} | change,
    )
    code, _, err = run("inspect", odd, donors["a"])
    assert code in (0, 2) and "Traceback" not in err
    assert code == 0 or all(word in err for word in WORDS)
