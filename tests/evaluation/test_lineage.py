"""What a merged checkpoint is made of, read from its `frankenmerge.json`."""

import json
import shutil

import pytest
from conftest import resolved, write_donor, written

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation.lineage import checkpoint_lineage, same_tokens, splice_lineage


@pytest.mark.parametrize("names", [("a", "b"), ("g", "h"), ("a", "deep")])
def test_the_lineage_of_a_checkpoint_is_that_of_its_recipe(donors, tmp_path, names):
    a, b = (str(donors[name]) for name in names)
    recipe = recipe_of([Block(a, 0), Block(b, 1), Block(b, 2), Block(a, 1), Block(b, 3)])
    written(recipe, tmp_path / "merged")
    found = checkpoint_lineage(open_checkpoint(str(tmp_path / "merged")), {})
    assert found == splice_lineage(resolved(recipe))
    assert found.blocks == tuple(recipe.blocks) and found.donors == (a, b)


def test_blocks_merged_from_several_count_as_their_first_source(donors, tmp_path):
    a, b = str(donors["a"]), str(donors["b"])
    text = f"""
slices:
- sources: [{{model: {a}, layer_range: [0, 2]}}, {{model: {b}, layer_range: [1, 3]}}]
- sources: [{{model: {b}, layer_range: [2, 4]}}, {{model: {a}, layer_range: [0, 2]}}]
merge_method: linear
parameters: {{weight: 0.5}}
"""
    recipe = parse_recipe(text, "recipe")
    splice = resolved(recipe)
    written(recipe, tmp_path / "merged")
    found = checkpoint_lineage(open_checkpoint(str(tmp_path / "merged")), splice.donors)
    assert found.blocks == (Block(a, 0), Block(a, 1), Block(b, 2), Block(b, 3))
    assert found == splice_lineage(splice)


def test_donors_that_have_moved_are_known_by_their_fingerprints(donors, tmp_path):
    for name in "ab":
        shutil.copytree(donors[name], tmp_path / "before" / name)
    old = {name: str(tmp_path / "before" / name) for name in "ab"}
    recipe = recipe_of([Block(old["a"], 0), Block(old["b"], 1)])
    written(recipe, tmp_path / "merged")
    shutil.move(tmp_path / "before", tmp_path / "after")
    moved = str(tmp_path / "after" / "b")
    found = checkpoint_lineage(
        open_checkpoint(str(tmp_path / "merged")), {moved: open_checkpoint(moved)}
    )
    assert found.blocks == (Block(old["a"], 0), Block(moved, 1)) and found.donors == (
        old["a"],
        moved,
    )


def test_a_checkpoint_of_another_tool_has_no_lineage(donors):
    assert checkpoint_lineage(open_checkpoint(str(donors["a"])), {}) is None


@pytest.mark.parametrize(
    "content",
    ["{}", '{"donors": {}, "tensors": {}}', '{"donors": {"a": 3}, "tensors": {}}', "[]", "{"],
)
def test_provenance_of_other_weights_is_refused(donors, tmp_path, content):
    folder = shutil.copytree(donors["a"], tmp_path / "merged")
    (folder / "frankenmerge.json").write_text(content)
    with pytest.raises(FrankenmergeError, match=r"frankenmerge\.json"):
        checkpoint_lineage(open_checkpoint(str(folder)), {})


def test_the_same_tokens_written_otherwise_are_the_same(donors, tmp_path):
    a = open_checkpoint(str(donors["a"]))
    folder = shutil.copytree(donors["a"], tmp_path / "spaced")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    assert same_tokens(a, open_checkpoint(str(folder)))
    other = write_donor(tmp_path / "other", seed=9)
    tokenizer["model"]["vocab"] |= {"a": 2, "b": 1}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert not same_tokens(a, open_checkpoint(str(other)))
