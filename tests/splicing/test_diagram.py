"""The picture of a splice: geometry that holds, SVG that is sound, colours that can be read."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.reporting.heatmaps import contrast
from frankenmerge.splicing.diagram import (
    COLOURS,
    DARK_COLOURS,
    Piece,
    described,
    layout,
    pieces_of,
    svg,
    visible,
)

RECIPES = Path(__file__).parents[2] / "recipes"
SVG = "{http://www.w3.org/2000/svg}"


def recipe(name: str):
    return parse_recipe((RECIPES / f"{name}.yaml").read_text(), name)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_known_frankenmerge_is_drawn_whole(path):
    found = parse_recipe(path.read_text(), path.name)
    slices = pieces_of(found, {})
    made = layout(slices, {})
    assert made.blocks == len(found.blocks) and len(made.seams) == len(found.seams)
    assert sum(cell.height for cell in made.slices) == pytest.approx(
        made.blocks * made.block_height
    )
    used = {(made.donors[cell.donor], int(cell.label)) for cell in made.columns if cell.used}
    assert used == {(block.model, block.index) for block in found.blocks}
    inside = [*made.columns, *made.slices]
    assert all(
        0 <= cell.x and cell.x + cell.width <= made.width and 0 <= cell.y <= made.height
        for cell in inside
    )
    root = ElementTree.fromstring(svg(slices, {}, "s"))
    assert root.tag == f"{SVG}svg" and root.get("role") == "img"
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert f"{made.blocks} blocks" in texts


def test_ribbons_lead_from_a_donor_s_blocks_to_where_they_go():
    made = layout([[Piece("x/a", 0, 3)], [Piece("x/b", 1, 4)]], {"x/a": 6, "x/b": 4})
    first, second = made.ribbons
    high = made.block_height
    assert [cell.donor for cell in made.columns].count(0) == 6 and [
        cell.donor for cell in made.columns
    ].count(1) == 4
    columns = {n: [cell for cell in made.columns if cell.donor == n] for n in (0, 1)}
    assert first.source[1:] == (columns[0][0].y, columns[0][0].y + 3 * high)
    assert second.source[1:] == (columns[1][1].y, columns[1][1].y + 3 * high)
    assert first.target[2] == second.target[1] == made.seams[0]


def test_slices_that_go_on_where_the_last_one_stopped_have_no_seam():
    assert layout([[Piece("a", 0, 3)], [Piece("a", 3, 5)]], {}).seams == []
    assert len(layout([[Piece("a", 0, 3)], [Piece("a", 2, 5)]], {}).seams) == 1


def test_sources_of_one_slice_are_next_to_each_other():
    made = layout([[Piece("a", 0, 4), Piece("b", 0, 4)]], {})
    one, other = made.slices
    assert one.y == other.y and one.x + one.width == other.x and made.blocks == 4


def test_whole_models_are_included_where_their_depth_is_known():
    whole = parse_recipe(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}", "r"
    )
    assert pieces_of(whole, {}) == []
    assert pieces_of(whole, {"a": 4, "b": 4}) == [[Piece("a", 0, 4), Piece("b", 0, 4)]]


def test_the_picture_in_words():
    text = described([[Piece("org/a", 0, 3)], [Piece("org/b", 5, 6), Piece("c", 1, 2)]])
    assert text == "The result has 4 blocks: 0–2 from a 0–2; 3 from b 5 merged with c 1."


@pytest.mark.parametrize(
    "name",
    ["</title><script>alert(1)</script>", 'a"b', "a\x00b\x1b[31m", "\u202eevil", "\ud800", "a&b;<"],
)
def test_a_hostile_name_is_escaped_and_does_nothing(name):
    text = svg([[Piece(name, 0, 2)]], {}, "s")
    root = ElementTree.fromstring(text.encode("utf-8"))
    assert not list(root.iter(f"{SVG}script")) and "\u202e" not in text and "\x1b" not in text


def test_nothing_stays_hidden_in_a_text():
    assert visible("a\u202eb\u200b\n\x07é中") == "a\\u202eb\\u200b\\u000a\\u0007é中"


@pytest.mark.parametrize(("colours", "text"), [(COLOURS, "#ffffff"), (DARK_COLOURS, "#161a22")])
def test_text_on_every_donor_s_colour_can_be_read(colours, text):
    def shade(colour: str) -> tuple[int, int, int]:
        red, green, blue = bytes.fromhex(colour[1:])
        return red, green, blue

    assert all(contrast(shade(colour), shade(text)) >= 4.5 for colour in colours)


def test_one_splice_gives_the_same_picture_twice():
    slices = pieces_of(recipe("goliath-120b"), {})
    assert svg(slices, {}, "s") == svg(slices, {}, "s")
