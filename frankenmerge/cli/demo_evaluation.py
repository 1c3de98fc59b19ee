"""`demo`, the last step: its merge and its stack on held-out text, beside donors and controls."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from frankenmerge.cli.console import progress
from frankenmerge.cli.evaluate import print_prediction_check
from frankenmerge.cli.tables import results_table

if TYPE_CHECKING:
    from frankenmerge.artefacts.alignment import Alignment
    from frankenmerge.artefacts.evaluation import PredictionCheck
    from frankenmerge.donors.checkpoint import Checkpoint
    from frankenmerge.evaluation.bench import Result
    from frankenmerge.planning.plan import Plan
    from frankenmerge.splicing.resolve import Splice
    from frankenmerge.workflows.held_out import HeldOut

RANDOM_RECIPES, CHARACTERS, PROMPTS = 11, 12_000, 4
_TEXTS = Path(__file__).parent.parent / "demo" / "text"


class Measured(NamedTuple):
    """What the demo measured."""

    results: "list[Result]"
    """Donors, the merge, the stack, the controls, the median of the random recipes."""
    randoms: list[float]
    """Bits per byte of random recipes."""
    check: "PredictionCheck"
    """Of the stack."""
    held_out: "HeldOut"
    """What the merge wins over the donors."""


def evaluate(
    merged: "Splice",
    stack: "Plan",
    alignment: "Alignment",
    donors: "dict[str, Checkpoint]",
    output: Path,
) -> Measured:
    """Measure the checkpoint in `output`, the stack, donors and controls; write the evaluation."""
    from frankenmerge.artefacts.evaluation import save
    from frankenmerge.donors.checkpoint import open_checkpoint
    from frankenmerge.evaluation.bench import Bench, Subject
    from frankenmerge.evaluation.checks import Checks, Findings, examine
    from frankenmerge.evaluation.documents import Text
    from frankenmerge.evaluation.record import evaluation_record
    from frankenmerge.evaluation.samples import sample_prompts, words_of
    from frankenmerge.planning.controls import random_recipe
    from frankenmerge.splicing.resolve import resolve
    from frankenmerge.workflows.held_out import held_out
    from frankenmerge.workflows.predictions import check_prediction

    contents = {
        name: (_TEXTS / f"{name}.txt").read_text(encoding="utf-8")[:CHARACTERS]
        for name in ("code", "prose")
    }
    texts = [Text(name, content) for name, content in contents.items()]
    path = str(output / "merged")
    bench = Bench(texts, {**donors, path: open_checkpoint(path)})
    words = frozenset().union(*map(words_of, contents.values()))
    checks = Checks(sample_prompts(list(contents.values()), PROMPTS, 0), words, seams=True)
    findings = Findings()

    def visit(subject: Subject) -> None:
        examine(subject, bench, checks, findings)

    depth = len(stack.recipe.blocks)
    splice = resolve(stack.recipe, donors)
    name = f"stack of {depth}"
    controls = _controls(splice, alignment, donors, depth)
    blocks = {donor: each.blocks for donor, each in donors.items()}
    for seed in range(RANDOM_RECIPES):
        controls[f"random {seed}"] = resolve(random_recipe(blocks, depth, seed), donors)
    results = []
    total = len(donors) + 2 + len(controls)
    with progress("evaluating", total, "models") as advance:
        for donor in (*donors, path):
            role = "donor" if donor in donors else "model"
            results.append(bench.checkpoint(donor, role=role, visit=visit))
            advance(1)
        results.append(bench.splice(name, splice, visit=visit))
        advance(1)
        for control, each in controls.items():
            results.append(bench.splice(control, each))
            advance(1)
    own = {result.name: result.total.nats_per_token for result in results[: len(donors)]}
    ours = results[len(donors) + 1]
    check = check_prediction(ours, splice, stack.predicted_damage, stack.interval, own)
    results, randoms = results[:-RANDOM_RECIPES], results[-RANDOM_RECIPES:]
    record = evaluation_record(results, bench, checks, findings, predictions=[check])
    save(record, output / "evaluation.json")
    randoms.sort(key=lambda result: result.total.bits_per_byte)
    middle = randoms[RANDOM_RECIPES // 2]._replace(name=f"median of {RANDOM_RECIPES} random")
    bits = [result.total.bits_per_byte for result in randoms]
    won = held_out(merged, list(donors), Bench((), donors), texts)
    return Measured([*results, middle], bits, check, won)


def _controls(
    splice: "Splice", alignment: "Alignment", donors: "dict[str, Checkpoint]", depth: int
) -> "dict[str, Splice]":
    """The usual patterns of the stack's depth."""
    from frankenmerge.planning.controls import goliath, naive_interleave
    from frankenmerge.planning.damping import dampings
    from frankenmerge.splicing.resolve import resolve

    blocks = {name: donor.blocks for name, donor in donors.items()}
    pattern = goliath(blocks, depth)
    stream = splice.base.architecture.stream
    assert stream
    ways = {way.name: way.recipe for way in dampings(pattern, [alignment], stream.writes)}
    recipes = {
        "naive interleave": naive_interleave(blocks, depth),
        "Goliath's pattern": pattern,
        "the same, damped": ways["1/n"],
    }
    return {name: resolve(recipe, donors) for name, recipe in recipes.items()}


def print_measured(console: Console, measured: Measured) -> None:
    """Show what was measured, whether the stack's prediction was right, and what the merge wins."""
    title = "On held-out code and prose (bits per byte; lower is better)"
    console.print(results_table(measured.results, title))
    stack = measured.results[3].total.bits_per_byte
    beaten = sum(random > stack for random in measured.randoms)
    print_prediction_check(console, measured.check)
    console.print(
        f"The stack is better than {beaten} of {len(measured.randoms)} random recipes of its "
        "depth, which are not damped.\n"
    )
    won = measured.held_out
    for name, gain in won.over.items():
        low, high = gain.interval
        console.print(
            f"merged is better than {Path(name).name} by {gain.nats:.3f} nats per token "
            f"(95 % interval {low:.3f} to {high:.3f})."
            if low > 0
            else f"merged is not shown to be better than {Path(name).name}: {gain.nats:.3f} nats "
            f"per token (95 % interval {low:.3f} to {high:.3f})."
        )
    if won.captured is not None:
        console.print(
            f"That is {won.captured:.0%} of what the ensemble of both wins over "
            f"{Path(won.best_donor).name}, which costs two models ({won.tokens:,} tokens)."
        )


def held_out_json(won: "HeldOut") -> dict[str, Any]:
    """What the merge wins on held-out text, as JSON values."""
    return {
        "best_donor": won.best_donor,
        "gain": won.gain.nats,
        "interval": won.gain.interval,
        "over": {
            name: {"gain": gain.nats, "interval": gain.interval} for name, gain in won.over.items()
        },
        "ensemble": {"gain": won.ensemble.nats, "interval": won.ensemble.interval},
        "captured_share": won.captured,
        "tokens": won.tokens,
    }
