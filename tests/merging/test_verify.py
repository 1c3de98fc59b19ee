"""A finished merge compared with its provenance: a sound one passes, every change is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import changed, meter, written
from safetensors.numpy import load_file, save_file

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging.verify import verify


@pytest.fixture
def donor(donors, tmp_path) -> dict[str, Path]:
    return {
        name: Path(shutil.copytree(donors[name], tmp_path / "donors" / name))
        for name in ("a", "deep")
    }


@pytest.fixture
def output(donor, tmp_path):
    """Merge two donors; returns the checkpoint's folder."""

    def call(**options) -> Path:
        recipe = recipe_of(
            [
                Block(str(donor[name]), index)
                for name, index in (("a", 0), ("deep", 1), ("deep", 2), ("a", 3))
            ]
        )
        return written(recipe, tmp_path / "out", **{"shard_size": 12000} | options).output

    return call


def refused(folder: Path) -> list[tuple[str, str]]:
    with pytest.raises(FrankenmergeError) as caught:
        verify(folder)
    return [(fault.place, fault.found) for fault in caught.value.faults]


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def flipped(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def provenance(folder: Path, change) -> None:
    record = json.loads((folder / "frankenmerge.json").read_text())
    change(record)
    (folder / "frankenmerge.json").write_text(json.dumps(record))


@pytest.mark.parametrize("checksums", [False, True])
def test_a_merge_is_what_it_says(output, checksums):
    folder = output(checksums=checksums)
    moved = []
    found = verify(folder, progress=meter(moved.append))
    files = len(list(folder.glob("*.safetensors")))
    assert files > 2
    assert found == (folder, files, 39, files if checksums else 0, 39, [])
    assert sum(moved) == sum(
        array.nbytes for file in folder.glob("*.safetensors") for array in load_file(file).values()
    )


def test_a_checksum_is_the_sha256_of_the_file(output):
    import hashlib

    folder = output(checksums=True)
    record = json.loads((folder / "frankenmerge.json").read_text())["shards"]
    assert {name: entry["sha256"] for name, entry in record.items()} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("*.safetensors")
    }


@pytest.mark.parametrize("position", ["first", "last"])
def test_one_bit_of_a_copied_tensor_is_noticed_by_its_donor(output, position):
    folder = output()
    file = shard(folder)
    tensors = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    tensors.pop("__metadata__")
    ordered = sorted(tensors, key=lambda name: tensors[name]["data_offsets"])
    flipped(
        file,
        file.stat().st_size - 1
        if position == "last"
        else int.from_bytes(file.read_bytes()[:8], "little") + 8,
    )
    ((place, _),) = refused(folder)
    assert place == f"{file}: {ordered[0 if position == 'first' else -1]}"


def test_without_its_donor_a_tensor_is_not_compared_and_a_checksum_still_notices(output, donor):
    folder = output(checksums=True)
    shutil.rmtree(donor["deep"])
    found = verify(folder)
    assert found.absent == [str(donor["deep"])] and 0 < found.compared < found.tensors
    record = json.loads((folder / "frankenmerge.json").read_text())["tensors"]
    assert found.compared == sum(entry["donor"] == str(donor["a"]) for entry in record.values())
    flipped(shard(folder), shard(folder).stat().st_size - 1)
    ((place, _),) = refused(folder)
    assert place == str(shard(folder))


def test_a_donor_that_is_not_what_it_was_is_not_compared_with(output, donor, tmp_path):
    folder = output()
    changed(
        donor["a"],
        tmp_path / "other",
        lambda arrays: {name: array + 1 for name, array in arrays.items()},
    )
    shutil.copytree(tmp_path / "other", donor["a"], dirs_exist_ok=True)
    assert verify(folder).absent == [str(donor["a"])]


@pytest.mark.parametrize("position", [8 + 30, -1])
def test_a_header_or_a_size_that_was_changed_is_noticed_without_donors(output, donor, position):
    folder = output()
    for path in donor.values():
        shutil.rmtree(path)
    file = shard(folder, 0)
    if position < 0:
        file.write_bytes(file.read_bytes()[:-1])
    else:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + length].replace(b'"format":"pt"', b'"format":"np"')
        assert header != content[8 : 8 + length]
        file.write_bytes(content[:8] + header + content[8 + length :])
    ((place, _),) = refused(folder)
    assert place == str(file)


def test_files_and_tensors_that_are_missing_or_too_many_are_named(output):
    folder = output()
    more = folder / "model-stale.safetensors"
    save_file({"x": np.ones(1, np.float32)}, more)
    provenance(folder, lambda record: record["tensors"].pop("model.norm.weight"))
    (folder / "recipe.yaml").write_text("other")
    places = dict(refused(folder))
    assert places == {
        str(folder / "recipe.yaml"): "another one, or none",
        str(more): "one that it did not write",
        f"{folder}: model.norm.weight": "one more",
    }


