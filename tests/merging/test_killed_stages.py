"""A merge of several stages that is killed is finished with the same bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from killed import tree

STAGES = """\
name: one
merge_method: dare_ties
base_model: A
models: [{model: B}]
parameters: {weight: 0.5, density: 0.5}
---
merge_method: slerp
base_model: A
models: [{model: one}]
tokenizer_source: model:one
parameters: {t: 0.25}
"""

KILLED = """
import os, signal, sys
left = int(sys.argv.pop(1))
def counted(real):
    def call(*arguments, **named):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*arguments, **named)
    return call
for name in ("fsync", "copy_file_range", "pwrite", "rename", "truncate", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
from frankenmerge.cli import main
try:
    main()
finally:
    print("left", left, file=sys.stderr)
"""


@pytest.mark.slow
def test_a_merge_of_stages_killed_in_any_of_them_is_finished_with_the_same_bytes(donors, tmp_path):
    path, changed_path = tmp_path / "r.yaml", tmp_path / "s.yaml"
    text = STAGES.replace("A", str(donors["a"])).replace("B", str(donors["b"]))
    path.write_text(text)
    changed_path.write_text(text.replace("density: 0.5", "density: 0.75"))

    def merge(recipe: Path, folder: Path, after: int) -> subprocess.CompletedProcess:
        folder.mkdir(exist_ok=True)
        # Relative, since the names of outputs are part of what is written of stages.
        command = [
            sys.executable,
            "-c",
            KILLED,
            str(after),
            "merge",
            str(recipe),
            "out",
            "--resume",
            "--shard-size",
            "20kB",
        ]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    done = merge(path, tmp_path / "whole", 10**6)
    assert done.returncode == 0, done.stderr
    whole, calls = tree(tmp_path / "whole" / "out"), 10**6 - int(done.stderr.split()[-1])
    stage = tree(tmp_path / "whole" / "out.stages" / "one")
    assert calls > 60
    reached = set()
    for after in range(5, calls, calls // 5):
        folder = tmp_path / f"killed{after}"
        assert merge(path, folder, after).returncode == -signal.SIGKILL
        reached.add((folder / "out.stages" / "one").is_dir())
        done = merge(path, folder, 10**6)
        assert done.returncode == 0, done.stderr
        assert tree(folder / "out") == whole and tree(folder / "out.stages" / "one") == stage
        assert sorted(entry.name for entry in folder.iterdir()) == ["out", "out.stages"]
    assert reached == {False, True}
    # A stage that is there and must be made again: the rest of the old one does not
    # prevent that, and does not stay.
    folder = tmp_path / "whole"
    (folder / "out").rename(folder / "before")
    for after in (
        2,
        3,
        4,
        10,
        10**6,
    ):  # the first calls remove what was written to check the recipe
        assert merge(changed_path, folder, after).returncode == (
            0 if after == 10**6 else -signal.SIGKILL
        )
    assert (
        os.listdir(folder / "out.stages") == ["one"]
        and tree(folder / "out.stages" / "one") != stage
    )
