"""Print the tables of the source document (see docs/method.md) for any model.

If the document used the model, each result is printed next to the document's own string: `agrees`
or `differs`, ignoring white space; `not comparable` if the document has no such cell, or leaves out
what the result depends on.

Of any model, each table is followed by what it claims, and whether that is true of this one: a
share, its interval, and the share by chance (`document_claims`).
"""

import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from document import MODELS, Table, model_of
from document_cells import TABLES
from document_searches import Donor, filled
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from transformers import AutoConfig

import frankenmerge
from frankenmerge.analysis.analyze import token_texts
from frankenmerge.cli import console
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import Placement, load_model, untrained_model


def measured(
    checkpoint: Checkpoint, tables: Sequence[Table], seed: int, device: str, dtype: str
) -> dict[str, Any]:
    """Fill the tables for one model: with its own weights, then the controls with random ones.

    The random weights of the controls are sampled with the next seed.
    """
    config = AutoConfig.for_model(**checkpoint.config)
    named, trained = checkpoint.has_tokenizer, bool(checkpoint.tensors)
    texts = (
        token_texts(checkpoint) if named else [f"<{token}>" for token in range(config.vocab_size)]
    )
    document_model = model_of(config) if named else None
    one_device = "cpu" if device == "auto" else device
    filled_tables = []
    for untrained in (False, True):
        chosen = [table for table in tables if table.untrained == untrained]
        if not chosen:
            continue
        own = trained and not untrained
        donor = Donor(
            load_model(checkpoint, Placement(dtype, device))
            if own
            else untrained_model(checkpoint, seed + untrained, Placement(device=one_device))
        )
        for table in chosen:
            click.echo(f"{checkpoint.name}: {table.name}", err=True)
            filled_tables.append(
                filled(table, donor, texts, document_model if own or untrained else None)
            )
    return {
        "model": checkpoint.name,
        "document_model": document_model,
        "trained": trained,
        "tokenizer": named,
        "verdicts": Counter(cell["verdict"] for table in filled_tables for cell in table["cells"]),
        "tables": filled_tables,
    }


def random_checkpoint(name: str, tokenizer: Path | None) -> Checkpoint:
    """A checkpoint of a model of the document without weights, for `untrained_model`."""
    return Checkpoint(
        f"random {name}",
        tokenizer or Path(f"random {name}"),
        AutoConfig.for_model(**MODELS[name]).to_dict(),
        {},
    )


def show(result: dict[str, Any], out: Console) -> None:
    """Print one model's tables."""
    shape = result["document_model"] or "not the shape of any model of the document"
    out.print(
        f"{result['model']}: {shape}{'' if result['trained'] else ', random weights'}\n",
        style="bold",
        markup=False,
    )
    for table in result["tables"]:
        rows = {"block": [], "feature": [], "way": [], "found": [], "document": [], "verdict": []}
        for cell in table["cells"]:
            rows["block"].append(str(cell["block"]))
            rows["feature"].append(cell["feature"])
            rows["way"].append(f"{cell['way']} (artefact)" if cell["artefact"] else cell["way"])
            rows["found"].append(" ".join(map(repr, cell["texts"])))
            rows["document"].append("" if cell["page"] is None else repr(cell["page"]))
            rows["verdict"].append(cell["verdict"])
        rows = {name: column for name, column in rows.items() if any(column)}
        printed = RichTable(
            *rows, title=f"{table['table']}, {table['features']}", title_justify="left", box=SIMPLE
        )
        for row in zip(*rows.values(), strict=True):
            printed.add_row(*map(escape, row))
        if rows:
            out.print(printed)
        for each in table["claims"]:
            low, high = each["interval"]
            out.print(
                f"{each['claim']}: {each['verdict']} ({each['share']:.3f} of {each['count']}, "
                f"{low:.3f} to {high:.3f}; by chance {each['null']:.3f})",
                markup=False,
            )
        for note in table["notes"]:
            out.print(note, style="dim", markup=False)
        out.print()
    counts = ", ".join(f"{count} {verdict}" for verdict, count in result["verdicts"].items())
    out.print(f"{result['model']}: {counts}\n", markup=False)


@click.command()
@click.option(
    "--model", "donors", multiple=True, help="A donor's folder or hub id; may be repeated."
)
@click.option(
    "--random",
    "shape",
    type=click.Choice(list(MODELS)),
    help="Use random weights in the shape of this model of the document.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Folder of a tokenizer for --random; without one, tokens are shown as ids.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help="Random seed for the weights; the untrained controls use the next one.",
)
@click.option(
    "--table",
    "names",
    multiple=True,
    type=click.Choice([table.name for table in TABLES]),
    help="Table to print; may be repeated. [default: all]",
)
@console.device_option
@console.dtype_option
@console.download_option
@console.json_option
def main(
    donors: tuple[str, ...],
    shape: str | None,
    tokenizer: Path | None,
    seed: int,
    names: tuple[str, ...],
    device: str,
    dtype: str,
    download: bool,
    as_json: bool,
) -> None:
    """Print the source document's tables for models, and whether the results agree with it."""
    if not donors and not shape:
        raise click.UsageError("name a --model or a --random shape")
    tables = [table for table in TABLES if not names or table.name in names]
    try:
        checkpoints = [open_checkpoint(name, download=download) for name in donors]
        checkpoints += [random_checkpoint(shape, tokenizer)] if shape else []
        results = [measured(checkpoint, tables, seed, device, dtype) for checkpoint in checkpoints]
    except FrankenmergeError as error:
        raise click.ClickException(str(error)) from error
    versions = {
        "frankenmerge": frankenmerge.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if as_json:
        origin = {"seed": seed, "dtype": dtype, "device": device, "versions": versions}
        console.print_json({"models": results, "made": origin})
        return
    out = Console(highlight=False)
    for model in results:
        show(model, out if out.is_terminal else Console(highlight=False, width=140))


if __name__ == "__main__":
    main()
