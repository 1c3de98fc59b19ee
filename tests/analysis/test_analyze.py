"""An analysis that is interrupted, shared out or larger than memory ends with the same atlas."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_donor

from frankenmerge.analysis import analyze as module
from frankenmerge.analysis.analyze import analyze, cached_analyze
from frankenmerge.artefacts.atlas import Atlas, load_atlas
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.passes import Passage
from frankenmerge.models.streaming import Streamed


def assert_same(found: Atlas, expected: Atlas) -> None:
    assert list(found.top) == list(expected.top)
    for context, top in expected.top.items():
        assert (found.top[context].tokens == top.tokens).all()
        assert found.top[context].values.tobytes() == top.values.tobytes()
    assert found.probes.tobytes() == expected.probes.tobytes()
    assert found.probe_scale.tobytes() == expected.probe_scale.tobytes()


class Stop(Exception):
    """Stands for Ctrl-C."""


def stop_in(monkeypatch, block: int) -> list[int]:
    """Make the analysis stop in the middle of `block`; returns the list of started blocks."""
    begun = []
    original = Passage.through

    def through(self, index, module):
        if begun[-1:] != [index]:
            begun.append(index)
        for output in original(self, index, module):
            yield output
            if index == block:
                raise Stop

    monkeypatch.setattr(Passage, "through", through)
    return begun


@pytest.mark.parametrize("block", [1, 2, 4, 6])
def test_an_interrupted_analysis_goes_on_behind_the_last_finished_block(
    donors, tmp_path, monkeypatch, block
):
    monkeypatch.setattr(module, "SAVE_AFTER", 0)
    checkpoint = open_checkpoint(str(donors["deep"]))
    expected = analyze(checkpoint)
    with monkeypatch.context() as patched:
        stop_in(patched, block)
        with pytest.raises(Stop):
            cached_analyze(checkpoint, cache=tmp_path)
    assert [
        path.name for path in tmp_path.iterdir() if path.name.endswith(".atlas.safetensors")
    ] == []
    with monkeypatch.context() as patched:
        begun = stop_in(patched, 0)
        done = []
        assert_same(cached_analyze(checkpoint, cache=tmp_path, advance=done.append), expected)
    assert begun == list(range(block, 7))
    assert sum(done) == module.work(checkpoint)
    assert len(list(tmp_path.iterdir())) == 1  # the atlas


def test_what_another_donor_left_is_not_taken_up(donors, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_AFTER", 0)
    with monkeypatch.context() as patched:
        stop_in(patched, 4)
        with pytest.raises(Stop):
            cached_analyze(open_checkpoint(str(donors["a"])), cache=tmp_path)
    other = open_checkpoint(str(donors["b"]))
    assert_same(cached_analyze(other, cache=tmp_path), analyze(other))


@pytest.mark.parametrize(
    "name", ["state.safetensors", "block-0.safetensors", "block-2.safetensors"]
)
def test_a_broken_file_of_an_analysis_under_way_is_begun_anew(donors, tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "SAVE_AFTER", 0)
    checkpoint, under_way = open_checkpoint(str(donors["a"])), tmp_path / "under-way"
    with monkeypatch.context() as patched:
        stop_in(patched, 3)
        with pytest.raises(Stop):
            analyze(checkpoint, under_way=under_way)
    assert sorted(path.name for path in under_way.iterdir()) == [
        *(f"block-{block}.safetensors" for block in range(3)),
        "state.safetensors",
    ]
    (under_way / name).write_bytes(b"broken")
    assert_same(analyze(checkpoint, under_way=under_way), analyze(checkpoint))
    assert not under_way.exists()


def test_blocks_that_are_quick_are_not_saved(donors, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(module, "write_arrays", lambda path, *_: written.append(path))
    cached_analyze(open_checkpoint(str(donors["a"])), cache=tmp_path)
    assert written == []


def test_a_donor_is_streamed(donors, monkeypatch):
    seen = []
    original = module._run_of
    monkeypatch.setattr(
        module, "_run_of", lambda donor, *rest: seen.append(donor) or original(donor, *rest)
    )
    analyze(open_checkpoint(str(donors["a"])))
    assert isinstance(seen[0], Streamed)


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [48, 2100, 3000])
def test_two_processes_make_the_atlas_of_one(tmp_path, vocabulary):
    """Batches of 1024: of 2100 and 3000 tokens both processes have some, of 48 only the first."""
    donor = write_donor(tmp_path / "donor", vocab_size=vocabulary)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    # `accelerate launch --cpu` starts one process.
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]
    for name, command in (("one", [sys.executable, "-m"]), ("two", launched)):
        own = environment | {"XDG_CACHE_HOME": str(tmp_path / name)}
        done = subprocess.run(
            [
                *command,
                "frankenmerge",
                "analyze",
                str(donor),
                "-o",
                str(tmp_path / f"{name}.atlas.safetensors"),
            ],
            env=own,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Written to") == 1
    one, two = (tmp_path / f"{name}.atlas.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert load_atlas(one).top["plain"].tokens.shape == (5, 16, 10)
    if vocabulary > 2048:
        assert np.unique(load_atlas(two).top["plain"].tokens // 1024).tolist() == list(
            range(vocabulary // 1024 + 1)
        )
