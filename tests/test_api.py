"""The functions of `import frankenmerge`: the same stages as the command line's."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

import frankenmerge as fm
from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors import checkpoint
from frankenmerge.errors import FrankenmergeError

TEXT = "a quick brown fox jumps over the lazy dog " * 20


@pytest.fixture
def best(donors):
    return fm.plan(fm.align(donors["a"], donors["b"]), 6).plans[0]


def test_align_takes_donors_and_atlases_alike(donors):
    atlas = fm.analyze(donors["a"])
    mixed, whole = fm.align(atlas, donors["b"]), fm.align(donors["a"], str(donors["b"]))
    assert mixed.scores.keys() == whole.scores.keys()
    assert all(
        np.array_equal(mixed.scores[name].matrix, whole.scores[name].matrix)
        for name in mixed.scores
    )


def test_a_plan_is_merged_and_evaluated_as_on_the_command_line(donors, best, run, tmp_path):
    from safetensors.numpy import load_file

    (tmp_path / "recipe.yaml").write_text(best.recipe.dump())
    (tmp_path / "text.txt").write_text(TEXT)
    made = fm.merge(best.recipe, tmp_path / "ours")
    assert run("merge", tmp_path / "recipe.yaml", tmp_path / "theirs")[0] == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert made.tensors == len(ours) and ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)

    virtual, *own = fm.evaluate(best.recipe, texts={"text": TEXT}).results
    merged, *_ = fm.evaluate(tmp_path / "ours", texts=[tmp_path / "text.txt"]).results
    code, out, _ = run(
        "evaluate", tmp_path / "recipe.yaml", "--text", tmp_path / "text.txt", "--json"
    )
    losses = {model["name"]: model["nats_per_token"] for model in json.loads(out)["models"]}
    assert code == 0 and losses[str(tmp_path / "recipe.yaml")] == pytest.approx(
        virtual.total.nats_per_token, abs=1e-6
    )
    assert merged.total.nats_per_token == pytest.approx(virtual.total.nats_per_token, abs=1e-6)
    assert [result.role for result in own] == ["donor", "donor"]
    assert all(
        losses[result.name] == pytest.approx(result.total.nats_per_token, abs=1e-6)
        for result in own
    )


def test_a_recipe_may_be_its_file(best, tmp_path):
    (tmp_path / "recipe.yaml").write_text(best.recipe.dump())
    from_file, *_ = fm.evaluate(tmp_path / "recipe.yaml", texts={"text": TEXT}).results
    from_value, *_ = fm.evaluate(best.recipe, texts={"text": TEXT}).results
    assert np.array_equal(from_file.total.nats, from_value.total.nats)


# Checkpoints that are open already


@pytest.fixture
def opened(donors, tmp_path, monkeypatch):
    """Two open donors; from now on, every checkpoint that is opened is counted by name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    import frankenmerge.workflows.evaluating
    import frankenmerge.workflows.merging
    import frankenmerge.workflows.planning  # noqa: F401

    pair = tuple(fm.open_donor(str(donors[name])) for name in "ab")
    counts: Counter[str] = Counter()

    def counted(name, *arguments, **options):
        counts[str(name)] += 1
        return checkpoint.open_checkpoint(name, *arguments, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("frankenmerge.") and hasattr(module, "open_checkpoint"):
            if module is not checkpoint:
                monkeypatch.setattr(module, "open_checkpoint", counted)
    return pair, counts


def test_open_checkpoints_are_compared_analyzed_and_aligned_as_they_are(opened):
    (a, b), counts = opened
    assert fm.compare_donors(a, b).reasons == []
    atlas = fm.analyze(a)
    assert atlas.donor == a.name and atlas.fingerprint == a.fingerprint
    alignment = fm.align(a, b)
    assert alignment.donors == (a.name, b.name)
    from_names = fm.align(a.name, b.name)
    assert counts == {a.name: 1, b.name: 1}
    for name, score in alignment.scores.items():
        assert np.array_equal(score.matrix, from_names.scores[name].matrix)


def test_sampled_alignments_of_open_checkpoints_open_none(opened):
    from frankenmerge.workflows.aligning import AlignOptions

    (a, b), counts = opened
    alignment = fm.align(a, b, AlignOptions(sampled=True, exchange=True))
    assert alignment.exchange and alignment.provenance["predicted_from"] == "drawn tokens"
    assert not counts


def test_plans_are_measured_with_open_checkpoints(opened):
    (a, b), counts = opened
    alignment = fm.align(a, b)
    measured = {"calibrate": "sampled", "verify": {"text": TEXT}, "damp": "sampled"}
    planned = fm.plan(alignment, 6, top=2, donors=(a, b), **measured)
    assert len(planned.plans) == 2 and planned.damped and not counts
    again = fm.plan(alignment, 6, top=2, **measured)
    assert counts == {a.name: 1, b.name: 1} and again.evidence == planned.evidence


def test_recipes_are_merged_and_evaluated_with_open_checkpoints(opened, best, tmp_path):
    (a, b), counts = opened
    counts.clear()
    made = fm.merge(best.recipe, tmp_path / "merged", donors=(a, b))
    assert counts[a.name] == counts[b.name] == 0
    merged = fm.open_donor(str(made.output))
    counts.clear()
    found = fm.evaluate(best.recipe, merged, a, texts={"text": TEXT}, donors=(b,)).results
    assert [(result.name, result.role) for result in found] == [
        (str(best.recipe), "recipe"),
        (str(tmp_path / "merged"), "model"),
        (a.name, "model"),
        (b.name, "donor"),
    ]
    assert np.array_equal(found[0].total.nats, found[1].total.nats)
    assert not counts


# Recipes and merges


def test_a_recipe_is_checked_from_headers(donors, best, tmp_path):
    fm.check(best.recipe)
    (tmp_path / "recipe.yaml").write_text(best.recipe.dump())
    fm.check(tmp_path / "recipe.yaml")
    with pytest.raises(FrankenmergeError, match="layer_range"):
        fm.check(recipe_of([Block(str(donors["a"]), 9)]))
    with pytest.raises(FrankenmergeError, match="hidden_size"):
        fm.check(recipe_of([Block(str(donors["a"]), 0), Block(str(donors["wide"]), 1)]))


def test_a_merge_is_verified(best, tmp_path):
    made = fm.merge(best.recipe, tmp_path / "merged")
    verified = fm.verify(made.output)
    assert verified.tensors == verified.compared == made.tensors and not verified.absent
    file = made.output / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    with pytest.raises(FrankenmergeError, match="model.safetensors"):
        fm.verify(made.output)


def test_a_file_of_stages_is_merged_and_evaluated(donors, tmp_path):
    a, b, path = donors["a"], donors["b"], tmp_path / "stages.yaml"
    path.write_text(
        f"""
name: half
merge_method: passthrough
slices:
- sources: [{{model: {a}, layer_range: [0, 2]}}]
---
merge_method: passthrough
slices:
- sources: [{{model: half, layer_range: [0, 2]}}]
- sources: [{{model: {b}, layer_range: [2, 4]}}]
"""
    )
    assert [recipe.name for recipe in fm.load_recipes(path)] == ["half", None]
    made = fm.merge(path, tmp_path / "merged")
    virtual, merged, *own = fm.evaluate(path, made.output, texts={"text": TEXT}).results
    assert np.array_equal(virtual.total.nats, merged.total.nats)
    assert {result.name for result in own} == {str(a), str(b)}


# Artefacts


def test_artefacts_are_saved_and_loaded(donors, tmp_path):
    atlas = fm.analyze(donors["a"])
    fm.save_atlas(atlas, tmp_path / "a.atlas.safetensors")
    loaded = fm.load_atlas(tmp_path / "a.atlas.safetensors")
    assert np.array_equal(loaded.top["plain"].tokens, atlas.top["plain"].tokens)
    alignment = fm.align(loaded, donors["b"])
    fm.save_alignment(alignment, tmp_path / "ab.alignment.safetensors")
    again = fm.load_alignment(tmp_path / "ab.alignment.safetensors")
    planned = fm.plan(again, 6)
    assert planned.plans == fm.plan(alignment, 6).plans
    (path,) = fm.write_plans(planned, tmp_path / "recipe.yaml")
    assert fm.load_recipe(path) == planned.plans[0].recipe
    assert (tmp_path / "recipe.evidence.json").is_file()


def test_a_report_is_the_command_s(donors, best, run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(best.recipe.dump())
    assert fm.report(tmp_path / "run", tmp_path / "ours.html") == tmp_path / "ours.html"
    assert run("report", tmp_path / "run", "-o", tmp_path / "theirs.html")[0] == 0
    assert (tmp_path / "ours.html").read_bytes() == (tmp_path / "theirs.html").read_bytes()
    with pytest.raises(FrankenmergeError):
        fm.report(tmp_path / "nowhere", tmp_path / "page.html")


# The package


def test_mistakes_are_raised(tmp_path):
    with pytest.raises(FrankenmergeError, match="neither"):
        fm.analyze(tmp_path / "nowhere")


def test_the_package_offers_its_functions():
    assert {"analyze", "align", "plan", "merge", "evaluate"} <= set(dir(fm))
    with pytest.raises(AttributeError, match="analyze"):
        _ = fm.analyse


def test_everything_offered_is_there():
    assert all(callable(getattr(fm, name)) for name in fm._OFFERED)


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys; from frankenmerge.splicing import diagram; "
        "print({'torch', 'numpy', 'transformers', 'click'} & sys.modules.keys())"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )


def test_texts_are_given_as_lists_of_documents(donors):
    documents = ["the quick brown fox", "jumps over the dog"]
    lists, *_ = fm.evaluate(donors["a"], texts={"text": documents}).results
    apart, *_ = fm.evaluate(donors["a"], texts=dict(zip("ab", documents, strict=True))).results
    assert lists.losses["text"].documents == 2
    np.testing.assert_allclose(lists.total.nats, apart.total.nats, atol=1e-5)
