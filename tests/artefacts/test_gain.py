"""Files of gains and of sweeps: read as they were written, and others refused."""

import json
from types import ModuleType
from typing import Any

import pytest

from frankenmerge.artefacts import gain, sweep
from frankenmerge.errors import FrankenmergeError

CONTROL = {"nats": 2.5, "gain": 0.1, "interval": [0.0, 0.2]}
GAIN: dict[str, Any] = {
    "kind": "frankenmerge.gain/1",
    "plans": [
        {
            "recipe": {"merge_method": "linear", "models": [{"model": "a"}]},
            "summary": "linear: a",
            "key": "0" * 64,
            "kind": "average",
            "gain": 0.1,
            "interval": [0.05, 0.15],
            "captured_share": 0.5,
            "domains": {"text": 0.1},
        }
    ],
    "controls": {
        "best_donor": {"name": "a", "nats": 2.6},
        "average": CONTROL,
        "ensemble": CONTROL,
    },
    "confirmed": True,
    "on": ["text"],
    "tokens": 1000,
    "candidates": 40,
    "passes": 12,
    "seed": 0,
    "versions": {"torch": "2"},
}
SWEEP: dict[str, Any] = {
    "kind": "frankenmerge.sweep/1",
    "donor": "a",
    "fingerprint": "1" * 64,
    "blocks": 3,
    "nats": 2.5,
    "scales": [0.5, 1.0],
    "windows": [{"start": 0, "stop": 2, "scale": 0.5, "gain": -0.1, "error": 0.01}],
    "confirmed": [
        {
            "start": 0,
            "stop": 2,
            "scale": 0.5,
            "selected": -0.1,
            "gain": -0.12,
            "interval": [-0.2, -0.01],
        }
    ],
    "on": ["text"],
    "tokens": 1000,
    "seed": 0,
    "versions": {"torch": "2"},
}
CASES = [(gain, GAIN), (sweep, SWEEP)]


@pytest.mark.parametrize("module, content", CASES)
def test_what_is_written_is_read(module: ModuleType, content: dict[str, Any], tmp_path):
    made = module.parse(content, "given")
    path = tmp_path / "name.json"
    module.save(made, path)
    assert module.load(path) == made
    assert json.loads(path.read_text()) == content == json.loads(json.dumps(made.as_json()))


def test_what_is_not_known_is_absent(tmp_path):
    plan = {key: value for key, value in GAIN["plans"][0].items() if key != "captured_share"}
    controls = {key: value for key, value in GAIN["controls"].items() if key != "average"}
    content = GAIN | {"plans": [plan], "controls": controls}
    gain.save(gain.parse(content, "given"), tmp_path / "name.json")
    assert json.loads((tmp_path / "name.json").read_text()) == content


@pytest.mark.parametrize("module, content", CASES)
@pytest.mark.parametrize(
    "change",
    [
        {"kind": "frankenmerge.atlas/1"},
        {"kind": "frankenmerge.gain/2"},
        {"kind": "frankenmerge.sweep/2"},
        {"tokens": "many"},
        {"plans": [], "windows": []},
    ],
)
def test_other_files_are_refused(module: ModuleType, content, change, tmp_path):
    changed = content | {key: value for key, value in change.items() if key in content}
    path = tmp_path / "name.json"
    path.write_text(json.dumps(changed))
    with pytest.raises(FrankenmergeError) as caught:
        module.load(path)
    assert str(path) in str(caught.value) and "remedy" in str(caught.value)


@pytest.mark.parametrize("module, other", [(gain, SWEEP), (sweep, GAIN)])
def test_one_is_not_read_as_the_other(module: ModuleType, other, tmp_path):
    with pytest.raises(FrankenmergeError):
        module.parse(other, "given")
    for text in ("[]", "5", "{", ""):
        (tmp_path / "name.json").write_text(text)
        with pytest.raises(FrankenmergeError):
            module.load(tmp_path / "name.json")
    with pytest.raises(FrankenmergeError):
        module.load(tmp_path / "absent.json")


def test_kinds_are_told_from_content():
    assert gain.is_gain(GAIN) and gain.is_gain({"kind": "frankenmerge.gain/9"})
    assert sweep.is_sweep(SWEEP) and sweep.is_sweep({"kind": "frankenmerge.sweep/9"})
    for content in (SWEEP, {}, [], None, {"kind": 5}):
        assert not gain.is_gain(content)
    for content in (GAIN, {}, [], None, {"kind": 5}):
        assert not sweep.is_sweep(content)


def test_they_stand_beside_their_recipe(tmp_path):
    recipe = tmp_path / "name.yaml"
    assert gain.gain_path(recipe) == tmp_path / "name.gain.json"
    assert sweep.sweep_path(recipe) == tmp_path / "name.sweep.json"
