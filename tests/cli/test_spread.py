"""Models spread over devices and disk, from the command line."""

import json

import pytest


def spread(folder, size="25KB"):
    return ["--device", "auto", "--max-memory", f"cpu={size}", "--offload", folder]


def test_a_spread_model_is_measured_as_a_whole_one(run, donors, text, tmp_path):
    losses = []
    for options in ([], spread(tmp_path / "offload")):
        code, out, _ = run("evaluate", donors["deep"], "--text", text, "--json", *options)
        assert code == 0
        losses.append(json.loads(out)["models"][0]["nats_per_token"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_features_of_a_spread_model_are_those_of_a_whole_one(run, donors, tmp_path):
    found = [
        json.loads(run("features", donors["deep"], "--method", "greedy", "--json", *options)[1])[
            "features"
        ]
        for options in ([], spread(tmp_path / "offload"))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("blocks", [[(0, 6)], [(0, 4), (2, 6)]])
def test_a_splice_of_offloaded_donors_is_measured_as_a_whole_one(
    run, donors, text, tmp_path, blocks
):
    recipe = tmp_path / "recipe.yaml"
    slices = [
        {"sources": [{"model": str(donors["deep"]), "layer_range": [start, stop]}]}
        for start, stop in blocks
    ]
    recipe.write_text(json.dumps({"slices": slices, "merge_method": "passthrough"}))
    losses = []
    for options in ([], spread(tmp_path / "offload")):
        code, out, err = run("evaluate", recipe, "--text", text, "--json", *options)
        assert code == 0, err
        losses.append([model["nats_per_token"] for model in json.loads(out)["models"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2


@pytest.mark.parametrize("value", ["20GiB", "=20GiB", "0="])
def test_memory_is_limited_by_device(run, donors, text, value):
    code, _, err = run(
        "evaluate", donors["a"], "--text", text, "--device", "auto", "--max-memory", value
    )
    assert code == 2 and "cpu=60GiB" in err
