"""Atlases of donors by name: from files, from the cache, or computed."""

import numpy as np

from frankenmerge.analysis.analyze import analyze
from frankenmerge.analysis.inputs import with_inputs
from frankenmerge.artefacts.atlas import save_atlas
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.workflows.atlases import add_inputs, atlas_of


def test_an_atlas_comes_from_its_file_or_the_cache_or_is_computed(donors, tmp_path):
    expected = analyze(open_checkpoint(str(donors["a"])))
    for _ in range(2):  # computed, then cached
        atlas = atlas_of(str(donors["a"]), cache=tmp_path / "cache")
        np.testing.assert_array_equal(atlas.top["plain"].tokens, expected.top["plain"].tokens)
        np.testing.assert_array_equal(atlas.probes, expected.probes)
    assert len(list((tmp_path / "cache").glob("*.atlas.safetensors"))) == 1
    path = tmp_path / "a.atlas.safetensors"
    save_atlas(expected, path)
    np.testing.assert_array_equal(atlas_of(str(path)).probes, expected.probes)


def test_inputs_are_those_of_the_search(donors, tmp_path):
    name, cache = str(donors["a"]), tmp_path / "cache"
    atlas = atlas_of(name, cache=cache)
    found = add_inputs(name, atlas, "greedy", [0, 3], 2, cache=cache).inputs["greedy"]
    expected = with_inputs(
        atlas, open_checkpoint(name), "greedy", [0, 3], tokens=2, cache=tmp_path / "other"
    ).inputs["greedy"]
    np.testing.assert_array_equal(found.neurons, expected.neurons)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert add_inputs(name, atlas, "greedy", tokens=1, cache=cache).inputs[
        "greedy"
    ].tokens.shape == (
        5,
        16,
        1,
    )
