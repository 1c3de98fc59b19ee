"""The fits of a merge's gauges, kept next to its journal for other processes and for resuming.

A fit may differ in its last bits with the number of threads, or from one machine to another: the
first process makes it, and all shards of a merge use the same one.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from frankenmerge.errors import fail
from frankenmerge.merging.journal import PAUSE, is_held
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.resolve import Splice
from frankenmerge.splicing.rotation import Fit, Rotation
from frankenmerge.storage.arrays import read_arrays, write_arrays

if TYPE_CHECKING:
    import numpy as np

FITS = "fits.safetensors"
_KIND = "frankenmerge.fits/1"


def fits_in(folder: Path, splice: Splice, progress: Progress = silent) -> dict[int, Fit]:
    """The fits of the merge in the work folder `folder`: those of an earlier run, or new ones."""
    if not splice.has_gauges:
        return {}
    from frankenmerge.splicing.gauge_fitting import fitted_rotations

    if not (folder / FITS).is_file():
        save_fits(fitted_rotations(splice, progress), folder / FITS)
    return load_fits(folder / FITS)


def awaited_fits(folder: Path, output: Path, splice: Splice) -> dict[int, Fit] | None:
    """Wait for the fits that the first process makes; None where it has finished already.

    Raises FrankenmergeError where it ended before.
    """
    if not splice.has_gauges:
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


def save_fits(fits: Mapping[int, Fit], path: Path) -> None:
    """Write fits, complete or not at all."""
    arrays, records = {}, {}
    for number, fit in fits.items():
        rotations = [fit.rotation, *fit.refined]
        records[str(number)] = {
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
    write_arrays(path, _KIND, arrays, records)


def load_fits(path: Path) -> dict[int, Fit]:
    """Read fits. Raises FrankenmergeError for a file that holds none."""
    arrays, records = read_arrays(path, _KIND, "the fits of a merge")
    try:
        fits = {}
        for number, fit in records.items():
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


def _rotation(arrays: "Mapping[str, np.ndarray]", name: str, scale: float) -> Rotation:
    import torch

    writing = arrays.get(f"{name}.writing")
    return Rotation(
        torch.from_numpy(arrays[f"{name}.matrix"]),
        scale,
        None if writing is None else torch.from_numpy(writing),
    )
