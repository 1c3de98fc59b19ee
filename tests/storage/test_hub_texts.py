"""Texts that are data sets of the hub: the command line against a hub on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_donor
from hub_server import Repository, serving

ROWS = [f"the cat sat on mat number {number}" for number in range(6)]


def parquet(path: Path, rows: list[str], field: str = "text") -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(pyarrow.table({field: rows}), path)


@pytest.fixture
def hub(tmp_path):
    """Two data sets: one of splits in shards, one of a single file of another field."""
    splits, single = tmp_path / "splits", tmp_path / "single"
    parquet(splits / "data" / "test-00000-of-00002.parquet", ROWS[:3])
    parquet(splits / "data" / "test-00001-of-00002.parquet", ROWS[3:])
    parquet(splits / "data" / "train-00000-of-00001.parquet", ["not this one"])
    (splits / "README.md").write_text("# A data set")
    (splits / "splits.py").write_text("raise SystemExit('code of a data set')")
    single.mkdir()
    (single / "rows.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in ROWS))
    (single / "README.md").write_text("# Another")
    with serving() as found:
        found.repositories = {"org/splits": Repository(splits), "org/single": Repository(single)}
        yield found


@pytest.fixture
def read(hub, tmp_path):
    """Read texts in a process that knows this hub alone: of each name the documents or an error."""
    script = (
        "import json, sys; from pathlib import Path\n"
        "from frankenmerge.errors import FrankenmergeError\n"
        "from frankenmerge.evaluation.documents import read_text\n"
        "def found(name):\n"
        "    try:\n"
        "        return read_text(Path(name), download=sys.argv[1] == 'True').documents\n"
        "    except FrankenmergeError as error:\n"
        "        return str(error)\n"
        "print(json.dumps([found(name) for name in sys.argv[2:]]))\n"
    )

    def run(*names: str, download: bool = False, offline: str = "0") -> list[list[str] | str]:
        command = [sys.executable, "-c", script, str(download), *names]
        own = {**os.environ, **hub.environment(tmp_path), "HF_HUB_OFFLINE": offline}
        ended = subprocess.run(command, capture_output=True, text=True, env=own, timeout=120)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return run


def test_a_split_is_all_of_its_shards_and_nothing_else_is_fetched(read, hub):
    test, train, every = (f"hub:org/splits{path}" for path in ("/data/test", "/data/train", ""))
    (refused,) = read(test)
    assert "--download" in refused and not hub.asked
    found, unclear = read(test, every, download=True)
    assert found == ROWS
    assert sorted(hub.served) == [f"data/test-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert "2: data/test.parquet, data/train.parquet" in unclear
    assert "as in hub:org/splits/data/test.parquet" in unclear
    # A name means the same without a network, whichever files are there.
    hub.asked.clear()
    names = test, f"{test}.parquet:text", f"{test}-00001-of-00002.parquet", every, train
    found = read(*names)
    assert found[:4] == [ROWS, ROWS, ROWS[3:], unclear] and "--download" in found[4]
    assert not hub.asked
    assert read(test, download=True, offline="1") == [ROWS]


def test_a_data_set_of_one_file_needs_no_path(read):
    names = "hub:org/single:body", "hub:org/single@v1/rows.jsonl:body", "hub:org/single"
    *found, unnamed = read(*names, download=True)
    assert found == [ROWS, ROWS]
    assert "rows.jsonl:1" in unnamed and "'body'" in unnamed


def test_what_a_name_does_not_mean_is_reported(read):
    messages = {
        "hub:org/none": "no repository of this name",
        "hub:org/single@v7": "no revision of this name",
        "hub:org/single/test": "rows.jsonl",
        "hub:splits": "hub:OWNER/NAME",
        "hub:org/../secret": "hub:OWNER/NAME",
    }
    found = read(*messages, download=True)
    assert all(message in each for message, each in zip(messages.values(), found, strict=True))


@pytest.mark.slow
def test_commands_read_them(hub, tmp_path):
    donor = write_donor(tmp_path / "donor", seed=1)

    def call(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "frankenmerge", *map(str, arguments), "--json"]
        own = {**os.environ, **hub.environment(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, env=own, timeout=120)

    name = "hub:org/splits/data/test"
    refused = call("evaluate", donor, "--text", name)
    assert refused.returncode == 2 and "--download" in refused.stderr and not hub.asked
    found = call("evaluate", donor, "--text", name, "--download")
    assert found.returncode == 0, found.stderr
    (text,) = json.loads(found.stdout)["texts"]
    assert (text["path"], text["documents"]) == (name, len(ROWS))
    assert text["bytes"] == sum(map(len, ROWS))