def rewritten(name: str, change):
    def tamper(folder: Path) -> str:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
        return str(folder / name)

    return tamper


def added(name: str, content: str = "{}"):
    def tamper(folder: Path) -> str:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
        return str(folder / name.partition("/")[0])

    return tamper


def gone(name: str):
    def tamper(folder: Path) -> str:
        (folder / name).unlink()
        return str(folder / name)

    return tamper


def swapped(folder: Path) -> str:
    """Two tensors of one shape and type change their bytes."""
    file = next(
        file
        for file in sorted(folder.glob("*.safetensors"))
        if sum("norm" in name for name in load_file(file)) > 1
    )
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    one, two = [entry["data_offsets"] for name, entry in header.items() if "norm" in name][:2]
    content = bytearray(file.read_bytes())
    (a, b), (c, d) = ((8 + length + start, 8 + length + stop) for start, stop in (one, two))
    content[a:b], content[c:d] = content[c:d], content[a:b]
    file.write_bytes(content)
    return str(file)


@pytest.mark.parametrize(
    "tamper",
    [
        rewritten("config.json", lambda config: config.update(rope_theta=1.0)),
        rewritten(
            "config.json",
            lambda config: config.update(auto_map={"AutoModelForCausalLM": "evil.Evil"}),
        ),
        rewritten("generation_config.json", lambda config: config.update(temperature=9.0)),
        rewritten("tokenizer.json", lambda tokenizer: tokenizer["model"]["vocab"].update(a=2, b=1)),
        rewritten(
            "tokenizer_config.json", lambda settings: settings.update(chat_template="{{ evil }}")
        ),
        rewritten(
            "model.safetensors.index.json", lambda index: index["metadata"].update(total_size=1)
        ),
        rewritten(
            "frankenmerge.json",
            lambda record: record["tensors"]["model.norm.weight"].update(tensor="x"),
        ),
        rewritten(
            "frankenmerge.json",
            lambda record: record["tensors"]["model.norm.weight"].update(method="linear"),
        ),
        added("chat_template.jinja", "{{ evil }}"),
        added("adapter_config.json"),
        added("modeling_evil.py", "raise SystemExit"),
        added("pytorch_model.bin", "pickle"),
        added("model.safetensors.index.json.old"),
        added("1_Pooling/config.json"),
        gone("tokenizer.json"),
        gone("generation_config.json"),
        gone("recipe.yaml"),
        swapped,
    ],
)
def test_whatever_is_changed_is_noticed(output, tamper):
    folder = output()
    place = tamper(folder)
    assert any(found.startswith(place) for found, _ in refused(folder))


def test_the_card_may_be_written_on(output):
    folder = output()
    (folder / "README.md").write_text("what it is good for")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    verify(folder)


def test_a_missing_shard_is_named(output):
    folder = output()
    file = shard(folder)
    file.unlink()
    assert [place for place, _ in refused(folder)] == [str(file)]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("shards"),
        lambda record: record.update(tensors=[1]),
        lambda record: record.update(donors={"x": 1}),
        lambda record: record["shards"].update({"model.safetensors": None}),
        lambda record: record["tensors"].update({name: {} for name in record["tensors"]}),
    ],
)
def test_a_provenance_of_another_form_is_reported(output, change):
    folder = output()
    provenance(folder, change)
    assert any(place.startswith(str(folder)) for place, _ in refused(folder))


def test_a_checkpoint_without_a_provenance_is_reported(donor):
    ((place, found),) = refused(donor["a"])
    assert place == str(donor["a"] / "frankenmerge.json") and found == "no such file"


def test_a_result_that_was_moved_is_still_right(output, tmp_path):
    shutil.move(output(), tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere").compared == 39


def test_check_verifies_a_folder(output, donor, run):
    folder = output()
    code, out, err = run("check", folder, "--json")
    assert code == 0, err
    files = len(list(folder.glob("*.safetensors")))
    assert json.loads(out) == {
        "output": str(folder),
        "shards": files,
        "tensors": 39,
        "hashed": 0,
        "compared": 39,
        "absent": [],
    }
    shutil.rmtree(donor["a"])
    code, out, err = run("check", folder)
    assert code == 0 and "Not compared" in out
    shard(folder).unlink()
    code, out, err = run("check", folder)
    assert (code, out) == (2, "") and str(shard(folder, 0).parent) in err and "remedy" in err
