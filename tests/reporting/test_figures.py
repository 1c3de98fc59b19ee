"""`report --figures`: the page's figures as files."""

import re
from pathlib import Path
from xml.etree import ElementTree

import invented
import pytest

from frankenmerge.reporting import figures, svg
from frankenmerge.reporting.page import page
from frankenmerge.reporting.run import read_run
from frankenmerge.splicing import diagram

pytest.importorskip("resvg_py", reason="the extra `plots` is not installed")

SVG = "{http://www.w3.org/2000/svg}"
NAMES = {
    "alignment-ab",
    "splice",
    "prediction",
    "seams-recipe",
    "differences-evaluation",
    "retention-evaluation",
    "tasks-evaluation",
    "gain-best",
    "sweep-one",
}


@pytest.fixture
def written(run, folder, tmp_path) -> Path:
    code, _, err = run("report", folder, "--figures", tmp_path / "figures")
    assert code == 0, err
    return tmp_path / "figures"


def test_every_figure_is_drawn_as_png_and_svg(written):
    from PIL import Image

    files = {path.name for path in written.iterdir()}
    assert files == {f"{name}.{ending}" for name in NAMES for ending in ("png", "svg")}
    for name in NAMES:
        root = ElementTree.parse(written / f"{name}.svg").getroot()
        assert root.tag == f"{SVG}svg" and root.findtext(f"{SVG}title")
        with Image.open(written / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 80 and len(image.convert("RGB").getcolors(10**6)) > 20
            expected = [svg.PNG_SCALE * float(root.attrib[key]) for key in ("width", "height")]
            assert image.size == pytest.approx(expected, abs=1)
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_figures_use_nothing_that_other_programs_do_not_know(written):
    for path in written.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"var\(|--\w|@media|:root|:not|!important", text), path.name
        links = re.findall(r'href="([^"]*)"', text)
        assert all(link.startswith("data:image/png;base64,") for link in links)


def test_the_page_has_the_same_drawings(folder):
    html, run = page(read_run(folder)), read_run(folder)
    (evaluation,) = run.evaluations.values()
    drawings = [
        figures.prediction(evaluation.predictions),
        figures.differences(evaluation),
        figures.retention(evaluation.retention),
        figures.task_differences(evaluation.task_differences),
        *(chart.drawing for chart in figures.block_charts(evaluation.seams[0])),
    ]
    assert len(drawings) == 7
    assert all(drawing.elements in html for drawing in drawings)


def test_the_same_run_gives_the_same_figures(run, folder, tmp_path):
    for name in ("one", "two"):
        assert run("report", folder, "--figures", tmp_path / name)[0] == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_figures_of_the_same_name_do_not_replace_each_other(run, folder, tmp_path):
    other = invented.evaluation(donors=("x/one", "y/two"), blocks=8)
    invented.write(folder / "other.json", other)
    assert run("report", folder, "--figures", tmp_path / "figures")[0] == 0
    names = {path.name for path in (tmp_path / "figures").glob("seams-*.svg")}
    assert names == {"seams-recipe.svg", "seams-recipe-2.svg"}


# Text


def pixels(label: str):
    import io

    import numpy as np
    from PIL import Image

    drawing = svg.Drawing("chart", "t", "", 200, 20, svg.text(100, 14, label, "soft"))
    content = io.BytesIO(svg.png(svg.standalone(drawing)))
    with Image.open(content) as image:
        return np.asarray(image.convert("L"))


@pytest.mark.parametrize("label", ["one", "$x_{", "日本語", "\U0001f600", "\u0e01", "␣↵⇥–…∞"])
def test_no_text_vanishes(label):
    ink = (pixels(label) < 128).sum()
    assert ink > 10 * len(label)


def test_characters_that_the_font_lacks_are_written_as_their_codes():
    assert (pixels("日") == pixels(r"\u65e5")).all() and (pixels("日") != pixels("本")).any()


def test_hostile_names_stay_text():
    name = "</style><script>alert(1)</script>]]>&var(--ink)"
    pieces = [[diagram.Piece(name, 0, 2)], [diagram.Piece("a", 1, 3)]]
    for text in (
        svg.with_light_colours(diagram.svg(pieces, {}, "s")),
        svg.standalone(svg.Drawing("chart", name, name, 9, 9, svg.text(1, 1, name, "soft"))),
    ):
        root = ElementTree.fromstring(text)
        assert not list(root.iter(f"{SVG}script")) and "var(--ink)" in "".join(root.itertext())
        assert svg.png(text).startswith(b"\x89PNG")


# Without the extra


def test_svg_needs_no_extra_and_png_names_it(folder, tmp_path, monkeypatch):
    from frankenmerge.errors import FrankenmergeError

    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    (alignment,) = read_run(folder).alignments.values()
    figures.plot_alignment(alignment, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").is_file()
    with pytest.raises(FrankenmergeError, match=r"frankenmerge\[plots\]"):
        figures.plot_alignment(alignment, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("missing", ["resvg_py", "matplotlib"])
def test_without_the_packages_that_write_png_the_extra_is_named(
    run, folder, donors, tmp_path, monkeypatch, missing
):
    monkeypatch.setattr("frankenmerge.cli.console.find_spec", lambda name: name != missing or None)
    code, _, err = run("report", folder, "--figures", tmp_path / "figures")
    assert code == 2 and "frankenmerge[plots]" in err and missing in err
    assert not (tmp_path / "figures").exists()
    align = ("align", donors["a"], donors["b"], "-o", tmp_path / "x.alignment.safetensors")
    code, _, err = run(*align, "--plot", tmp_path / "x.png")
    assert code == 2 and "frankenmerge[plots]" in err and missing in err
    assert not (tmp_path / "x.alignment.safetensors").exists()


def test_the_command_plots_svg_without_the_packages_that_write_png(
    run, donors, tmp_path, monkeypatch
):
    monkeypatch.setattr("frankenmerge.cli.console.find_spec", lambda name: None)
    for name in ("resvg_py", "matplotlib"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    align = ("align", donors["a"], donors["b"], "-o", tmp_path / "x.alignment.safetensors")
    code, _, err = run(*align, "--plot", tmp_path / "x.svg")
    assert code == 0, err
    assert (tmp_path / "x.svg").read_text().startswith("<svg")
