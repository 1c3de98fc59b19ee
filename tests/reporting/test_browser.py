"""The report in Chromium: what a reader sees, reaches with the keyboard, and prints."""

import re

import invented
import pytest

from frankenmerge.artefacts.alignment import load_alignment
from frankenmerge.artefacts.scores import SCORES
from frankenmerge.reporting.heatmaps import contrast
from frankenmerge.reporting.page import page as written
from frankenmerge.reporting.run import read_run


@pytest.fixture(scope="module")
def site(browser, tmp_path_factory):
    """The report's address, its alignment, and a function that opens it with given settings."""
    folder = invented.write_run(tmp_path_factory.mktemp("run") / "run", ("<b>bold</b>", " it's"))
    place = folder / "report.html"
    place.write_text(written(read_run(folder)), encoding="utf-8")
    return place, load_alignment(folder / "ab.alignment.safetensors")


@pytest.fixture
def opened(browser, site):
    """Open the report; by the end, nothing failed and only the page itself was requested."""
    pages, messages, requests = [], [], []

    def call(**settings):
        page = browser.new_page(**settings)
        pages.append(page)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(site[0].as_uri())
        return page

    yield call
    for page in pages:
        page.close()
    assert messages == [] and pages
    assert [url for url in requests if not url.startswith("data:")] == [site[0].as_uri()] * len(
        pages
    )


def cell(page, row: int, column: int) -> tuple[float, float]:
    """The middle of a cell of the heatmap in view."""
    box = page.locator(".panel.current .heatbox .cells").bounding_box()
    return box["x"] + (column + 0.5) * box["width"] / 7, box["y"] + (row + 0.5) * box["height"] / 7


def test_pointing_at_a_cell_shows_scores_nulls_interval_and_neurons(opened, site):
    page, score = opened(), site[1].scores["jaccard"]
    page.locator(".panel.current .heatbox").scroll_into_view_if_needed()
    page.mouse.move(*cell(page, 2, 3))
    detail = page.locator(".detail").inner_text()
    low, high = score.interval[:, 2, 3]
    assert "one after 2 blocks and two after 3 blocks" in detail
    assert f"{score.matrix[2, 3]:.3f} ({low:.3f} to {high:.3f})" in detail
    assert f"other neurons {score.nulls['permuted_neurons'][2, 3]:.3f}" in detail
    best = int(score.detail[2, 3].argmax())
    assert re.search(rf"Agree most\s+{best} \({float(score.detail[2, 3, best]):.2f}\)", detail)
    vocabulary, tokens = site[1].vocabulary, site[1].tokens[0][2, best]
    chips = page.locator(".detail li").first.locator(".chip").all_inner_texts()
    assert [chip.removeprefix("•") for chip in chips[:3]] == [
        vocabulary[token].replace(" ", "␣") for token in tokens[:3]
    ]
    page.mouse.move(*cell(page, 6, 0))
    assert "one after 6 blocks and two's embedding" in page.locator(".detail").inner_text()


def test_the_keyboard_reaches_every_cell_and_screen_readers_announce_it(opened, site):
    page, matrix = opened(), site[1].scores["jaccard"].matrix
    page.locator(".panel.current .heatbox").focus()
    for key in ("Home", *["ArrowUp"] * 7, "ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert (
        f"one after 1 block and two after 2 blocks: {matrix[1, 2]:.3f}"
        in page.locator(".live").inner_text()
    )
    assert f"{matrix[1, 2]:.3f}" in page.locator(".detail").inner_text()
    cursor, cells = (
        page.locator(f".panel.current .heatbox .{name}").bounding_box()
        for name in ("cursor", "cells")
    )
    assert cursor["x"] + cursor["width"] / 2 == pytest.approx(
        cells["x"] + 2.5 * cells["width"] / 7, abs=2
    )
    for key in ["ArrowLeft"] * 20 + ["ArrowDown"] * 20:
        page.keyboard.press(key)
    assert f"{matrix[6, 0]:.3f}" in page.locator(".detail").inner_text()


