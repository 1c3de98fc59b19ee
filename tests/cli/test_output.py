"""What the commands print as JSON, what they write, and what they import."""

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.artefacts.recipe_file import load_recipe

HEAVY = ("torch", "transformers", "accelerate")
ALONE = """
import json, sys
from frankenmerge.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as left:
        row = [left.code, [name for name in json.loads(sys.argv[2]) if name in sys.modules]]
        print(json.dumps(row), file=sys.stderr)
"""


def alone(*commands: list, heavy: tuple[str, ...] = HEAVY) -> list:
    """Run commands in one new process: for each, its exit status and the heavy modules imported."""
    lines = json.dumps([[str(argument) for argument in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", ALONE, lines, json.dumps(heavy)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]


@pytest.fixture
def recipe(donors, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    blocks = [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]
    path.write_text(recipe_of([Block(str(donors[name]), index) for name, index in blocks]).dump())
    return path


@pytest.fixture
def printed(run):
    """Run a command with --json and return the object it prints."""

    def call(*arguments: object) -> dict:
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        value = json.loads(out)
        assert isinstance(value, dict)
        return value

    return call


@pytest.fixture
def alignment(printed, donors, tmp_path) -> Path:
    printed("align", donors["a"], donors["b"], "-o", tmp_path / "ab.alignment.safetensors")
    return tmp_path / "ab.alignment.safetensors"


# Imports


def test_help_imports_nothing_heavy():
    commands = [
        "inspect",
        "analyze",
        "align",
        "plan",
        "check",
        "merge",
        "widen",
        "extract-lora",
        "evaluate",
        "report",
        "demo",
    ]
    assert (
        alone(["--help"], ["--version"], *([command, "--help"] for command in commands))
        == [[0, []]] * 13
    )


def test_commands_that_run_no_model_import_nothing_heavy(donors, recipe, alignment, tmp_path):
    commands = [
        ["inspect", donors["a"], donors["b"]],
        ["inspect", donors["deep"], "--json"],
        ["plan", alignment, "-o", tmp_path / "planned.yaml"],
        ["check", recipe],
        ["merge", recipe, tmp_path / "out", "--dry-run"],
        ["merge", recipe, tmp_path / "out"],
        ["report", tmp_path, "-o", tmp_path / "report.html"],
        ["extract-lora", donors["g"], donors["h"], tmp_path / "lora"],
        ["merge", recipe, tmp_path / "out"],
    ]
    assert alone(*commands) == [[0, []]] * 8 + [[2, []]]
    assert not alone(["merge", recipe, tmp_path / "again"], heavy=("matplotlib", "jinja2"))[0][1]


def test_without_a_command_the_way_from_donors_to_report_is_shown(run):
    code, out, _ = run()
    steps = [line.split()[1] for line in out.splitlines() if line.startswith("    frankenmerge ")]
    assert code == 0 and steps == ["inspect", "align", "plan", "evaluate", "merge", "report"]


def on_terminal(*arguments: object, **environment: str) -> tuple[str, str]:
    """Run a command on a terminal: (its standard output, what the terminal received).

    Standard error is the terminal; with ALL in the environment, standard output, too.
    """
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "frankenmerge", *map(str, arguments)]
    environment = (
        {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        | {"TERM": "xterm-256color"}
        | environment
    )
    done = subprocess.run(
        command,
        stdout=theirs if "ALL" in environment else subprocess.PIPE,
        stderr=theirs,
        text=True,
        check=True,
        env=environment,
    )
    os.close(theirs)
    received = b""
    try:
        while part := os.read(ours, 65536):
            received += part
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
    return done.stdout, received.decode()


@pytest.mark.slow
def test_quiet_shows_results_and_no_progress(recipe, text):
    (loud, progress), (quiet, nothing) = (
        on_terminal("evaluate", recipe, "--text", text, *more) for more in ((), ("--quiet",))
    )
    assert loud == quiet and "bits/byte" in quiet
    assert "1 of 3: " in progress and nothing == ""


def test_no_color_is_honoured(donors):
    coloured, plain = (
        on_terminal("inspect", donors["a"], donors["b"], ALL="1", **more)[1]
        for more in ({}, {"NO_COLOR": "1"})
    )
    green = "\x1b[1;32mThese can be spliced."
    assert green in coloured and green not in plain and "These can be spliced." in plain


def test_shells_complete_the_commands(run, monkeypatch):
    for name, value in (
        ("_FRANKENMERGE_COMPLETE", "bash_complete"),
        ("COMP_WORDS", "frankenmerge re"),
        ("COMP_CWORD", "1"),
    ):
        monkeypatch.setenv(name, value)
    assert run()[:2] == (0, "plain,report\n")


def test_help_names_every_command(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for command in (
        "inspect",
        "analyze",
        "align",
        "plan",
        "check",
        "merge",
        "widen",
        "extract-lora",
        "evaluate",
        "demo",
    ):
        assert f"\n  {command} " in out.replace("frankenmerge ", "")


# JSON


def test_inspect_describes_a_donor(printed, donors):
    (donor,) = printed("inspect", donors["b"])["donors"]
    expected = {
        "name": str(donors["b"]),
        "family": "llama",
        "blocks": 4,
        "width": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_width": 4,
        "inner": 24,
        "vocabulary": 48,
        "positions": 64,
        "tied": True,
        "dtype": "F32",
    }
    assert {key: donor[key] for key in expected} == expected
    assert (
        donor["bytes"]
        == 4 * donor["parameters"]
        == 4 * (48 * 16 + 4 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24 + 2 * 16) + 16)
    )


def test_inspect_reports_whether_donors_can_be_spliced(printed, donors):
    both = printed("inspect", donors["a"], donors["b"])
    assert both.keys() >= {"donors", "spliceable", "reasons"}
    assert (both["spliceable"], both["reasons"], len(both["donors"])) == (True, [], 2)
    other = printed("inspect", donors["a"], donors["b"], donors["wide"])
    assert other["spliceable"] is False
    pairs = [f"{donors[first]} | {donors['wide']}: hidden_size: 16 and 32" for first in "ab"]
    assert set(pairs) <= set(other["reasons"]) and not any(
        str(donors["b"]) in reason and str(donors["a"]) in reason for reason in other["reasons"]
    )


def test_analyze_reports_what_it_wrote(printed, donors, tmp_path):
    output = tmp_path / "a.atlas.safetensors"
    value = printed("analyze", donors["a"], "-o", output)
    assert (value["output"], value["blocks"], value["width"], value["vocabulary"]) == (
        str(output),
        4,
        16,
        48,
    )
    assert output.is_file()


def test_align_reports_its_scores(printed, donors, tmp_path):
    value = printed(
        "align", donors["a"], donors["deep"], "-o", tmp_path / "x.alignment.safetensors"
    )
    assert (value["donors"], value["blocks"], value["widths"]) == (
        [str(donors["a"]), str(donors["deep"])],
        [4, 6],
        [16, 16],
    )
    assert value["scores"]
    for name, score in value["scores"].items():
        assert [len(row) for row in score["matrix"]] == [7] * 5
        assert score["nulls"] or name in {"influence", "distance", "relative_depth"}


def test_plan_reports_its_recipes_and_writes_them(printed, donors, alignment, tmp_path):
    output = tmp_path / "planned.yaml"
    value = printed("plan", alignment, "-o", output, "--depth", 6, "--top", 3)
    assert len(value["plans"]) == 3
    for plan, path in zip(
        value["plans"],
        [output, tmp_path / "planned.2.yaml", tmp_path / "planned.3.yaml"],
        strict=True,
    ):
        assert plan.keys() >= {"recipe", "depth", "predicted_damage", "seams"}
        recipe = load_recipe(path)
        assert yaml.safe_load(path.read_text()) == plan["recipe"]
        assert plan["depth"] == len(recipe.blocks) == 6
        assert set(recipe.donors) == {str(donors["a"]), str(donors["b"])}
        pairs = [[seam["after"], seam["before"]] for seam in plan["seams"]]
        assert pairs == [
            [{"model": block.model, "block": block.index} for block in seam]
            for seam in recipe.seams
        ]
        assert all(seam["scores"] for seam in plan["seams"])
        low, high = plan["interval"]
        assert low <= plan["predicted_damage"] <= high
    damages = [plan["predicted_damage"] for plan in value["plans"]]
    assert damages == sorted(damages)
    evidence = json.loads((tmp_path / "planned.evidence.json").read_text())
    assert evidence["plans"] == value["plans"]


def test_check_and_merge_report_the_same_sizes(printed, recipe, tmp_path):
    checked = printed("check", recipe)
    planned = printed("merge", recipe, tmp_path / "out", "--dry-run")
    assert not (tmp_path / "out").exists()
    merged = printed("merge", recipe, tmp_path / "out")
    assert checked == planned
    assert (checked["depth"], checked["tensors"], checked["parameters"]) == (
        6,
        6 * 9 + 3,
        checked["bytes"] // 4,
    )
    assert checked["remarks"] == merged["remarks"] == []
    expected = {"output", "tensors", "bytes", "seconds", "computed", "kept", "remarks"}
    assert merged.keys() == expected
    assert (merged["output"], merged["tensors"], merged["bytes"]) == (
        str(tmp_path / "out"),
        checked["tensors"],
        checked["bytes"],
    )
    assert printed("inspect", tmp_path / "out")["donors"][0]["bytes"] == merged["bytes"]


@pytest.mark.parametrize(
    "size, files",
    [
        *(("5GB", 1), ("10kB", 6), ("0.01MB", 6), ("10000", 6)),
        # As mergekit spells sizes: B is 10^9 bytes, and k, M, G need no B.
        *(("1B", 1), ("0.00001B", 6), ("0.00001 b", 6), ("10k", 6), ("0.01M", 6), ("0.00001G", 6)),
    ],
)
def test_a_shard_size_is_read_with_its_unit(printed, recipe, tmp_path, size, files):
    printed("merge", recipe, tmp_path / "out", "--shard-size", size)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == files


def test_evaluate_reports_the_same_for_a_recipe_and_its_checkpoint(
    printed, donors, recipe, text, tmp_path
):
    printed("merge", recipe, tmp_path / "out")
    models = printed("evaluate", recipe, tmp_path / "out", "--text", text)["models"]
    assert [(model["name"], model["role"]) for model in models] == [
        (str(recipe), "recipe"),
        (str(tmp_path / "out"), "model"),
        (str(donors["a"]), "donor"),
        (str(donors["b"]), "donor"),
    ]
    figures = [
        [model[key] for key in ("bits_per_byte", "perplexity", "nats_per_token", "tokens")]
        for model in models
    ]
    assert figures[0] == figures[1] and figures[2] != figures[3]
    assert {row[3] for row in figures} == {len(text.read_text())}


def test_tables_are_at_most_eighty_columns_wide_where_there_is_no_terminal(
    run, donors, recipe, alignment, text, tmp_path
):
    for arguments in (
        ["inspect", donors["a"], donors["b"]],
        ["plan", alignment, "-o", tmp_path / "p.yaml"],
        ["check", recipe],
    ):
        code, out, err = run(*arguments)
        assert code == 0 and err == ""
        tables = [line for line in out.splitlines() if "│" in line or "┃" in line]
        assert tables and max(map(len, tables)) <= 80


# Relative names


def test_a_recipe_planned_with_relative_names_is_merged_from_elsewhere(
    printed, donors, tmp_path, monkeypatch
):
    for name in "ab":
        shutil.copytree(donors[name], tmp_path / "work" / name)
    monkeypatch.chdir(tmp_path / "work")
    printed("align", "a", "b", "-o", "ab.alignment.safetensors")
    printed("plan", "ab.alignment.safetensors", "-o", "recipe.yaml", "--depth", 6)
    monkeypatch.chdir(tmp_path)
    printed("merge", "work/recipe.yaml", "out")
    assert set(load_recipe(tmp_path / "work" / "recipe.yaml").donors) == {
        str(tmp_path / "work" / name) for name in "ab"
    }
    tensors = json.loads((tmp_path / "out" / "frankenmerge.json").read_text())["tensors"]
    assert {origin["donor"] for origin in tensors.values()} == {"work/a", "work/b"}
