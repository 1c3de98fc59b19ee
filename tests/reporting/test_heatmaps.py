"""Heatmaps: the colours of the values, and the numbers that the page's script reads."""

import base64
import io
import json
import re

import invented
import numpy as np
import pytest

from frankenmerge.reporting import heatmaps, labels
from frankenmerge.reporting.heatmaps import Mark


def unpacked(packed: list, shape: tuple[int, int]) -> np.ndarray:
    peak, text = packed
    values = np.frombuffer(base64.b64decode(text), "<i2").astype(np.float64)
    return np.where(values == -32768, np.nan, values / 32000 * peak).reshape(shape)


def test_colours_are_viridis():
    matplotlib = pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    viridis = matplotlib.colormaps["viridis"]
    off = [
        abs(part - 255 * there)
        for index in range(256)
        for part, there in zip(heatmaps.colour(index / 255), viridis(index)[:3], strict=True)
    ]
    assert max(off) < 7 and sum(off) / len(off) < 1.5


def test_colours_grow_lighter_all_the_way():
    light = [heatmaps.luminance(heatmaps.colour(index / 100)) for index in range(101)]
    assert all(a < b for a, b in zip(light, light[1:], strict=False))


def test_a_png_has_one_pixel_for_each_value():
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    matrix = np.array([[0.0, 0.5, 1.0], [-2.0, np.nan, 7.0]], np.float32)
    pixels = np.asarray(image.open(io.BytesIO(heatmaps.png(matrix))).convert("RGB"))
    expected = [
        [heatmaps.colour(0), heatmaps.colour(127 / 254), heatmaps.colour(1)],
        [heatmaps.colour(0), (128, 128, 128), heatmaps.colour(1)],
    ]
    assert np.array_equal(pixels, expected)


def test_numbers_reach_the_page_as_they_are():
    alignment = invented.alignment((3, 5))
    alignment.scores["cka"].matrix[1, 2] = np.nan
    numbers = json.loads(json.dumps(heatmaps.numbers(alignment, []), allow_nan=False))
    assert (numbers["rows"], numbers["columns"]) == (4, 6) and "distance" not in numbers["scores"]
    for name, packed in numbers["scores"].items():
        score = alignment.scores[name]
        np.testing.assert_allclose(unpacked(packed["score"], (4, 6)), score.matrix, atol=1e-4)
        for null, matrix in score.nulls.items():
            np.testing.assert_allclose(unpacked(packed["nulls"][null], (4, 6)), matrix, atol=1e-4)
        for end, there in zip(packed["interval"], score.interval, strict=True):
            np.testing.assert_allclose(unpacked(end, (4, 6)), there, atol=1e-4)


def test_neurons_are_ranked_by_shared_tokens_and_shared_tokens_are_marked():
    alignment = invented.alignment((3, 5))
    numbers = heatmaps.numbers(alignment, [])
    assert len(numbers["cells"]) == 4 * 6
    jaccard = alignment.scores["jaccard"].detail[2, 3].astype(float)
    entries = numbers["cells"]["2,3"]
    assert [entry[0] for entry in entries[:3]] == np.argsort(-jaccard)[:3].tolist()
    assert [entry[0] for entry in entries[3:]] == np.argsort(jaccard)[:3].tolist()
    for neuron, share, a, b in entries:
        assert share == round(1000 * jaccard[neuron])
        lists = [
            table[block, neuron].tolist()
            for table, block in zip(alignment.tokens, (2, 3), strict=True)
        ]
        for places, own, other in ((a, *lists), (b, *lists[::-1])):
            assert [numbers["words"][~place if place < 0 else place] for place in places] == [
                f"token{index}" for index in own[:3]
            ]
            assert [place < 0 for place in places] == [index in other for index in own[:3]]


def test_a_deep_alignment_has_the_neurons_of_seams_and_of_cells_near_equal_depth():
    numbers = heatmaps.numbers(invented.alignment((80, 80)), [Mark(80, 0, "1")])
    assert (
        len(numbers["cells"]) == heatmaps.CELLS
        and {"80,0", "0,0", "40,40", "80,80"} <= numbers["cells"].keys()
    )
    assert len(json.dumps(numbers)) < 1_500_000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "␣the"),
        ("\n", "↵"),
        ("\t", "⇥"),
        (" " * 24, "␣×24"),
        ("", "(empty)"),
        ("\u202e", "\\u202e"),
        ("x" * 99, "x" * 31 + "…"),
    ],
)
def test_tokens_show_what_is_in_them(text, shown):
    assert labels.token(text) == shown


def test_values_are_in_dark_letters_on_light_cells_and_in_light_ones_on_dark():
    drawing = heatmaps.heatmap(np.array([[0.1, 0.95]], np.float32), ("a", "b"), [], "t")
    assert re.findall(r'class="value (\w+)"[^>]*>([.\d]+)<', drawing.elements) == [
        ("light", ".10"),
        ("dark", ".95"),
    ]
