"""A search by name from Python gives what the search itself gives."""

from contextlib import contextmanager

import numpy as np
import pytest

from frankenmerge.analysis.complete import complete_search
from frankenmerge.artefacts.searches import SEARCHES
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model
from frankenmerge.workflows.searches import SearchOptions, default_blocks, search


def test_the_complete_search_by_name_is_the_complete_search(donors):
    checkpoint = open_checkpoint(str(donors["a"]))
    result = search(checkpoint, "complete", SearchOptions(layers=[1, 3], neurons=[0, 5], tokens=3))
    top = complete_search(load_model(checkpoint), k=3)
    np.testing.assert_array_equal(result.tokens, top.tokens[[1, 3]][:, [0, 5]])
    assert [(feature.block, feature.neuron) for feature in result.features] == [
        (1, 0),
        (1, 5),
        (3, 0),
        (3, 5),
    ]


@pytest.mark.parametrize("method", [name for name in SEARCHES if name != "pixels"])
def test_every_search_reports_its_progress(donors, method):
    opened, done = [], []

    @contextmanager
    def progress(what, total, unit):
        opened.append((what, total, unit))
        yield done.append

    steps = None if method == "ascent" else 2
    options = SearchOptions(layers=[1, 2], neurons=[0, 1], tokens=2, steps=steps, text="fox")
    search(open_checkpoint(str(donors["a"])), method, options, progress=progress)
    ((what, total, _),) = opened
    assert what == SEARCHES[method].title
    # The complete search runs every input through each of the four blocks.
    assert sum(done) == (total or sum(done)) * (4 if method == "complete" else 1)


def test_a_search_without_its_input_is_refused_before_the_model_is_loaded(donors, monkeypatch):
    monkeypatch.setattr("frankenmerge.workflows.searches.load_model", None)
    checkpoint = open_checkpoint(str(donors["a"]))
    with pytest.raises(FrankenmergeError, match="a text to recover"):
        search(checkpoint, "inversion", SearchOptions())
    with pytest.raises(FrankenmergeError, match="0 to 15"):
        search(checkpoint, "greedy", SearchOptions(neurons=[16]))


@pytest.mark.parametrize(
    ("count", "blocks"), [(1, [1]), (4, [1, 2, 3, 4]), (32, [1, 8, 16, 24, 32])]
)
def test_the_first_block_and_every_quarter_are_searched_by_default(count, blocks):
    assert default_blocks(count) == blocks
