"""Charts: what lies where, and what is said of it."""

import math
import re
from xml.etree import ElementTree

import pytest

from frankenmerge.reporting.charts import WIDTH, Bar, Line, bars, lines
from frankenmerge.reporting.svg import Drawing, inline


def read(drawing: Drawing) -> ElementTree.Element:
    root = ElementTree.fromstring(inline(drawing, "c"))
    assert (
        root.get("role") == "img"
        and root.find("title") is not None
        and root.find("desc") is not None
    )
    ids = [part.get("id") for part in root.iter() if part.get("id")]
    assert set(str(root.get("aria-labelledby")).split()) <= set(ids)
    return root


def dots(root: ElementTree.Element, style: str) -> list[tuple[float, float]]:
    return [
        (float(part.get("cx", 0)), float(part.get("cy", 0)))
        for part in root.iter("circle")
        if part.get("class") == style
    ]


def test_bars_are_in_the_order_of_their_values_and_intervals():
    root = read(
        bars(
            [Bar("one", 1.0, 0.5, 2.0), Bar("two", 3.0, 2.0, 3.5, other=2.5)],
            "T",
            "nats",
            other="measured",
        )
    )
    (one, _), (two, _) = [dot for dot in dots(root, "dot") if dot[1] > 20]
    spans = [
        re.findall(r"[\d.]+", part.get("d", ""))
        for part in root.iter("path")
        if part.get("class") == "span"
    ]
    (start, _, stop), (start2, _, stop2) = [[float(number) for number in span] for span in spans]
    assert start < one < stop == start2 < two < stop2 <= WIDTH
    # The dots' distances are those of the values: one scale for all.
    assert (stop2 - start) / (two - one) == pytest.approx(3.0 / 2.0, rel=0.01)
    assert root.findtext("desc") == "one: 1, from 0.5 to 2; two: 3, from 2 to 3.5, measured 2.5"


def test_a_line_breaks_where_a_value_is_missing_and_seams_are_marked():
    series = [
        Line("a", [(1, 1.0), (2, None), (3, 2.0), (4, 4.0)], 0),
        Line("chance", [(1, 0.5), (4, 0.5)], 0, broken=True),
    ]
    root = read(lines(series, "T", "share", seams=[(2.5, "1")]))
    classes = [part.get("class") for part in root.iter("path")]
    assert classes.count("line l0") == 1 and classes.count("seamline") == 1
    assert classes.count("line broken l0") == 2  # one in the legend
    assert "a: lowest 1 at block 1, highest 4 at block 4" in str(root.findtext("desc"))


@pytest.mark.parametrize("value", [0.0, 1e-12, 1e9, -3.0, math.inf, math.nan])
def test_any_number_gives_a_valid_chart(value):
    for drawing in (
        bars([Bar("a", value, value, value, value)], "T", "x"),
        lines([Line("a", [(1, value), (2, 1.0)], 0)], "T", "x"),
    ):
        read(drawing)
        assert "nan" not in drawing.elements and "inf" not in drawing.elements


def test_no_data_gives_an_empty_chart():
    read(bars([], "T", "x"))
    read(lines([], "T", "x"))


def test_labels_are_escaped():
    label = "</text><script>alert(1)</script>&"
    assert not list(read(bars([Bar(label, 1)], "T", "x")).iter("script"))
    assert not list(read(lines([Line(label, [(1, 1.0)], 0)], "T", "x")).iter("script"))


def test_long_labels_leave_room_for_the_verdict():
    verdict = "outside the interval"
    root = read(bars([Bar("x" * 300, 1.0, verdict=verdict)], "T", "x"))
    texts = [part.text or "" for part in root.iter("text")]
    assert verdict in texts and max(map(len, texts)) == 54 - len(verdict)


def test_long_labels_stay_within_the_picture():
    root = read(bars([Bar("x" * 300, 1.0, verdict="held")], "T", "x"))
    assert max(len(part.text or "") for part in root.iter("text")) <= 44
    keys = [Line("a donor of a long name, by chance", [(1, 1.0), (2, 2.0)], n) for n in range(3)]
    places = [
        float(part.get("x", 0))
        for part in read(lines(keys, "T", "x")).iter("text")
        if part.text == keys[0].label
    ]
    assert len(places) == 3 and len(set(places)) == 1  # one below the other
