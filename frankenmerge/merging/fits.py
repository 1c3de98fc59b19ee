"""The fits of a merge's gauges: made once by its first process, kept beside the journal for the others and for whoever resumes.

A fit may differ in its last bits with the number of threads, or from one machine to another: all
shards of a merge are of one.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import fail
from frankenmerge.merging.journal import PAUSE, is_held
from frankenmerge.progress import Progress, silent
from frankenmerge.storage.arrays import read_arrays, write_arrays

if TYPE_CHECKING:
    import numpy as np

    from frankenmerge.splicing.gauge_fitting import Fit
    from frankenmerge.splicing.rotation import Rotation

FITS = "fits.safetensors"
_KIND = "frankenmerge.fits/1"


def fits_in(
    folder: Path, recipe: Recipe, donors: Mapping[str, Checkpoint], progress: Progress = silent
) -> "dict[int, Fit]":
    """The fits of a merge that grows in `folder`: those of an earlier run, or new ones, which are kept there."""
    if not recipe.has_gauges:
        return {}
    from frankenmerge.splicing.gauge_fitting import fitted_rotations

    if not (folder / FITS).is_file():
        save_fits(fitted_rotations(recipe, donors, progress), folder / FITS)
    return load_fits(folder / FITS)


def awaited_fits(folder: Path, output: Path, recipe: Recipe) -> "dict[int, Fit] | None":
    """The fits that the first process makes in `folder`, waited for as long as it is there; None where it has finished already.

    Raises FrankenmergeError where it ended before.
    """
    if not recipe.has_gauges:
        return {}
    while not (folder / FITS).is_file():
        if not is_held(folder):
            if output.is_dir():
                return None
            raise fail(
                str(folder),
                "the first process (RANK 0), which fits the gauges",
                "none",
                "start all processes of the merge together",
            )
        time.sleep(PAUSE)
    return load_fits(folder / FITS)


def save_fits(fits: "Mapping[int, Fit]", path: Path) -> None:
    """Write fits, complete or not at all."""
    arrays, told = {}, {}
    for number, fit in fits.items():
        rotations = [fit.rotation, *fit.refined]
        told[str(number)] = {
            "residual": fit.residual,
            "scales": [rotation.scale for rotation in rotations],
        }
        for place, rotation in enumerate(rotations):
            arrays[f"{number}.{place}.matrix"] = rotation.matrix.numpy()
            arrays |= (
                {}
                if rotation.writing is None
                else {f"{number}.{place}.writing": rotation.writing.numpy()}
            )
    write_arrays(path, _KIND, arrays, told)


def load_fits(path: Path) -> "dict[int, Fit]":
    """Read fits. Raises FrankenmergeError for a file that holds none."""
    from frankenmerge.splicing.gauge_fitting import Fit

    arrays, told = read_arrays(path, _KIND, "the fits of a merge")
    try:
        fits = {}
        for number, fit in told.items():
            rotations = [
                _rotation(arrays, f"{number}.{place}", scale)
                for place, scale in enumerate(fit["scales"])
            ]
            fits[int(number)] = Fit(rotations[0], fit["residual"], tuple(rotations[1:]))
        return fits
    except (KeyError, ValueError, TypeError) as error:
        raise fail(
            str(path),
            "the fits of a merge with all their parts",
            f"{error} missing or broken",
            "remove the file",
        ) from error


def _rotation(arrays: "Mapping[str, np.ndarray]", name: str, scale: float) -> "Rotation":
    import torch

    from frankenmerge.splicing.rotation import Rotation

    writing = arrays.get(f"{name}.writing")
    return Rotation(
        torch.from_numpy(arrays[f"{name}.matrix"]),
        scale,
        None if writing is None else torch.from_numpy(writing),
    )
