"""Every window of a donor's blocks run twice, with several scales: which one gains, if any.

Windows are measured on one half of the tokens; the best few are confirmed on the other half, with
intervals for all of them together. What is done is kept in a journal beside the result, so that a
sweep that was interrupted goes on where it was.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from frankenmerge.artefacts import sweep as artefact
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.sweep import ConfirmedRecord, Sweep, WindowRecord
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import fail
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.domains import Domain, split
from frankenmerge.evaluation.gains import (
    Sums,
    counted,
    donor_losses,
    gain_of,
    losses_in_turn,
    losses_together,
    mean_loss,
)
from frankenmerge.evaluation.record import library_versions
from frankenmerge.models.loading import CPU, Placement
from frankenmerge.planning.candidates import REPEATED, repeated_window, windows
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.resolve import Splice, resolve
from frankenmerge.workflows.gaining import FINALISTS, SIGNIFICANCE, domains_on, parts_of
from frankenmerge.workflows.measuring import GainOn


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep measures, and on what."""

    on: GainOn
    """Texts or tasks: its own tokens a donor predicts best."""
    seed: int = 0
    """Of resamples."""
    placement: Placement = CPU
    scales: tuple[float, ...] | None = None
    """Of what the second pass writes; by default `REPEATED`, or 1 where it cannot be scaled."""


class _Cell(NamedTuple):
    start: int
    stop: int
    scale: float


def sweep(
    donor: Checkpoint, options: SweepOptions, output: Path, *, progress: Progress = silent
) -> tuple[Sweep, Recipe]:
    """Measure every window, and write NAME.sweep.json beside `output`.

    Returns the sweep, and the recipe of the window that was selected.

    Raises:
        FrankenmergeError: for tokens that the donor generates, texts that are too short, and scales
            where a norm follows what blocks write.
    """
    bench = Bench((), {donor.name: donor}, placement=options.placement)
    domains = domains_on(options.on, bench, [donor.name], options.seed, progress)
    selection, confirmation = split(domains, 2)
    writes = parts_of({donor.name: donor}, None).writes
    scales = options.scales or (REPEATED if writes else (1.0,))
    if not writes and set(scales) != {1.0}:
        expected = "1: a norm follows what its blocks write"
        raise fail(f"{donor.name}: --scale", expected, ", ".join(map(str, scales)), "leave it out")
    cells = [_Cell(*each, scale) for each in windows(donor.blocks) for scale in scales]
    model = {donor.name: bench.load(donor.name).model}
    alone = donor_losses(model, selection)[0][donor.name]

    def splice(cell: _Cell) -> Splice:
        return resolve(_recipe(donor, cell, writes), bench.checkpoints)

    journal = _Journal(
        output.with_suffix(".sweep.journal"), _identity(donor, domains, scales, options)
    )
    with progress("sweeping windows", len(cells), "windows") as advance:
        advance(len(journal.done))
        for stop in range(1, donor.blocks + 1):
            # Windows with one end begin alike: together they run what is before it once.
            left = [cell for cell in cells if cell.stop == stop and cell not in journal.done]
            splices = [splice(cell) for cell in left]
            for each in losses_in_turn(splices, bench.assemble, selection):
                journal.add(left[each.splice], *_difference(alone, each.sums))
                advance(1)
    ranked = sorted(cells, key=lambda cell: -journal.done[cell][0])
    finalists = ranked[:FINALISTS]
    found = losses_together([splice(cell) for cell in finalists], bench.assemble, confirmation)
    baseline = donor_losses(model, confirmation)[0]
    coverage = 1 - SIGNIFICANCE / len(finalists)
    gains = [gain_of(sums, baseline, seed=options.seed, coverage=coverage) for sums in found.sums]
    made = Sweep(
        kind=artefact.KIND,
        donor=donor.name,
        fingerprint=donor.fingerprint,
        blocks=donor.blocks,
        nats=mean_loss(alone),
        scales=list(scales),
        windows=[
            WindowRecord(**cell._asdict(), gain=gain, error=error)
            for cell, (gain, error) in sorted(journal.done.items())
        ],
        confirmed=[
            ConfirmedRecord(
                **cell._asdict(),
                selected=journal.done[cell][0],
                gain=gain.nats,
                interval=gain.interval,
            )
            for cell, gain in zip(finalists, gains, strict=True)
        ],
        on=[domain.name for domain in domains],
        tokens=counted(baseline[donor.name]),
        seed=options.seed,
        versions=library_versions(),
    )
    artefact.save(made, artefact.sweep_path(output))
    journal.remove()
    return made, _recipe(donor, finalists[0], writes)


def _recipe(donor: Checkpoint, cell: _Cell, writes: Sequence[str]) -> Recipe:
    return repeated_window(donor.name, donor.blocks, cell.start, cell.stop, cell.scale, writes)


def _difference(donor: Sums, window: Sums) -> tuple[float, float]:
    """The gain, and its standard error over units, as of a ratio of sums."""
    ours, theirs = (np.concatenate(list(each.values()), axis=1) for each in (window, donor))
    tokens = theirs[1].sum()
    differences = theirs[0] - ours[0]
    gain = float(differences.sum() / tokens)
    spread = differences - gain * theirs[1]
    count = len(spread)
    return gain, float(np.sqrt(count / (count - 1) * (spread**2).sum()) / tokens)


def _identity(
    donor: Checkpoint, domains: Sequence[Domain], scales: Sequence[float], options: SweepOptions
) -> str:
    """What a journal must agree in to be continued."""
    described = f"{donor.fingerprint} {options.placement.dtype} {sorted(scales)}"
    digest = hashlib.sha256(described.encode())
    for domain in domains:
        digest.update(domain.ids.numpy().tobytes())
        digest.update(domain.counted.numpy().tobytes())
    return digest.hexdigest()


class _Journal:
    """The windows that have been measured, one line each."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.done = path, dict[_Cell, tuple[float, float]]()
        content = path.read_bytes() if path.exists() else b""
        lines = content.decode("utf-8", "replace").splitlines()
        if lines and lines[0] == identity:
            self.done = dict(filter(None, map(_read, lines[1:])))
        try:
            # Written anew, so that a line that was cut off is not continued.
            path.write_text(identity + "\n" + "".join(map(_line, self.done.items())), "utf-8")
        except OSError as error:
            expected, remedy = "a folder that can be written to", "choose another place with -o"
            raise fail(str(path), expected, str(error), remedy) from error

    def add(self, cell: _Cell, gain: float, error: float) -> None:
        self.done[cell] = gain, error
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line((cell, (gain, error))))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _line(entry: tuple[_Cell, tuple[float, float]]) -> str:
    return json.dumps([*entry[0], *entry[1]]) + "\n"


def _read(line: str) -> tuple[_Cell, tuple[float, float]] | None:
    """A line of the journal; None for one that was cut off, or is none."""
    try:
        start, stop, scale, gain, error = json.loads(line)
    except (ValueError, TypeError):
        return None
    return _Cell(start, stop, scale), (gain, error)
