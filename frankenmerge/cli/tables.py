"""What an evaluation found, as tables of at most 80 columns."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from frankenmerge.cli.console import table

if TYPE_CHECKING:
    from frankenmerge.artefacts.evaluation import DifferenceRecord

FEW = 2
"""Texts that have a column each in the first table."""
COLUMNS = 5
"""Columns of a table whose number the user decides, besides the first; what is beyond goes into
another table.
"""


def results_table(results: Sequence[Any], title: str, seed: int = 0) -> Table:
    """Results on all texts together, and on each where they are `FEW`."""
    from frankenmerge.evaluation.intervals import drawn, intervals, together

    texts = list(results[0].losses)
    each = texts if 1 < len(texts) <= FEW else []
    made = table(
        title,
        "model",
        *(Path(text).stem for text in each),
        "bits/byte",
        "95 % in",
        "perplexity",
        *([] if each else ["nats/token"]),
        "top-1",
    )
    for result in results:
        total = result.total
        low, high = intervals(together(drawn(result.losses, seed)))["bits_per_byte"]
        accuracy = "" if total.accuracy is None else f"{total.accuracy:.1%}"
        made.add_row(
            _called(result),
            *(f"{result.losses[text].bits_per_byte:.3f}" for text in each),
            f"{total.bits_per_byte:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{total.perplexity:,.1f}",
            *([] if each else [f"{total.nats_per_token:.3f}"]),
            accuracy,
        )
    return made


def _called(result: Any) -> str:
    name = Path(result.name).name
    return f"{name} (donor)" if result.role == "donor" else name


def further_tables(results: Sequence[Any], looks: Any) -> Iterable[Table]:
    """Each text's bits per byte where they are more than `FEW`, what samples are like, and the harness's figures."""
    from frankenmerge.evaluation.samples import invalid_rate, repetition

    columns: list[tuple[str, list[str]]] = []
    texts = results[0].losses
    for text in texts if len(texts) > FEW else ():
        columns.append(
            (
                f"{Path(text).stem} bits/byte",
                [f"{result.losses[text].bits_per_byte:.3f}" for result in results],
            )
        )
    for name, rate in (("invalid words", invalid_rate), ("repeated", repetition)):
        if looks.samples:
            rates = [rate(looks.samples[result.name]) for result in results]
            columns.append((name, ["" if value is None else f"{value:.1%}" for value in rates]))
    told = {
        result.name: {
            (figure.task, figure.metric): figure for figure in looks.tasks.get(result.name, [])
        }
        for result in results
    }
    for key in dict.fromkeys(key for figures in told.values() for key in figures):
        cells = [told[result.name].get(key) for result in results]
        columns.append(
            (" ".join(key), ["" if cell is None else _with_error(cell) for cell in cells])
        )
    for first in range(0, len(columns), COLUMNS):
        group = columns[first : first + COLUMNS]
        made = table("Further figures", "model", *(name for name, _ in group))
        for number, result in enumerate(results):
            made.add_row(_called(result), *(cells[number] for _, cells in group))
        yield made


def _with_error(figure: Any) -> str:
    return f"{figure.value:.3f}" + ("" if figure.stderr is None else f" ±{figure.stderr:.3f}")


def differences_table(differences: "Sequence[DifferenceRecord]") -> Table:
    """How many more bits per byte models take than donors."""
    title = "Compared with each donor, on the same text (bits per byte; above 0 is worse)"
    made = table(title, "model", "donor", "difference", "95 % in")
    for entry in differences:
        low, high = entry.interval or (float("nan"), float("nan"))
        names = Path(entry.model).name, Path(entry.donor).name
        made.add_row(*names, f"{entry.bits_per_byte:+.3f}", f"{low:+.3f} to {high:+.3f}")
    return made


def seams_table(name: str, blocks: Sequence[Any]) -> Table:
    """A merged model block by block, beside its donors."""
    donors = list(blocks[0].cosine)
    short = {donor: Path(donor).name for donor in donors}
    made = table(
        f"{Path(name).name}: behind each block",
        "block",
        "from",
        "norm",
        *(f"cos {short[donor]}" for donor in donors[:2]),
        *(f"KL {short[donor]}" for donor in donors[:2]),
        "KL alone",
    )
    for entry in blocks:
        cosines = (f"{entry.cosine[donor]:.2f}" for donor in donors[:2])
        divergences = (f"{entry.kl[donor]:.2f}" for donor in donors[:2])
        origin = f"{Path(entry.donor).name} {entry.donor_block}"
        made.add_row(
            f"{entry.block}",
            origin,
            f"{entry.norm_ratio:.2f}",
            *cosines,
            *divergences,
            f"{entry.kl_alone:.2f}",
            style="bold" if entry.seam else None,
        )
        if entry.seam:
            made.rows[-1].end_section = False
            made.rows[-2].end_section = True
    return made


def retention_table(name: str, entries: Sequence[Any]) -> Table:
    """How many of each donor's features a merged model keeps."""
    made = table(
        f"{Path(name).name}: features kept", "donor", "kept", "by chance", "from block to block"
    )
    for entry in entries:
        blocks = " ".join(f"{block.block}:{block.kept:.0%}" for block in entry.blocks)
        made.add_row(Path(entry.donor).name, f"{entry.kept:.1%}", f"{entry.chance:.1%}", blocks)
    return made


def print_samples(console: Console, samples: dict[str, list[Any]]) -> None:
    """Samples side by side, prompt after prompt; words that the reference lacks stand out."""
    for number, first in enumerate(next(iter(samples.values()))):
        console.print(Text(f"\nBehind {first.prompt!r}:", style="bold"))
        for name, entries in samples.items():
            sample = entries[number]
            shown = Text(f"{sample.text!r}")
            shown.highlight_words(
                [word for word in set(sample.invalid)], "bold red", case_sensitive=False
            )
            console.print(Text(f"  {Path(name).name}: ", style="bold") + shown)
            if sample.invalid:
                console.print(
                    f"    not in the reference: {', '.join(dict.fromkeys(sample.invalid))}",
                    markup=False,
                )
