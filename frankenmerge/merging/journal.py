"""The work folder in which an output grows: locked by one merge, and resumable after a kill.

It holds `journal.json`, which says what the merge is made of, files `SHARD.writing`, and in
`checkpoint/` what is finished: a shard is synced before it is moved there, so that being there
means being whole. `checkpoint/` becomes the output.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from frankenmerge.distributed import Rank
from frankenmerge.errors import FrankenmergeError, fail
from frankenmerge.merging.shards import Shard

JOURNAL, GROWING = "journal.json", "checkpoint"
PATIENCE = 60.0
"""Seconds that other processes of a merge wait for the first one to begin."""
PAUSE = 0.05
"""Seconds between two checks of what another process does."""
_LONGEST = 255


def work_folder(output: Path) -> Path:
    """Where the checkpoint `output` grows: next to it, under a name that follows from its own."""
    name = f".{output.name}.partial"
    if len(os.fsencode(name)) > _LONGEST:
        name = f".{hashlib.sha256(os.fsencode(output.name)).hexdigest()}.partial"
    return output.absolute().parent / name


@contextmanager
def workplace(output: Path, *, resume: bool) -> Iterator[Path]:
    """Lock the work folder of `output` for this merge alone.

    When the merge fails the folder is removed, unless `resume` asks to keep what is finished.
    Raises FrankenmergeError where another merge holds it or has finished, or where an unfinished
    one is there that was not to be resumed.
    """
    made = [parent for parent in output.absolute().parents if not parent.exists()]
    folder = work_folder(output)
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        handle = _occupied(folder, resume)
        try:
            if output.is_dir() and any(output.iterdir()):
                with suppress(OSError):  # an earlier merge has left something in it
                    folder.rmdir()
                found, remedy = (
                    "one that has finished meanwhile",
                    "choose another output, or move that one away",
                )
                raise fail(str(output), "no other merge into this output", found, remedy)
            (folder / GROWING).mkdir(exist_ok=True)
            yield folder
        except BaseException:
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)
    finally:
        for parent in made:
            with suppress(OSError):  # it holds the result, or is not there
                parent.rmdir()


def _occupied(folder: Path, resume: bool) -> int:
    """Make or find the folder and lock it; returns the handle that holds the lock."""
    deadline = time.monotonic() + 10 * PAUSE
    while time.monotonic() < deadline:
        try:
            folder.mkdir()
            new = True
        except FileExistsError:
            new = False
        with suppress(FileNotFoundError):  # the merge that held it has ended meanwhile
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _locked(handle) and os.path.samestat(os.fstat(handle), folder.stat()):
                    if not new and not resume and (left := _unfinished(folder)):
                        remedy = f"finish it with --resume, or remove {folder}"
                        raise fail(str(folder), "no unfinished merge", left, remedy)
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
        time.sleep(PAUSE)
    raise fail(
        str(folder),
        "no other merge into this output",
        "one that is running",
        "wait for it, or choose another output",
    )


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Network file systems that lock no folders; that the folder is there still stops a second
        # merge.
        if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOTSUP):
            raise
    return True


def _unfinished(folder: Path) -> str | None:
    """What is left of an earlier merge, in words; None where that is nothing."""
    if not (folder / GROWING).is_dir():
        return None
    shards = _read(folder).get("shards", [])
    finished = sum((folder / GROWING / name).is_file() for name in shards)
    return f"an unfinished merge: {finished} of {len(shards)} shards are finished"


def _read(folder: Path) -> dict:
    try:
        journal = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return journal if isinstance(journal, dict) else {}


def begin(folder: Path, inputs: Mapping[str, str], shards: Sequence[str]) -> None:
    """Write the journal, or compare the one that is there with this merge.

    `inputs` names everything that the bytes depend on, each with a hash, `shards` the files of
    weights. Raises FrankenmergeError where a merge of other inputs was left unfinished.
    """
    journal = _read(folder)
    if not journal:
        # Without its journal it is unknown what the finished shards are made of.
        shutil.rmtree(folder / GROWING)
        (folder / GROWING).mkdir()
        write_synced(
            folder / JOURNAL,
            json.dumps({"inputs": dict(inputs), "shards": list(shards)}).encode(),
        )
        return
    _agree(folder, journal, inputs)


def _agree(folder: Path, journal: dict, inputs: Mapping[str, str]) -> None:
    before = journal.get("inputs", {})
    if other := [name for name in {**before, **inputs} if before.get(name) != inputs.get(name)]:
        raise fail(
            str(folder),
            "an unfinished merge of the same inputs",
            f"another {', another '.join(other)}",
            f"merge as before to resume, or remove {folder} to start over",
        )


def joined(output: Path, inputs: Mapping[str, str]) -> Path | None:
    """Wait for the work folder that the first process of this merge holds.

    Returns None where that has finished already. Raises FrankenmergeError where it does not begin,
    or merges something else.
    """
    folder, deadline = work_folder(output), time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if (journal := _read(folder)) and is_held(folder):
            _agree(folder, journal, inputs)
            return folder
        if output.exists() and any(output.iterdir()):
            return None
        time.sleep(PAUSE)
    raise fail(
        str(folder),
        "the work folder of the first process (RANK 0)",
        "none",
        "start all processes of the merge together",
    )


def is_held(folder: Path) -> bool:
    """Whether a merge holds the work folder."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def is_finished(folder: Path, shard: Shard) -> bool:
    """Whether a shard is whole."""
    path = folder / GROWING / shard.name
    return path.is_file() and path.stat().st_size == shard.bytes


def write_shards(
    folder: Path, shards: Sequence[Shard], fill: Callable[[Shard, int], None], rank: Rank
) -> Iterator[Shard]:
    """Have every shard written, and yield each that is finished once.

    `fill` writes a shard to a file that has its size. Processes share the shards by locking them,
    each beginning with its own; those of a process that ends are taken over, and the first process
    stays until all are there.
    """
    missing = sorted(
        shards,
        key=lambda shard: ((shards.index(shard) - rank.number) % rank.count, shards.index(shard)),
    )
    while missing:
        for shard in list(missing):
            if is_finished(folder, shard) or _written(folder, shard, fill):
                missing.remove(shard)
                yield shard
        if not rank.first:
            return
        if missing:
            time.sleep(PAUSE)


def _written(folder: Path, shard: Shard, fill: Callable[[Shard, int], None]) -> bool:
    """Write one shard, unless another process is writing it."""
    path = folder / f"{shard.name}.writing"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not is_finished(
            folder, shard
        ):  # nor did another process finish it before the lock was had
            os.truncate(handle, 0)
            os.truncate(handle, shard.bytes)
            fill(shard, handle)
            os.fsync(handle)
            path.rename(folder / GROWING / shard.name)
        return True
    finally:
        os.close(handle)


def finish(folder: Path, output: Path, contents: Mapping[str, bytes]) -> None:
    """Write the small files by their names in the output, and move what has grown to its place."""
    grown = folder / GROWING
    for name, content in contents.items():
        (grown / name).parent.mkdir(exist_ok=True)
        write_synced(grown / name, content)
    for parent in {(grown / name).parent for name in contents}:
        sync(parent)
    grown.rename(output)
    sync(output.absolute().parent)


def unwritable(output: Path, error: OSError, *, resume: bool) -> FrankenmergeError:
    """The error of an output that could not be written to its end."""
    left = f"finished shards are kept in {work_folder(output)}" if resume else "no files were left"
    expected = "disk space and permission to write the checkpoint"
    return fail(str(output), expected, str(error), f"fix this and merge again; {left}")


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file and wait until the disk has it."""
    with path.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def sync(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
