"""Models to evaluate: recipes of equal summary keep their own results; donors are opened once."""

import numpy as np
import pytest

import frankenmerge as fm
from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors import checkpoint
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.workflows.subjects import opened_subjects

TEXT = "a quick brown fox jumps over the lazy dog " * 5


def scaled(donors, factor: float | None):
    """A stack of two donors whose blocks write less; its summary does not say how much."""
    blocks = [Block(str(donors["a"]), 0), Block(str(donors["b"]), 1), Block(str(donors["a"]), 2)]
    scale = [{"filter": "o_proj", "value": factor}, {"value": 1.0}]
    parameters = {"scale": scale} if factor is not None else None
    return recipe_of(blocks).model_copy(update={"parameters": parameters})


@pytest.fixture
def alike(donors):
    recipes = scaled(donors, 0.5), scaled(donors, 0.25), scaled(donors, None)
    assert len({str(recipe) for recipe in recipes}) == 1
    return recipes


def losses_of(evaluated) -> dict[str, np.ndarray]:
    return {result.name: result.total.nats for result in evaluated.results}


def test_recipes_of_equal_summary_get_names_and_figures_of_their_own(alike):
    together = fm.evaluate(*alike, texts={"text": TEXT})
    recipes = [result for result in together.results if result.role == "recipe"]
    assert len({result.name for result in recipes}) == len({each.key for each in recipes}) == 3
    for recipe, result in zip(alike, recipes, strict=True):
        alone = fm.evaluate(recipe, texts={"text": TEXT}).results[0]
        assert np.array_equal(result.total.nats, alone.total.nats) and result.key == alone.key
        assert result.name.startswith(str(recipe))
    assert len({result.total.nats_per_token for result in recipes}) == 3
    assert len(together.results) == 5  # each donor once


def test_the_record_keeps_recipes_of_equal_summary_apart(alike):
    record = fm.evaluate(*alike, texts={"text": TEXT}).record
    models = [model for model in record.models if model.role == "recipe"]
    assert len({model.name for model in models}) == 3
    assert len({model.bits_per_byte for model in models}) == 3
    pairs = {(entry.model, entry.donor) for entry in record.differences}
    assert len(pairs) == len(record.differences) == 6


def test_the_same_recipe_twice_is_one(alike):
    with opened_subjects([alike[0], alike[0].model_copy(), alike[1]]) as subjects:
        assert len(subjects.names) == len(subjects.splices) == 2


def test_recipes_that_are_alike_in_files_go_by_their_files(alike, tmp_path):
    paths = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    for path, recipe in zip(paths, alike, strict=False):
        path.write_text(recipe.dump())
    found = losses_of(fm.evaluate(*paths, texts={"text": TEXT}))
    for path, recipe in zip(paths, alike, strict=False):
        (alone, *_) = losses_of(fm.evaluate(recipe, texts={"text": TEXT})).values()
        assert np.array_equal(found[str(path)], alone)


def test_every_checkpoint_is_opened_once(alike, donors, tmp_path, monkeypatch):
    opened = []

    def counted(name, *arguments, **options):
        opened.append(str(name))
        return open_checkpoint(name, *arguments, **options)

    for module in ("donors.checkpoint", "splicing.opening"):
        monkeypatch.setattr(f"frankenmerge.{module}.open_checkpoint", counted)
    assert checkpoint.open_checkpoint is counted
    (tmp_path / "recipe.yaml").write_text(alike[1].dump())
    models = [alike[0], tmp_path / "recipe.yaml", donors["a"], donors["deep"]]
    with opened_subjects(models) as subjects:
        assert set(subjects.donors) == {str(donors["a"]), str(donors["b"])}
    assert sorted(opened) == sorted(str(donors[name]) for name in ("a", "b", "deep"))


def test_all_models_and_recipes_are_reported_together(donors, tmp_path):
    (tmp_path / "bad.yaml").write_text("merge_method: passthrough\nspeed: 3\n")
    beyond = recipe_of([Block(str(donors["a"]), 9)])
    with (
        pytest.raises(FrankenmergeError) as error,
        opened_subjects([tmp_path / "nowhere", tmp_path / "bad.yaml", beyond]),
    ):
        pass
    assert str(tmp_path / "nowhere") in str(error.value)
    assert "speed" in str(error.value) and "layer_range" in str(error.value)
