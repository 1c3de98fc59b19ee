"""Every search has words and a function, and its options are options of the searches."""

from dataclasses import fields

from frankenmerge.artefacts.searches import SEARCHES, searches_with
from frankenmerge.workflows.searches import METHODS, SearchOptions


def test_every_search_has_one_function():
    assert list(SEARCHES) == list(METHODS)


def test_options_of_searches_are_fields_of_their_options():
    names = {field.name for field in fields(SearchOptions)}
    assert {option for info in SEARCHES.values() for option in info.options} <= names


def test_searches_with_an_option():
    assert searches_with("bos") == ("complete", "greedy", "ascent")
    assert searches_with("layers") == ()
