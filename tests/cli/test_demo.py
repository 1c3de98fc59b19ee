"""`frankenmerge demo`: the whole pipeline on the donors in the package."""

import json
import statistics

import pytest
from conftest import DEMO


def files(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def demo(run, tmp_path, monkeypatch):
    """Run the demo from a folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda *arguments: run("demo", *arguments)


@pytest.mark.slow
def test_the_demo_s_merge_is_better_than_both_donors_and_the_same_again(demo, tmp_path):
    from frankenmerge.artefacts.alignment import load_alignment
    from frankenmerge.artefacts.atlas import load_atlas
    from frankenmerge.artefacts.recipe_file import load_recipe

    if missing := [
        name
        for name in ("code", "prose")
        if not (DEMO / "donors" / name / "model.safetensors").is_file()
    ]:
        pytest.skip(f"the demo's donors are not there: {', '.join(missing)}")
    code, out, _ = demo("--json")
    record = json.loads(out)
    folder = tmp_path / "here" / "demo-run"
    assert code == 0 and record["output"] == "demo-run" and record["logits_equal"] is True
    models = {model["name"].rsplit("/")[-1]: model for model in record["models"]}
    merged, stack = models["merged"]["bits_per_byte"], models["stack of 12"]["bits_per_byte"]
    donors = [model["bits_per_byte"] for model in record["models"] if model["role"] == "donor"]
    randoms = record["random_bits_per_byte"]
    assert len(donors) == 2 and len(randoms) == 11
    assert 0 < merged < min(donors) < 8 and stack < statistics.median(randoms)

    # The stack is planned, the gain is searched for, and the recipe of the gain is merged.
    planned = load_recipe(folder / "stack.yaml")
    assert record["plan"]["recipe"] == planned.model_dump(exclude_none=True)
    assert len(planned.blocks) == 12
    evidence = json.loads((folder / "stack.evidence.json").read_text())
    assert evidence["plans"][0] == record["plan"]
    recipe = load_recipe(folder / "recipe.yaml").model_dump(exclude_none=True)
    found = record["gain"]["plans"][0]
    assert found["recipe"] == recipe and record["gain"]["confirmed"] is True
    written = json.loads((folder / "recipe.gain.json").read_text())
    assert {key: record["gain"][key] for key in written} == written
    provenance = json.loads((folder / "merged" / "frankenmerge.json").read_text())
    assert provenance["key"] == found["key"]

    # On held-out text it wins over both, and the better donor is the one that counts.
    held_out = record["gain"]["held_out"]
    over = {name: each["gain"] for name, each in held_out["over"].items()}
    assert len(over) == 2 and all(each["interval"][0] > 0 for each in held_out["over"].values())
    assert held_out["gain"] == pytest.approx(min(over.values()))
    assert over[held_out["best_donor"]] == pytest.approx(held_out["gain"])
    share = held_out["gain"] / held_out["ensemble"]["gain"]
    assert held_out["captured_share"] == pytest.approx(share) and 0 < share < 1

    alignment = load_alignment(folder / "code-prose.alignment.safetensors")
    for name, fingerprint in zip(("code", "prose"), alignment.fingerprints, strict=True):
        assert load_atlas(folder / f"{name}.atlas.safetensors").fingerprint == fingerprint
    page = (folder / "report.html").read_text(encoding="utf-8")
    for heading in (
        "<h1>code and prose, merged</h1>",
        "What was won against the donors",
        "Why these seams",
        "Where the donors agree",
    ):
        assert heading in page

    # Again, as tables: the earlier demo's folder is replaced by the same.
    before = files(folder)
    (folder / "merged" / "left-over").touch()
    code, out, _ = demo()
    shown, after = " ".join(out.split()), files(folder)
    assert code == 0 and after.keys() == before.keys()
    assert "no missing or unexpected key; its logits equal those of the splice in memory" in shown
    beaten = sum(bits > stack for bits in randoms)
    assert f"better than {beaten} of 11 random recipes" in shown
    assert f"{merged:.3f}" in shown and f"{share:.0%} of what the ensemble" in shown
    for name, gain in over.items():
        assert f"better than {name.rsplit('/')[-1]} by {gain:.3f} nats per token" in shown
    assert [name for name in after if after[name] != before[name]] == []


def test_the_demo_leaves_a_folder_alone_that_is_not_its_own(demo, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    code, out, err = demo("--out", folder)
    assert (code, out) == (2, "") and str(folder) in err and "--out" in err
    assert files(folder) == {"thesis.txt": b"years of work"}


def test_the_demo_leaves_a_file_alone(demo, tmp_path):
    (tmp_path / "mine").write_text("years of work")
    code, _, err = demo("--out", tmp_path / "mine")
    assert code == 2 and str(tmp_path / "mine") in err
    assert (tmp_path / "mine").read_text() == "years of work"


def test_an_unknown_option_is_reported_and_nothing_is_made(demo, tmp_path):
    code, _, err = demo("--depth", 3)
    assert code == 2 and "--depth" in err
    assert list((tmp_path / "here").iterdir()) == []
