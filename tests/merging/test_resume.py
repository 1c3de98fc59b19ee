"""Merges that are killed, fail or coincide: what is left, what is resumed, and the same bytes."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import meter, written

from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.distributed import Rank
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging import journal, writer
from frankenmerge.merging.journal import work_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.merging.write_plan import MergeOptions
from frankenmerge.merging.writer import merge
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.resolve import resolve

left = int(sys.argv[3])
def counted(real):
    def call(*arguments, **named):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*arguments, **named)
    return call
for name in ("fsync", "copy_file_range", "pwrite", "rename", "truncate"):
    setattr(os, name, counted(getattr(os, name)))
recipe = load_recipe(Path(sys.argv[1]))
options = MergeOptions(shard_size=6000, resume=len(sys.argv) > 4)
merge(resolve(recipe, open_donors(recipe)), Path(sys.argv[2]), options)
print("left", left)
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def recipe(donors, tmp_path) -> Recipe:
    made = recipe_of(
        [
            Block(str(donors[name]), index)
            for name, index in (("a", 0), ("a", 1), ("deep", 1), ("deep", 5), ("a", 3))
        ]
    )
    (tmp_path / "recipe.yaml").write_text(made.dump())
    return made


@pytest.fixture
def whole(recipe, tmp_path) -> dict[str, bytes]:
    """The undisturbed result."""
    written(recipe, tmp_path / "whole", shard_size=6000)
    return tree(tmp_path / "whole")


@pytest.fixture
def room(tmp_path) -> Path:
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


def killed(tmp_path: Path, output: Path, after: int, *more: str) -> subprocess.CompletedProcess:
    """Merge in another process that is killed after so many calls of the system."""
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(tmp_path / "recipe.yaml"),
        str(output),
        str(after),
        *more,
    ]
    return subprocess.run(command, capture_output=True, text=True)


def half_done(tmp_path: Path, output: Path) -> Path:
    """Kill a merge in the middle and return its work folder."""
    assert killed(tmp_path, output, 25).returncode == -signal.SIGKILL
    assert any((work_folder(output) / "checkpoint").glob("*.safetensors"))
    return work_folder(output)


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """The finished shards, each with what changes when it is written again."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.glob("*.safetensors")
    }


def refused(recipe: Recipe, output: Path, **options):
    with pytest.raises(FrankenmergeError) as caught:
        written(recipe, output, **{"shard_size": 6000} | options)
    return caught.value.faults


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


# Two at a time


def test_a_second_merge_into_one_output_is_refused_while_the_first_runs(recipe, whole, room):
    refusals = []

    def meanwhile(_moved):
        if not refusals:
            for resume in (False, True):
                refusals.extend(refused(recipe, room / "out", resume=resume))

    written(recipe, room / "out", shard_size=6000, progress=meter(meanwhile))
    assert [fault.found for fault in refusals] == ["one that is running"] * 2
    assert tree(room / "out") == whole and os.listdir(room) == ["out"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_merge_whose_output_another_finished_meanwhile_is_refused_before_it_writes(
    recipe, whole, room, monkeypatch, resume
):
    real, moved = writer.planned, []

    def overtaken(*arguments, **named):
        plan = real(*arguments, **named)
        monkeypatch.setattr(writer, "planned", real)
        written(recipe, room / "out", shard_size=6000)
        return plan

    monkeypatch.setattr(writer, "planned", overtaken)
    (fault,) = refused(recipe, room / "out", resume=resume, progress=meter(moved.append))
    assert fault.found == "one that has finished meanwhile" and not moved
    assert tree(room / "out") == whole and os.listdir(room) == ["out"]


def test_outputs_of_other_names_are_merged_at_the_same_time(recipe, whole, room):
    done = []

    def meanwhile(_moved):
        if not done:
            done.append(True)
            written(recipe, room / "other", shard_size=6000)

    written(recipe, room / "out", shard_size=6000, progress=meter(meanwhile))
    assert tree(room / "out") == tree(room / "other") == whole


def test_a_link_in_place_of_the_work_folder_is_not_followed(recipe, tmp_path, room):
    (tmp_path / "elsewhere").mkdir()
    work_folder(room / "out").symlink_to(tmp_path / "elsewhere")
    refused(recipe, room / "out", resume=True)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_folder_that_locks_cannot_be_had_of_is_still_made_once(
    recipe, whole, tmp_path, room, monkeypatch
):
    real = fcntl.flock

    def unable(handle, operation):
        if Path(os.readlink(f"/proc/self/fd/{handle}")).is_dir():
            raise OSError(errno.EBADF, "Bad file descriptor")
        return real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", unable)
    written(recipe, room / "out", shard_size=6000)
    assert tree(room / "out") == whole
    half_done(tmp_path, room / "again")
    assert "unfinished" in refused(recipe, room / "again")[0].found


# Several processes


def together(
    tmp_path: Path, output: Path, count: int, *options: str, delay: float = 0
) -> list[subprocess.CompletedProcess]:
    """Run `merge` in processes that are numbered as `accelerate launch` numbers them, the first one last."""
    command = [
        sys.executable,
        "-m",
        "frankenmerge.cli",
        "merge",
        str(tmp_path / "recipe.yaml"),
        str(output),
        "--shard-size",
        "6000",
    ]
    command[1:3] = ["-c", "from frankenmerge.cli import main; main()"]
    running = []
    for rank in reversed(range(count)):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(rank),
        }
        running.append(
            subprocess.Popen(
                [*command, *options],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        time.sleep(delay)
    outputs = [one.communicate(timeout=120) for one in running]
    return [
        subprocess.CompletedProcess(one.args, one.returncode, *texts)
        for one, texts in zip(running, outputs, strict=True)
    ]


@pytest.mark.parametrize("count, delay", [(2, 0), (3, 0.3)])
def test_several_processes_write_the_bytes_that_one_writes(
    recipe, whole, tmp_path, room, count, delay
):
    done = together(tmp_path, room / "out", count, delay=delay)
    assert [one.returncode for one in done] == [0] * count, done
    assert [bool(one.stdout) for one in done] == [False] * (count - 1) + [True]
    assert tree(room / "out") == whole and os.listdir(room) == ["out"]


def test_processes_resume_together(recipe, whole, tmp_path, room):
    work = half_done(tmp_path, room / "out")
    before = finished(work / "checkpoint")
    done = together(tmp_path, room / "out", 2, "--resume")
    assert [one.returncode for one in done] == [0, 0], done
    assert before.items() <= finished(room / "out").items() and tree(room / "out") == whole


def test_shards_of_a_process_that_ends_are_taken_over(recipe, whole, room):
    plan = []
    real = journal.write_shards

    def others_first(folder, shards, fill, rank):
        # another process began a shard, and was killed
        (folder / f"{shards[0].name}.writing").write_bytes(b"torn")
        plan.extend(shards)
        return real(folder, shards, fill, rank)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("frankenmerge.merging.writer.write_shards", others_first)
        written(recipe, room / "out", shard_size=6000)
    assert len(plan) > 3 and tree(room / "out") == whole


def test_a_process_whose_first_one_does_not_begin_says_so(recipe, room, monkeypatch):
    monkeypatch.setattr(journal, "PATIENCE", 0.2)
    with pytest.raises(FrankenmergeError, match="RANK 0"):
        written(recipe, room / "out", rank=Rank(1, 2))
    assert not list(room.iterdir())
