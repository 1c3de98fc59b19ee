"""Extract a LoRA from two checkpoints: compared, decomposed, written with a chart of its errors."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import raise_all
from frankenmerge.merging.lora_files import kind_of, lora_files
from frankenmerge.merging.lora_plan import (
    LoraOptions,
    LoraPlan,
    lora_plan,
    option_faults,
    rank_remarks,
)
from frankenmerge.merging.lora_writer import Module, check_lora, write_lora
from frankenmerge.progress import Progress, silent
from frankenmerge.reporting.charts import Line, lines
from frankenmerge.reporting.svg import standalone, titled


class Extracted(NamedTuple):
    """What was written."""

    output: Path
    tensors: int
    bytes: int
    seconds: float
    modules: list[Module]
    """Linear maps with their ranks and errors, in the order of the model."""
    saved: tuple[str, ...]
    """Modules that are held in full."""


def planned_lora(
    model: Checkpoint,
    base: Checkpoint,
    output: Path,
    options: LoraOptions,
    *,
    progress: Progress = silent,
) -> LoraPlan:
    """Compare two checkpoints, and check everything that can be known before any computation.

    Raises:
        FrankenmergeError: with everything that prevents it.
    """
    raise_all(option_faults(options))
    plan = lora_plan(model, base, progress)
    check_lora(plan, output, options)
    remarks = (*plan.remarks, *rank_remarks(plan, options))
    return plan._replace(remarks=remarks)


def extract_lora(
    plan: LoraPlan, output: Path, options: LoraOptions, *, progress: Progress = silent
) -> Extracted:
    """Write the adapter of a plan to the new folder `output`, complete or not at all.

    Raises:
        FrankenmergeError: as `write_lora`.
    """
    started = time.perf_counter()

    def small(modules: Sequence[Module], weights: Path) -> dict[str, bytes]:
        return lora_files(plan, modules, options, weights, error_chart(modules).encode())

    modules, size = write_lora(plan, output, options, small, progress)
    tensors = 2 * len(modules) + len(plan.biases) + len(plan.saved)
    seconds = time.perf_counter() - started
    return Extracted(output, tensors, size, seconds, modules, plan.saved_modules)


def error_chart(modules: Sequence[Module]) -> str:
    """The relative error of every map by block, a line for each kind, as a file of SVG."""
    series: dict[str, list[tuple[float, float | None]]] = {}
    for module in modules:
        number = re.search(r"\.(\d+)\.", module.name)
        block = float(number[1]) if number else 0.0
        series.setdefault(kind_of(module.name), []).append((block, module.error))
    drawn = [Line(kind, points, style) for style, (kind, points) in enumerate(series.items())]
    axis = "relative error of a matrix"
    chart = lines(drawn, "What the LoRA leaves out of each difference", axis, by="block")
    return standalone(titled(chart))
