"""The figure of an alignment: files that open, the same bytes for the same alignment."""

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from frankenmerge.artefacts.alignment import Alignment, Score

pytest.importorskip("resvg_py", reason="the extra `plots` is not installed")


def invented(blocks=(3, 5), value: float | None = None) -> Alignment:
    generator = np.random.default_rng(0)
    shape = blocks[0] + 1, blocks[1] + 1

    def score():
        matrix = (
            generator.random(shape, dtype=np.float32)
            if value is None
            else np.full(shape, value, np.float32)
        )
        return Score(matrix, {"permuted_neurons": matrix / 10}, np.zeros((*shape, 4), np.float16))

    scores = {name: score() for name in ("argmax", "correlation", "jaccard")}
    tokens = tuple(np.zeros((count + 1, 4, 10), np.int32) for count in blocks)
    return Alignment(("some/where/one", "two"), ("f", "g"), (4, 4), scores, tokens, ["<s>"], {})


def plotted(alignment: Alignment, path):
    from frankenmerge.reporting.figures import plot_alignment

    plot_alignment(alignment, path)
    return path


@pytest.mark.parametrize("blocks", [(3, 5), (1, 1), (32, 24)])
def test_a_png_opens_and_is_not_blank(tmp_path, blocks):
    from PIL import Image

    with Image.open(plotted(invented(blocks), tmp_path / "plot.png")) as image:
        image.load()
        assert image.format == "PNG" and image.width > image.height > 200
        assert len(image.convert("RGB").getcolors(10**6)) > 50


def test_an_svg_opens(tmp_path):
    root = ElementTree.parse(plotted(invented(), tmp_path / "plot.svg")).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(root.iter("{http://www.w3.org/2000/svg}image"))) >= 3


def test_one_alignment_gives_the_same_bytes_twice(tmp_path):
    assert (
        plotted(invented(), tmp_path / "one.png").read_bytes()
        == plotted(invented(), tmp_path / "two.png").read_bytes()
    )


def test_another_alignment_gives_another_picture(tmp_path):
    one, other = (
        plotted(invented(), tmp_path / "one.png"),
        plotted(invented(value=0.5), tmp_path / "other.png"),
    )
    assert one.read_bytes() != other.read_bytes()


def test_colours_run_from_no_agreement_to_full_agreement(tmp_path):
    """Viridis ranges from dark violet to yellow: ones are yellow, zeros violet."""
    from PIL import Image

    shares = {}
    for value in (0.0, 1.0):
        with Image.open(plotted(invented((20, 20), value), tmp_path / f"{value}.png")) as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        shares[value] = {
            name: (pixels == colour).all(axis=1).mean()
            for name, colour in (("violet", (68, 1, 84)), ("yellow", (253, 231, 37)))
        }
    assert shares[1.0]["yellow"] > 0.3 > 0.05 > shares[1.0]["violet"]
    assert shares[0.0]["violet"] > 0.3 > 0.05 > shares[0.0]["yellow"]


def test_a_single_score_is_drawn_too(tmp_path):
    alignment = invented()
    assert (
        plotted(
            replace(alignment, scores={"jaccard": alignment.scores["jaccard"]}),
            tmp_path / "plot.png",
        )
        .stat()
        .st_size
        > 1000
    )


def test_the_command_line_draws_what_it_aligned(donors, run, tmp_path):
    from frankenmerge.artefacts.alignment import load_alignment

    output, plot = tmp_path / "ab.alignment.safetensors", tmp_path / "ab.png"
    code, _, _ = run("align", donors["a"], donors["b"], "-o", output, "--plot", plot)
    assert code == 0
    assert plot.read_bytes() == plotted(load_alignment(output), tmp_path / "again.png").read_bytes()


@pytest.mark.parametrize("plot", ["no/such/folder/ab.png", "ab.txt"])
def test_a_picture_that_cannot_be_drawn_is_a_mistake_reported_without_a_traceback(
    donors, run, tmp_path, plot
):
    code, _, err = run(
        "align",
        donors["a"],
        donors["b"],
        "-o",
        tmp_path / "ab.alignment.safetensors",
        "--plot",
        tmp_path / plot,
    )
    assert (code == 0 and (tmp_path / plot).is_file()) or (
        code == 2 and "ab" in err and "Traceback" not in err
    )
