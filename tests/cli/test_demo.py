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
def test_the_demo_s_plan_is_better_than_random_recipes_and_the_same_again(demo, tmp_path):
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
    assert code == 0 and record["output"] == "demo-run"
    merged = next(model for model in record["models"] if model["name"].endswith("merged"))
    randoms = record["random_bits_per_byte"]
    assert len(randoms) == 20
    assert merged["bits_per_byte"] < statistics.median(randoms)
    donors = [model["bits_per_byte"] for model in record["models"] if model["role"] == "donor"]
    assert len(donors) == 2 and all(0 < bits < 8 for bits in donors)
    recipe = load_recipe(folder / "recipe.yaml")
    assert (
        record["plan"]["recipe"] == recipe.model_dump(exclude_none=True)
        and len(recipe.blocks) == 12
    )
    alignment = load_alignment(folder / "code-prose.alignment.safetensors")
    for name, fingerprint in zip(("code", "prose"), alignment.fingerprints, strict=True):
        assert load_atlas(folder / f"{name}.atlas.safetensors").fingerprint == fingerprint
    evidence = json.loads((folder / "recipe.evidence.json").read_text())
    assert evidence["plans"][0] == record["plan"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h1>12 blocks of code and prose</h1>" in page and "Where the donors agree" in page

    # Again, as tables: the earlier demo's folder is replaced by the same.
    before = files(folder)
    (folder / "merged" / "left-over").touch()
    code, out, _ = demo()
    shown, after = " ".join(out.split()), files(folder)
    assert code == 0 and after.keys() == before.keys()
    assert "no missing or unexpected key; its logits equal those of the splice in memory" in shown
    beaten = sum(bits > merged["bits_per_byte"] for bits in randoms)
    assert f"better than {beaten} of 20 random recipes" in shown
    assert f"{merged['bits_per_byte']:.3f}" in shown
    assert [name for name in after if after[name] != before[name]] == []
    assert record["logits_equal"] is True


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
