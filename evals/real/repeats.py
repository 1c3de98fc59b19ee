"""Does repeating blocks help a real model? What a sweep found, confirmed on a task and on text.

`python -m evals.real.repeats DONOR SWEEP --items FILE --text FILE`: of the sweep's windows, each
with its best scale, the best forty on text, and twenty others at random as controls, answer the
first items. The best two of each kind by that, and the best two by text, answer the other items
and predict the rest of the texts: nothing was chosen by these. All three times the donor is
measured alike, and differences are paired: exact McNemar tests with Holm's correction, and
intervals that hold for all finalists together.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from evals.real.texts import SHORT
from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.artefacts.sweep import Sweep, WindowRecord, load
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import Text, read_text
from frankenmerge.evaluation.gains import donor_losses, gain_of, losses_together
from frankenmerge.evaluation.items import (
    Item,
    choice_log_likelihoods,
    correct,
    encoded_items,
    read_items,
)
from frankenmerge.evaluation.paired import difference_interval, holm, mcnemar
from frankenmerge.models.loading import Placement
from frankenmerge.planning.candidates import repeated_window
from frankenmerge.splicing.resolve import resolve
from frankenmerge.workflows.gaining import domains_on, parts_of

BEST, CONTROLS, FINALISTS = 40, 20, 2
FIRST = 60
"""Items that finalists are chosen by."""


@click.command()
@click.argument("donor")
@click.argument("swept", type=click.Path(path_type=Path))
@click.option("--items", "file", required=True, type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path))
@click.option("--characters", default=8_000, show_default=True, help="Of each text.")
@click.option("--dtype", default="float32", show_default=True, help="To compute in.")
def main(
    donor: str, swept: Path, file: Path, texts: tuple[Path, ...], characters: int, dtype: str
) -> None:
    """Print what was found as one JSON object."""
    sweep, items = load(swept), read_items(file)
    measured = _Measured(donor, dtype)
    best, controls = chosen(sweep)
    alone = measured.answers(None, items)
    kinds = {"best on text": best, "random": controls}
    selected = {
        kind: [measured.answers(window, items[:FIRST]) for window in windows]
        for kind, windows in kinds.items()
    }
    finalists = {"best on text alone": best[:FINALISTS]}
    for kind, windows in kinds.items():
        order = np.argsort([-each.mean() for each in selected[kind]], kind="stable")
        finalists[f"best on items of {kind}"] = [windows[place] for place in order[:FINALISTS]]
    rows = [
        {"kind": kind, "window": [window.start, window.stop], "scale": window.scale}
        | {"sweep": window.gain, "place": windows.index(window)}
        for kind, windows in finalists.items()
        for window in windows
    ]
    unique = {_name(window): window for windows in finalists.values() for window in windows}
    tested = _on_items(measured, unique, items[FIRST:], alone[FIRST:])
    gains = _on_text(measured, unique, texts, characters)
    for row in rows:
        name = _name_of(*row["window"], row["scale"])
        row |= tested[name] | gains.get(name, {})
    result: dict[str, Any] = {
        "items": len(items) - FIRST,
        "donor_accuracy": float(alone[FIRST:].mean()),
        "donor_accuracy_first": float(alone[:FIRST].mean()),
        "accuracies_first": {
            kind: [float(each.mean()) for each in found] for kind, found in selected.items()
        },
        "finalists": rows,
    }
    click.echo(json.dumps(result, indent=1))


def chosen(sweep: Sweep) -> tuple[list[WindowRecord], list[WindowRecord]]:
    """The best windows of a sweep, the best first, each with its best scale; and some others."""
    by_window: dict[tuple[int, int], WindowRecord] = {}
    for record in sorted(sweep.windows, key=lambda each: -each.gain):
        by_window.setdefault((record.start, record.stop), record)
    ranked = list(by_window.values())
    best, others = ranked[:BEST], ranked[BEST:]
    places = np.random.default_rng(0).permutation(len(others))[:CONTROLS]
    return best, [others[place] for place in sorted(places.tolist())]


class _Measured:
    """A donor and its windows run twice, in memory."""

    def __init__(self, donor: str, dtype: str) -> None:
        checkpoint = open_checkpoint(donor)
        self.name, self.blocks = donor, checkpoint.blocks
        self.bench = Bench((), {donor: checkpoint}, placement=Placement(dtype))
        self.writes = parts_of({donor: checkpoint}, None).writes

    def recipe(self, window: WindowRecord | None) -> Recipe:
        """Of a window, or of the donor itself."""
        if window is None:
            return recipe_of([Block(self.name, index) for index in range(self.blocks)])
        place = (window.start, window.stop, window.scale)
        return repeated_window(self.name, self.blocks, *place, self.writes)

    def answers(self, window: WindowRecord | None, items: Sequence[Item]) -> np.ndarray:
        """Which items are answered correctly, bool `[n]`."""
        model = self.bench.assemble(resolve(self.recipe(window), self.bench.checkpoints))
        tokenizer = self.bench.load(self.name).tokenizer
        rows = encoded_items(tokenizer, items, context=self.bench.context)
        return correct(rows, choice_log_likelihoods(model, rows))["acc"]


def _on_items(
    measured: _Measured,
    windows: dict[str, WindowRecord],
    items: Sequence[Item],
    alone: np.ndarray,
) -> dict[str, dict[str, Any]]:
    """Every window on items that nothing was chosen by, against the donor."""
    rows = {}
    for name, window in windows.items():
        right = measured.answers(window, items)
        won, lost = int((right & ~alone).sum()), int((alone & ~right).sum())
        rows[name] = {
            "accuracy": float(right.mean()),
            "difference": float(right.mean() - alone.mean()),
            "difference_interval": list(difference_interval(won, lost, len(items))),
            "won": won,
            "lost": lost,
            "p": mcnemar(won, lost),
        }
    corrected = holm([row["p"] for row in rows.values()])
    return {
        name: row | {"p_holm": p} for (name, row), p in zip(rows.items(), corrected, strict=True)
    }


def _on_text(
    measured: _Measured, windows: dict[str, WindowRecord], texts: Sequence[Path], characters: int
) -> dict[str, dict[str, Any]]:
    """Every window on text that the sweep did not read, against the donor."""
    read = [read_text(path) for path in texts]
    parts = [Text(each.name, each.content[SHORT : SHORT + characters]) for each in read]
    domains = domains_on(parts, measured.bench, [measured.name], 0)
    recipes = [measured.recipe(window) for window in windows.values()]
    splices = [resolve(recipe, measured.bench.checkpoints) for recipe in recipes]
    found = losses_together(splices, measured.bench.assemble, domains).sums
    models = {measured.name: measured.bench.load(measured.name).model}
    donors = donor_losses(models, domains)[0]
    coverage = 1 - 0.05 / len(windows)
    gains = [gain_of(each, donors, seed=0, coverage=coverage) for each in found]
    return {
        name: {"gain": gain.nats, "gain_interval": list(gain.interval)}
        for name, gain in zip(windows, gains, strict=True)
    }


def _name(window: WindowRecord) -> str:
    return _name_of(window.start, window.stop, window.scale)


def _name_of(start: int, stop: int, scale: float) -> str:
    return f"[{start}, {stop}) at {scale}"


if __name__ == "__main__":
    main()
