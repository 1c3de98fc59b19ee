"""Merges that are killed or fail: what is left, what is resumed, and the same bytes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import meter, written
from killed import KILLED, finished, half_done, killed, refused, tree

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging.journal import work_folder


def test_a_merge_killed_at_any_call_is_finished_by_resume_with_the_same_bytes(
    recipe, whole, tmp_path, room
):
    undisturbed = killed(tmp_path, room / "count", 10**6)
    calls = 10**6 - int(undisturbed.stdout.split()[-1])
    assert calls > 40
    numbers = set()
    for after in [*range(0, calls, max(1, calls // 12)), calls - 2, calls - 1]:
        output = room / f"out{after}"
        assert killed(tmp_path, output, after).returncode == -signal.SIGKILL
        if output.exists():  # all but the last syncs of folders was done
            assert after >= calls - 2 and tree(output) == whole
            continue
        before = finished(work_folder(output) / "checkpoint")
        result = written(recipe, output, shard_size=6000, resume=True)
        assert tree(output) == whole
        assert result.kept == len(before) and before.items() <= finished(output).items()
        assert not work_folder(output).exists()
        numbers.add(result.kept)
    assert len(numbers) > 4


def test_a_merge_killed_again_and_again_comes_to_its_end(recipe, whole, tmp_path, room):
    for _ in range(40):
        done = killed(tmp_path, room / "out", 12, "resume")
        if done.returncode == 0:
            break
    assert tree(room / "out") == whole and os.listdir(room) == ["out"]


def test_what_is_left_is_reported_and_left_alone_without_resume(recipe, tmp_path, room):
    work = half_done(tmp_path, room / "out")
    count, before = len(finished(work / "checkpoint")), tree(room)
    (fault,) = refused(recipe, room / "out")
    assert fault.place == str(work) and "--resume" in fault.remedy and str(work) in fault.remedy
    shards = len(json.loads((work / "journal.json").read_text())["shards"])
    assert f"{count} of {shards} shards are finished" in fault.found and 0 < count < shards
    assert tree(room) == before


def test_resume_without_anything_left_begins_anew(recipe, whole, room):
    assert written(recipe, room / "out", shard_size=6000, resume=True).kept == 0
    assert tree(room / "out") == whole


def other_recipe(recipe, donors, tmp_path):
    return recipe_of([*recipe.blocks[:-1], Block(str(donors["a"]), 2)]), {}


def other_donor(recipe, donors, tmp_path):
    from conftest import changed

    changed(
        donors["a"],
        tmp_path / "changed",
        lambda arrays: {name: array + 1 for name, array in arrays.items()},
    )
    shutil.copytree(tmp_path / "changed", donors["a"], dirs_exist_ok=True)
    return recipe, {}


def other_size(recipe, donors, tmp_path):
    return recipe, {"shard_size": 7000}


@pytest.mark.parametrize(
    "other, reason",
    [(other_recipe, "recipe"), (other_donor, "donor"), (other_size, "plan of shards")],
)
def test_resume_with_other_inputs_is_refused_with_the_reason(donors, tmp_path, room, other, reason):
    mine = {
        name: Path(shutil.copytree(donors[name], tmp_path / "mine" / name))
        for name in ("a", "deep")
    }
    recipe = recipe_of(
        [
            Block(str(mine[name]), index)
            for name, index in (("a", 0), ("a", 1), ("deep", 1), ("deep", 5), ("a", 3))
        ]
    )
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    work = half_done(tmp_path, room / "out")
    before = tree(room)
    changed, options = other(recipe, mine, tmp_path)
    (fault,) = refused(changed, room / "out", resume=True, **options)
    assert fault.place == str(work) and f"another {reason}" in fault.found
    assert tree(room) == before


@pytest.mark.parametrize("content", [b"", b"[]", b"{", None])
def test_a_work_folder_without_its_journal_is_begun_anew(recipe, whole, tmp_path, room, content):
    work = half_done(tmp_path, room / "out")
    (work / "journal.json").unlink() if content is None else (work / "journal.json").write_bytes(
        content
    )
    for file in (work / "checkpoint").glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    assert "--resume" in refused(recipe, room / "out")[0].remedy
    assert written(recipe, room / "out", shard_size=6000, resume=True).kept == 0
    assert tree(room / "out") == whole


def test_a_finished_shard_of_another_size_is_written_again(recipe, whole, tmp_path, room):
    work = half_done(tmp_path, room / "out")
    file = min((work / "checkpoint").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    written(recipe, room / "out", shard_size=6000, resume=True)
    assert tree(room / "out") == whole


def test_progress_counts_what_was_kept_too(recipe, whole, tmp_path, room):
    half_done(tmp_path, room / "out")
    moved = []
    result = written(
        recipe,
        room / "out",
        shard_size=6000,
        resume=True,
        progress=meter(moved.append),
    )
    assert sum(moved) == result.bytes


@pytest.mark.parametrize("kind", ["disk full", "interrupt"])
def test_what_is_finished_is_kept_when_a_merge_to_be_resumed_fails(
    recipe, whole, room, monkeypatch, kind
):
    real, left = os.copy_file_range, iter(range(8))

    def fails(*arguments):
        if next(left, None) is not None:
            return real(*arguments)
        raise (
            OSError(errno.ENOSPC, "No space left on device")
            if kind == "disk full"
            else KeyboardInterrupt
        )

    with monkeypatch.context() as patched:
        patched.setattr(os, "copy_file_range", fails)
        if kind == "disk full":
            real_write = os.pwrite
            patched.setattr(
                os,
                "pwrite",
                lambda handle, content, at: real_write(handle, content, at) if at == 0 else fails(),
            )
        with pytest.raises((FrankenmergeError, KeyboardInterrupt)) as caught:
            written(recipe, room / "out", shard_size=6000, resume=True)
    if kind == "disk full":
        assert "No space left" in str(caught.value) and str(work_folder(room / "out")) in str(
            caught.value
        )
    assert not (room / "out").exists()
    kept = finished(work_folder(room / "out") / "checkpoint")
    assert kept
    written(recipe, room / "out", shard_size=6000, resume=True)
    assert kept.items() <= finished(room / "out").items() and tree(room / "out") == whole


def test_a_limit_of_the_system_on_the_size_of_files_is_reported(recipe, tmp_path, room):
    import resource

    script = KILLED.replace(
        "left = int",
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\nleft = int",
    )
    command = [
        sys.executable,
        "-c",
        script,
        str(tmp_path / "recipe.yaml"),
        str(room / "out"),
        str(10**6),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert resource.RLIM_INFINITY and done.returncode == 1
    assert "File too large" in done.stderr and "remedy" in done.stderr
    assert not list(room.iterdir())


def test_a_disk_that_is_really_full_is_reported_and_left_as_it_was(donors, tmp_path):
    room = tmp_path / "small"
    room.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(room)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")
    try:
        recipe = recipe_of([Block(str(donors["a"]), index) for index in (0, 1, 2, 3, 2, 1)])
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("frankenmerge.merging.output.SPARE", -(1 << 30))
            (fault,) = refused(recipe, room / "out")
        assert "No space left" in fault.found and not list(room.iterdir())
        (fault,) = refused(recipe, room / "out")
        assert "free disk space" in fault.expected and not list(room.iterdir())
    finally:
        subprocess.run(["umount", str(room)], check=True)
