"""Healing that is killed at many points, and healing in two processes: the same weights."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import write_donor
from killed import tree
from relatives import noisy
from safetensors.numpy import load_file

KILLS = 20
KILLED = """
import os, signal, sys
from pathlib import Path
from frankenmerge.healing import tokens, training
from frankenmerge.workflows.healing import HealOptions, heal

recipe, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
tokens.FITTING, tokens.STOPPING, tokens.CONFIRMING = 48, 16, 16
calls, last = 0, -1
def counted(real):
    def call(*arguments, **named):
        global calls
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return real(*arguments, **named)
    return call
training._Descent.step = counted(training._Descent.step)
for name in ("fsync", "replace", "rename", "mkdir", "copy_file_range", "pwrite"):
    setattr(os, name, counted(getattr(os, name)))

def healed(output, point):
    global last
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    last = point
    output.parent.mkdir(exist_ok=True)
    heal(recipe, output, HealOptions(steps=60, control=True))
    (folder / "calls").write_text(str(calls))
    os._exit(0)

assert healed(folder / "whole" / "out", -1) == 0
total = int((folder / "calls").read_text())
for kill in range(kills):
    output = folder / str(kill) / "out"
    print(point := kill * total // kills, healed(output, point), output.exists())
    assert healed(output, -1) == 0
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A stack of a donor and a relative of it."""
    root = tmp_path_factory.mktemp("pair")
    one = write_donor(root / "one", seed=1)
    other = noisy(one, root / "other", 0.1, seed=2)
    slices = [
        {"sources": [{"model": str(model), "layer_range": part}]}
        for model, part in ((one, [0, 3]), (other, [1, 4]))
    ]
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    return path


def ran(*command) -> str:
    folder = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": folder}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_at_twenty_points_and_resumed_gives_the_same_bytes(recipe, tmp_path):
    """The points are spread evenly over steps and system calls, from the first to the last."""
    lines = ran("-c", KILLED, recipe, tmp_path, KILLS).splitlines()
    assert len({line.split()[0] for line in lines}) == KILLS
    assert [line.split()[1:] for line in lines] == [[str(-signal.SIGKILL), "False"]] * KILLS
    expected = tree(tmp_path / "whole")
    assert "out/model.safetensors" in expected
    for kill in range(KILLS):
        assert tree(tmp_path / str(kill)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["seams", "lora"])
def test_two_processes_give_the_figures_of_one(recipe, tmp_path, scope):
    launchers = {
        "one": ["-m"],
        "two": [
            *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--redirects", "3"),
            *("--log-dir", str(tmp_path / "logs"), "-m"),
        ],
    }
    printed = {}
    for name, launcher in launchers.items():
        command = ["frankenmerge", "heal", recipe, tmp_path / name, "--scope", scope]
        options = ["--steps", "25", "--control", "--device", "cpu", "--json"]
        printed[name] = ran(*launcher, *command, *options)
    first, second = sorted((tmp_path / "logs").rglob("stdout.log"))
    assert second.read_text() == ""
    one, two = json.loads(printed["one"]), json.loads(first.read_text())
    assert two["rate"] == one["rate"] and two["steps"] == one["steps"]
    for figure in ("before", "after", "best_donor", "control"):
        assert two[figure]["nats"] == pytest.approx(one[figure]["nats"], abs=1e-5)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in launchers)
    assert all(np.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
