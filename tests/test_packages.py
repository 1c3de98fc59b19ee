"""What `make wheel` builds computes in C where there is no compiler."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built from its sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    assert len(list(folder.glob("*.tar.gz"))) == 1
    return found


@pytest.mark.slow
def test_a_wheel_has_the_extension_and_every_file_that_is_read(wheel):
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    assert "frankenmerge/splicing/methods/_native.abi3.so" in names
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "frankenmerge").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert sources <= names
    assert not any(name.startswith(("tests/", "evals/")) for name in names)


@pytest.mark.slow
def test_installed_without_a_compiler_it_computes_in_c(wheel, donors, tmp_path):
    site, recipe, output = tmp_path / "site", tmp_path / "r.yaml", tmp_path / "out"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    environment = {
        "PATH": "",  # no compiler
        "PYTHONPATH": os.pathsep.join([str(site), sysconfig.get_paths()["purelib"]]),
        "HOME": str(tmp_path),
    }
    models = [{"model": str(donors[name]), "parameters": {"weight": 1}} for name in ("a", "b")]
    recipe.write_text(json.dumps({"merge_method": "linear", "models": models}))
    for command in (
        [*install, site, wheel],
        ["-m", "frankenmerge", "merge", recipe, output, "--json"],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    assert "C extension" not in done.stderr
    record = json.loads((output / "frankenmerge.json").read_text())
    assert record["arithmetic"] == ["C"]
