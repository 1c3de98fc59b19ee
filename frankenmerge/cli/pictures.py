"""What `features` prints of images that were optimised, and the sheet of all images found."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from frankenmerge.cli.console import out, table

if TYPE_CHECKING:
    from frankenmerge.workflows.searches import FoundPictures, SearchResult


def write_sheet(pictures: "FoundPictures", path: Path) -> None:
    """Write all images to one PNG file: a row for each block, the features side by side."""
    from frankenmerge.reporting.pictures import sheet
    from frankenmerge.storage.atomic import write_file

    write_file(path, sheet(pictures.pixels))


@dataclass(frozen=True)
class ShownPictures:
    """Optimised images, and what their output needs."""

    result: "SearchResult"
    pictures: "FoundPictures"
    title: str
    record: dict[str, Any]
    """What was searched."""

    def json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        assert self.pictures.activations is not None
        activations = self.pictures.activations.ravel().tolist()
        rows = [
            {
                "block": feature.block,
                "feature": feature.notation,
                "neuron": feature.neuron if len(feature.neurons) == 1 else None,
                "activation": activation,
            }
            for feature, activation in zip(self.result.features, activations, strict=True)
        ]
        return {**self.record, "unit": "standard deviations of images of noise", "features": rows}

    def print(self) -> None:
        """Print a table of the activations that were reached."""
        assert self.pictures.activations is not None
        of_one_block = self.result.features[: self.pictures.activations.shape[1]]
        rows = table(
            f"{self.title}: activation, in standard deviations of images of noise",
            "block",
            *(feature.notation for feature in of_one_block),
        )
        for block, values in zip(self.result.blocks, self.pictures.activations, strict=True):
            rows.add_row(str(block), *(f"{value:.1f}" for value in values))
        out().print(rows)
        if output := self.record.get("output"):
            out().print(f"Written to {output}", markup=False)
        else:
            click.echo("Add -o FILE.png for the images.", err=True)
