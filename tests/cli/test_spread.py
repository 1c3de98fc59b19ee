"""Models spread over devices and disk, from the command line."""

import json

import pytest


def spread(folder, size="25KB"):
    return ["--device", "auto", "--max-memory", f"cpu={size}", "--offload", folder]


def test_a_spread_model_is_measured_as_a_whole_one(run, donors, text, tmp_path):
    told = []
    for options in ([], spread(tmp_path / "offload")):
        code, out, _ = run("evaluate", donors["deep"], "--text", text, "--json", *options)
        assert code == 0
        told.append(json.loads(out)["models"][0]["nats_per_token"])
    assert told[0] == pytest.approx(told[1], rel=1e-5)


def test_features_of_a_spread_model_are_those_of_a_whole_one(run, donors, tmp_path):
    found = [
        json.loads(run("features", donors["deep"], "--method", "greedy", "--json", *options)[1])[
            "features"
        ]
        for options in ([], spread(tmp_path / "offload"))
    ]
    assert found[0] == found[1]


def test_a_splice_of_offloaded_donors_is_refused(run, donors, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    source = {"model": str(donors["deep"]), "layer_range": [0, 6]}
    recipe.write_text(
        json.dumps({"slices": [{"sources": [source]}], "merge_method": "passthrough"})
    )
    code, _, told = run("evaluate", recipe, "--text", text, *spread(tmp_path / "offload"))
    assert code == 1 and "offloaded" in told


@pytest.mark.parametrize("value", ["20GiB", "=20GiB", "0="])
def test_memory_is_said_by_device(run, donors, text, value):
    code, _, told = run(
        "evaluate", donors["a"], "--text", text, "--device", "auto", "--max-memory", value
    )
    assert code == 1 and "cpu=60GiB" in told
