"""Are features aligned in language models, and not in vision transformers?

The source document's comparison, with the same scores, nulls and intervals on both sides: features
of equal index after different blocks of a model, in models of different sizes, before and after
training. Usage:

    python evals/zoo/vision.py --out ZOO
    python evals/vision_alignment.py --vision ZOO --out RESULTS

`--language` names the folder of the language donors (the demo's by default). A language model
ranks 1,024 tokens, each alone, a vision transformer 1,024 images; correlations are over 1,024
random tokens in context, over the images, and over 1,024 single patches. Prints a table in
Markdown, and writes `table.json` and the feature maps to RESULTS.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch

from frankenmerge.analysis.align import FUNCTIONS
from frankenmerge.analysis.nulls import mean_interval
from frankenmerge.artefacts.alignment import Score
from frankenmerge.artefacts.atlas import Atlas
from frankenmerge.donors.images import image_shape
from frankenmerge.models.images import images_in, patch_states
from frankenmerge.models.loading import load_model
from frankenmerge.reporting.pictures import sheet
from frankenmerge.splicing.opening import open_donor
from frankenmerge.workflows.atlases import add_inputs, atlas_of

DEMO = Path(__file__).parents[1] / "frankenmerge" / "demo" / "donors"
IMAGES = 1024
SCORES = ("jaccard", "argmax", "correlation")
SEARCHED = list(range(0, 64, 4))
"""Neurons for which images are searched."""
Pairs = list[tuple[int, int]]
"""Blocks of A and of B."""


class Row(NamedTuple):
    """One comparison by one score: means over pairs of blocks and over neurons."""

    domain: str
    comparison: str
    score: str
    value: float
    low: float
    high: float
    permuted: float
    """Under permuted neurons."""
    law: float | None
    """The residual law, for correlations."""


def layers(atlas: Atlas, apart: int | None = None) -> Pairs:
    """All pairs of different blocks of one model, or those that are so many blocks apart."""
    numbers = range(1, atlas.blocks + 1)
    return [(i, j) for i in numbers for j in numbers if i < j and apart in (None, j - i)]


def depths(a: Atlas, b: Atlas) -> Pairs:
    """Blocks of equal relative depth, rounded, of the model with fewer blocks."""
    fewer = min(a.blocks, b.blocks)
    return [(round(i * a.blocks / fewer), round(i * b.blocks / fewer)) for i in range(1, fewer + 1)]


def rows_of(domain: str, comparison: str, a: Atlas, b: Atlas, pairs: Pairs) -> Iterator[Row]:
    """A row for every score."""
    width = min(a.width, b.width)
    for name in SCORES:
        score = FUNCTIONS[name](a, b, "plain", width)
        yield row_of(domain, comparison, name, score, pairs)


def row_of(domain: str, comparison: str, name: str, score: Score, pairs: Pairs) -> Row:
    """The mean over pairs of blocks; its interval resamples neurons."""
    left, right = (list(numbers) for numbers in zip(*pairs, strict=True))
    detail = score.detail[left, right].astype(np.float32).mean(axis=0)
    detail = detail[np.isfinite(detail)]
    low, high = mean_interval(detail[None, None])[:, 0, 0].tolist()
    law = score.nulls.get("residual_law")
    return Row(
        domain,
        comparison,
        name,
        float(detail.mean()),
        low,
        high,
        float(score.nulls["permuted_neurons"][left, right].mean()),
        None if law is None else float(law[left, right].mean()),
    )


def comparisons(
    domain: str, model: Atlas, other_size: Atlas, untrained: Atlas, start: Atlas
) -> Iterator[Row]:
    """All rows of one domain; `start` is the model before its first step."""
    yield from rows_of(domain, "blocks of a model", model, model, layers(model))
    yield from rows_of(domain, "neighbouring blocks", model, model, layers(model, 1))
    yield from rows_of(domain, "blocks, other size", other_size, other_size, layers(other_size))
    yield from rows_of(domain, "blocks, untrained", untrained, untrained, layers(untrained))
    yield from rows_of(domain, "two sizes", model, other_size, depths(model, other_size))
    unlike = "trained and untrained, another start"
    yield from rows_of(domain, unlike, model, untrained, depths(model, untrained))
    same = "trained and untrained, same start"
    yield from rows_of(domain, same, model, start, depths(model, start))


def searched(model: Atlas, other_size: Atlas, start: Atlas) -> Iterator[Row]:
    """Rows of images by gradient ascent."""
    for comparison, b, pairs in (
        ("blocks of a model", model, layers(model)),
        ("neighbouring blocks", model, layers(model, 1)),
        ("two sizes", other_size, depths(model, other_size)),
        ("trained and untrained, same start", start, depths(model, start)),
    ):
        score = FUNCTIONS["pixels"](model, b, "plain", min(model.width, b.width))
        yield row_of("vision", comparison, "images by ascent", score, pairs)


@torch.no_grad()
def by_patch(atlas: Atlas, folder: Path, images: Path, *, untrained: int | None = None) -> Atlas:
    """The atlas with 1,024 single patches as its probes, those of evenly spaced images."""
    checkpoint = open_donor(str(folder))
    model, shape = load_model(checkpoint, untrained=untrained), image_shape(checkpoint)
    shown = images_in(images)
    step = max(1, len(shown.names) * shape.patches // IMAGES)
    pixels = torch.stack([shown.read(index, shape) for index in range(0, len(shown.names), step)])
    states = torch.stack([state.flatten(0, 1) for state in patch_states(model, pixels, shape)])
    found = states[:, :IMAGES].numpy()
    scale = np.abs(found).max(axis=1)
    return replace(atlas, probes=(found / scale[:, None]).astype(np.float16), probe_scale=scale)


def first_images(folder: Path, out: Path) -> Path:
    """A folder of the first 1,024 images."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir())[:IMAGES]:
        shutil.copy(path, out / path.name)
    return out


