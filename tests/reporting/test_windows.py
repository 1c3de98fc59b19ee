"""Heat maps of a sweep: colours, numbers and marks."""

from xml.etree import ElementTree

import invented
import pytest

from frankenmerge.artefacts.sweep import parse
from frankenmerge.reporting.heatmaps import colour
from frankenmerge.reporting.windows import DIVERGING, window_maps, window_scale


@pytest.fixture
def sweep():
    return parse(invented.sweep(), "one.sweep.json")


def test_every_scale_has_a_map_with_its_gains_in_thousandths(sweep):
    maps = window_maps(sweep)
    assert [each.title for each in maps] == ["Second pass scaled by 0.1", "Run twice as they are"]
    for each, scale in zip(maps, sweep.scales, strict=True):
        root = ElementTree.fromstring(f"<svg>{each.elements}</svg>")
        values = [
            int(part.text or "")
            for part in root.iter("text")
            if part.get("class", "").startswith("value")
        ]
        gains = {
            (window.start, window.stop): window.gain
            for window in sweep.windows
            if window.scale == scale
        }
        assert values == [round(1000 * gains[window]) for window in sorted(gains)]


def test_confirmed_windows_are_marked_on_the_map_of_their_scale(sweep):
    small, whole = window_maps(sweep)
    assert small.elements.count('class="mark ring"') == 2 == len(sweep.confirmed)
    assert "mark ring" not in whole.elements
    assert "window [5, 6)" in small.description


def test_gains_are_green_losses_brown_and_nothing_is_white():
    (_, low), (_, middle), (_, high) = ((n, colour(n, DIVERGING)) for n in (0.3, 0.5, 0.7))
    assert low[0] > low[2] and high[0] < high[1]
    assert min(middle) == max(middle) == 0xF5


def test_the_ends_of_the_colours_are_named(sweep):
    best = max(window.gain for window in sweep.windows)
    assert "gains" in window_scale(sweep).elements and best < 0.03
