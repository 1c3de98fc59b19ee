"""`report --figures`: the page's figures as files."""

from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")

NAMES = {"alignment-ab", "splice", "prediction", "seams-recipe"}


def test_every_figure_is_drawn_as_png_and_svg(run, folder, tmp_path):
    from PIL import Image

    code, _, err = run("report", folder, "--figures", tmp_path / "figures")
    assert code == 0, err
    found = {path.name for path in (tmp_path / "figures").iterdir()}
    assert found == {f"{name}.{ending}" for name in NAMES for ending in ("png", "svg")}
    for name in NAMES:
        with Image.open(tmp_path / "figures" / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 80 and len(image.convert("RGB").getcolors(10**6)) > 20
        assert (
            ElementTree.parse(tmp_path / "figures" / f"{name}.svg").getroot().tag
            == "{http://www.w3.org/2000/svg}svg"
        )


def test_the_same_run_gives_the_same_figures(run, folder, tmp_path):
    for name in ("one", "two"):
        assert run("report", folder, "--figures", tmp_path / name)[0] == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_names_with_signs_of_formulas_are_drawn(tmp_path):
    from frankenmerge.reporting.figures import splice
    from frankenmerge.reporting.plots import save
    from frankenmerge.splicing.diagram import Piece, layout

    save(
        splice(layout([[Piece("$x_{", 0, 2)], [Piece("a^$\\frac", 1, 3)]], {})), tmp_path / "f.png"
    )
    assert (tmp_path / "f.png").stat().st_size > 1000


def test_without_matplotlib_the_extra_is_named(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("frankenmerge.cli.console.find_spec", lambda name: None)
    code, _, err = run("report", folder, "--figures", tmp_path / "figures")
    assert code == 1 and "frankenmerge[plots]" in err and not (tmp_path / "figures").exists()