def markdown(rows: list[Row]) -> str:
    """Both domains side by side."""
    lines = ["| comparison | score | language | by chance | law | vision | by chance | law |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    keys = dict.fromkeys((row.comparison, row.score) for row in rows)
    for key in keys:
        cells = []
        for domain in ("language", "vision"):
            row = next(
                (r for r in rows if (r.comparison, r.score) == key and r.domain == domain), None
            )
            if row is None:
                cells += [""] * 3
                continue
            cells.append(f"{row.value:.2f} ({row.low:.2f} to {row.high:.2f})")
            cells += [f"{row.permuted:.2f}", "" if row.law is None else f"{row.law:.2f}"]
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines)


@click.command()
@click.option("--vision", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--language", type=click.Path(exists=True, path_type=Path), default=DEMO)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(vision: Path, language: Path, out: Path) -> None:
    """Print the table, and write it and the feature maps to OUT."""
    torch.set_num_threads(1)
    cache = out / "cache"
    images = first_images(vision / "digits", out / "images")

    def of(name: Path, *, untrained: int | None = None, shown: Path | None = None) -> Atlas:
        return atlas_of(str(name), untrained=untrained, images=shown, cache=cache)

    base, large = language / "base", language / "wide"
    text = of(base), of(large), of(base, untrained=100), of(base, untrained=0)
    rows = list(comparisons("language", *text))
    vit, wide, start = (
        of(vision / name, shown=images) for name in ("vit", "vit-wide", "vit-untrained")
    )
    other = of(vision / "vit", untrained=100, shown=images)
    rows += comparisons("vision", vit, wide, other, start)
    patches = [
        by_patch(vit, vision / "vit", images),
        by_patch(wide, vision / "vit-wide", images),
        by_patch(other, vision / "vit", images, untrained=100),
        by_patch(start, vision / "vit-untrained", images),
    ]
    rows += [
        row._replace(score="correlation, patches")
        for row in comparisons("vision", *patches)
        if row.score == "correlation"
    ]
    pictured = {
        name: add_inputs(str(vision / name), atlas, "pixels", SEARCHED, cache=cache)
        for name, atlas in (("vit", vit), ("vit-wide", wide), ("vit-untrained", start))
    }
    rows += searched(*pictured.values())
    write_maps(pictured, out)
    click.echo(markdown(rows))
    (out / "table.json").write_text(json.dumps([row._asdict() for row in rows], indent=1))


def write_maps(pictured: dict[str, Atlas], out: Path) -> None:
    """A PNG of optimised images and one of top images for each donor, a row for each block."""
    for name, atlas in pictured.items():
        assert atlas.pictures is not None and atlas.thumbnails is not None
        (out / f"{name}-ascent.png").write_bytes(sheet(atlas.pictures.pixels[:, :8, None]))
        where = np.searchsorted(atlas.thumbnails.images, atlas.top["plain"].tokens[:, :8, :3])
        (out / f"{name}-top.png").write_bytes(sheet(atlas.thumbnails.pixels[where]))


if __name__ == "__main__":
    main()
