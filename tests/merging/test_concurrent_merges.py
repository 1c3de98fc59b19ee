"""Merges at the same time: of one output, of several, and one shared by processes."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import meter, written
from killed import finished, half_done, refused, tree

from frankenmerge.distributed import Rank
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging import journal, writer
from frankenmerge.merging.journal import work_folder

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
    """Run `merge` in processes numbered as `accelerate launch` does, the first one last."""
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