def test_tab_goes_first_to_the_report_and_focus_can_be_seen(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left >= 0")
    focused = """(() => { const part = document.activeElement, style = getComputedStyle(part);
        const width = parseFloat(style.outlineWidth);
        return part === document.body ? null
            : [part.outerHTML.slice(0, 80), style.outlineStyle, width]; })()"""
    reached = []
    while len(reached) < 300 and (focus := page.evaluate(focused)):
        reached.append(focus)
        page.keyboard.press("Tab")
    assert 20 < len(reached) < 300
    assert [part for part, style, width in reached if style == "none" or width < 2] == []


def test_the_selector_changes_the_score(opened, site):
    page = opened()
    for name in ("cka", "correlation"):
        page.get_by_role("radio", name=SCORES[name].title, exact=True).check()
        assert page.locator(".panel:visible").count() == 1
        assert page.locator(".panel.current h4").inner_text() == SCORES[name].title
        page.get_by_role("button", name="Seam 1").click()
        assert f"{site[1].scores[name].matrix[4, 2]:.3f}" in page.locator(".detail").inner_text()
    assert page.locator(".panel.current .nulls figure").count() == 3  # the residual law too


def test_seams_of_the_plan_are_marked_and_lead_to_their_cells(opened):
    page = opened()
    # One's block 3 to two's block 2 is row 4, column 2; two's block 4 to one's block 4 is column 5,
    # row 4.
    assert page.locator(".panel.current .heatbox .mark.ring").count() == 2
    page.get_by_role("button", name="Seam 2").click()
    assert "one after 4 blocks and two after 5 blocks" in page.locator(".detail").inner_text()


def test_searching_leaves_the_neurons_with_that_token(opened):
    page = opened()
    page.get_by_label("Show neurons with the token").fill("token7")
    rows = page.locator(".features tbody tr:visible")
    assert rows.count() > 0 and all("token7" in text for text in rows.all_inner_texts())
    assert re.fullmatch(rf"{rows.count()} of \d+ rows", page.locator("#found").inner_text())
    page.get_by_label("Show neurons with the token").fill("no such token")
    assert rows.count() == 0 and page.locator("#found").inner_text().startswith("0 of")


@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_is_wider_than_a_phone(opened, width):
    page = opened(viewport={"width": width, "height": 740})
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll('main *')]
        .filter((part) => !part.closest('.box, pre, .live, svg')
            && part.getBoundingClientRect().right > innerWidth + 1)
        .map((part) => part.outerHTML.slice(0, 120))"""
    assert page.evaluate(outside) == []


def test_a_tap_shows_the_value_below_the_map_of_a_phone(opened, site):
    page = opened(viewport={"width": 360, "height": 740}, has_touch=True)
    page.locator(".panel.current .heatbox").scroll_into_view_if_needed()
    page.touchscreen.tap(*cell(page, 3, 4))
    assert (
        f"{site[1].scores['jaccard'].matrix[3, 4]:.3f}"
        in page.locator(".panel.current .brief").inner_text()
    )


def test_paper_shows_everything(opened):
    page = opened()
    closed = page.locator("details:not([open])").count()
    page.emulate_media(media="print")
    assert (
        closed > 3 and page.locator("details:not([open])").count() == closed
    )  # the style sheet does it, no script
    for kind in (
        ".panel",
        ".features table",
        ".values table",
        "#provenance ~ details dl",
        ".scale",
        ".detail",
    ):
        parts = page.locator(kind)
        assert parts.count() > 0 and all(
            parts.nth(place).is_visible() for place in range(parts.count())
        ), kind
    assert not page.locator("nav").is_visible() and not page.locator(".choice").first.is_visible()
    assert len(page.pdf()) > 50_000


def test_nothing_is_cut_off_on_paper(opened):
    page = opened(viewport={"width": 703, "height": 1000})  # A4 between the margins, in CSS pixels
    page.emulate_media(media="print")
    beyond = page.evaluate(
        "[...document.querySelectorAll('table, svg, pre, p, .chip')]"
        ".filter((part) => part.getBoundingClientRect().right > 704)"
        ".map((part) => part.outerHTML.slice(0, 80))"
    )
    assert beyond == []


def test_without_scripts_nothing_is_lost(browser, site):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site[0].as_uri())
    panels = page.locator(".panel")
    assert panels.count() == len([score for score in site[1].scores.values() if score.nulls])
    assert all(panels.nth(place).is_visible() for place in range(panels.count()))
    context.close()


def test_hostile_tokens_stay_text(opened):
    page = opened()
    page.get_by_label("Show neurons with the token").fill("<b>bold</b>")
    assert page.locator(".features .chip", has_text="<b>bold</b>").first.is_visible()
    assert page.locator("b", has_text=re.compile("^bold$")).count() == 0


# What assistive software needs


def test_landmarks_headings_and_names(opened):
    page = opened()
    assert page.evaluate("document.documentElement.lang") == "en" and page.title()
    for landmark in ("banner", "navigation", "main"):
        assert page.get_by_role(landmark).count() == 1, landmark
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map((part) => Number(part.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False)), (
        levels
    )
    unnamed = """
        [...document.querySelectorAll('svg, [role=img], [tabindex], input, nav, section, article')]
        .filter((part) => part.getAttribute('aria-hidden') !== 'true'
          && !part.getAttribute('aria-label') && !part.labels?.length
          && !document.getElementById((part.getAttribute('aria-labelledby') ?? '').split(' ')[0]))
        .map((part) => part.outerHTML.slice(0, 120))"""
    assert page.evaluate(unnamed) == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((part) => part.id)")
    assert len(ids) == len(set(ids))
    dead = "[...document.querySelectorAll('a')].filter((a) => !document.querySelector(a.hash))"
    assert page.evaluate(f"{dead}.length") == 0


def test_every_table_has_a_caption_and_headers_with_a_scope(opened):
    page = opened()
    assert page.evaluate(
        "[...document.querySelectorAll('table')]"
        ".every((table) => table.caption && table.caption.textContent.trim())"
    )
    assert page.evaluate(
        "[...document.querySelectorAll('th')].every((th) => ['row', 'col'].includes(th.scope))"
    )


CONTRAST = """
() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (part) =>
    (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  function ground(part) {
    for (; part; part = part.parentElement) {
      const colour = parse(getComputedStyle(part).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  }
  const faint = [];
  for (const part of document.querySelectorAll('body *')) {
    const own = [...part.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || part.closest('script, style, svg, .live, desc, title')) continue;
    const shades = [light(parse(getComputedStyle(part).color)), light(ground(part))];
    const [low, high] = shades.sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) faint.push(part.outerHTML.slice(0, 120));
  }
  return faint;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(opened, scheme):
    page = opened(color_scheme=scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    assert page.evaluate(CONTRAST) == []
    charts = """
        [...document.querySelectorAll('.chart text, .heat .tick, .heat .axis, .splice text.soft')]
        .map((part) => getComputedStyle(part).fill)"""
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")

    def shade(text: str) -> tuple[int, int, int]:
        red, green, blue = (int(part) for part in re.findall(r"\d+", text)[:3])
        return red, green, blue

    fills = set(page.evaluate(charts))
    assert fills and all(contrast(shade(fill), shade(ground)) >= 4.5 for fill in fills), fills


def test_a_page_of_deep_donors_answers(browser, tmp_path):
    folder = invented.write_run(tmp_path / "run", blocks=(80, 80))
    (tmp_path / "report.html").write_text(written(read_run(folder)), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    page.locator(".panel.current .heatbox").focus()
    for key in ("Home", *["ArrowUp"] * 5):
        page.keyboard.press(key)
    matrix = load_alignment(folder / "ab.alignment.safetensors").scores["jaccard"].matrix
    assert (
        f"{matrix[0, 0]:.3f}" in page.locator(".detail").inner_text()
        and page.locator(".detail li").count() == 6
    )
    page.keyboard.press("End")
    assert f"{matrix[0, 80]:.3f}" in page.locator(".detail").inner_text()
    assert "To keep this page small" in page.locator(".detail").inner_text()
    page.close()
