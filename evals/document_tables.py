"""The tables of the document "Language Model Features", for any model, with a verdict on each of its cells.

Where the model is one that the document used, the page's own string stands beside what is found
here: `agrees` or `differs`, white space apart; `not comparable` where the page shows no such cell,
or leaves out what decides it.
"""

import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import transformers
from document import (
    ARTEFACT,
    FIRST_NEURON,
    MODELS,
    TABLES,
    Table,
    Verdict,
    model_of,
    split,
    squeezed,
    verdict,
)
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from transformers import AutoConfig, PreTrainedModel

import frankenmerge
from frankenmerge.analysis.analyze import token_texts
from frankenmerge.analysis.complete import complete_search
from frankenmerge.analysis.decode import Decoder, decode_hidden, decoder_of, embedding_table
from frankenmerge.analysis.features import Feature, parse_features
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.analysis.greedy import greedy_search
from frankenmerge.analysis.inversion import Loss, invert, outputs_of
from frankenmerge.analysis.prior import prior_search
from frankenmerge.artefacts.atlas import TopTokens
from frankenmerge.cli import console
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.hooks import blocks_of, embedding_of
from frankenmerge.models.loading import Placement, load_model, untrained_model

GREEDY_TOKENS, GRADIENT_TOKENS = 4, 5
DECODED, FLAGGED = "E^+", "hidden axis"


class SearchOptions(NamedTuple):
    """One feature of a table."""

    spec: Feature
    page: str | None
    """The document's own string, where the model is the one it used."""


class Cell(NamedTuple):
    """What was found for a feature, and how it stands to the document."""

    block: int
    feature: str
    way: str
    """How it was found, where there are several ways."""
    tokens: list[int]
    texts: list[str]
    page: str | None
    page_ids: list[list[int]] | None
    """For each token of the document's string the ids it may be; in gradient tables below the
    width, as the artefact's are.
    """
    verdict: Verdict
    artefact: bool
    """Whether the tokens are neurons' indices in disguise."""


@dataclass(frozen=True)
class Donor:
    """A model, and what several tables need of it."""

    model: PreTrainedModel

    @cached_property
    def best(self) -> TopTokens:
        """The best token of every feature."""
        return complete_search(self.model, k=1)

    @cached_property
    def decoder(self) -> Decoder:
        """From embeddings to tokens."""
        return decoder_of(embedding_table(self.model), excluded=None)


Found = dict[str, list[list[int]]]
"""Token ids, an input a feature, by the way they were found."""
Method = Callable[[Donor, list[Feature]], Found]


def complete(donor: Donor, specs: list[Feature]) -> Found:
    return {"": [donor.best.tokens[spec.block, spec.neurons.start].tolist() for spec in specs]}


def greedy(donor: Donor, specs: list[Feature]) -> Found:
    features = [Feature.of(spec.block, spec.neurons.start) for spec in specs]
    last = greedy_search(donor.model, features, n=GREEDY_TOKENS)
    every = greedy_search(donor.model, features, n=GREEDY_TOKENS, positions="all")
    return {"last position": last.tokens.tolist(), "all positions": every.tokens.tolist()}


def gradient(isolated: bool) -> Method:
    def search(donor: Donor, specs: list[Feature]) -> Found:
        found = gradient_search(
            donor.model, specs, tokens=GRADIENT_TOKENS, isolated=isolated, decoder=donor.decoder
        )
        return {DECODED: found.tokens.tolist(), FLAGGED: decode_hidden(found.embeddings).tolist()}

    return search


def inversion(loss: Loss) -> Method:
    def search(donor: Donor, specs: list[Feature]) -> Found:
        found = []
        for block, row in groupby(specs, key=lambda spec: spec.block):
            best = torch.tensor(
                donor.best.tokens[block, [spec.neurons.start for spec in row]],
                device=embedding_of(donor.model).device,
            )
            outputs = outputs_of(donor.model, best.long(), block)
            found += invert(
                donor.model, outputs, block, loss=loss, decoder=donor.decoder
            ).tokens.tolist()
        return {"": found}

    return search


def prior(donor: Donor, specs: list[Feature]) -> Found:
    return {"": prior_search(donor.model, specs, tokens=1).tokens.tolist()}


METHODS: dict[str, Method] = {
    "complete": complete,
    "greedy": greedy,
    "gradient": gradient(isolated=False),
    "isolated gradient": gradient(isolated=True),
    "L1 inversion": inversion("l1"),
    "cosine inversion": inversion("cosine"),
    "softmax prior": prior,
}


def filled(table: Table, donor: Donor, texts: list[str], page: str | None) -> dict[str, Any]:
    """A table as one model fills it: its cells, and what a reader must know of them."""
    width = embedding_of(donor.model).shape[1]
    first = FIRST_NEURON if width > FIRST_NEURON + 4 else width // 2
    notation = table.features.format(*range(first, first + 5))
    notes = [ARTEFACT] if table.artefact else []
    if table.excuse:
        notes.append(f"A difference tells nothing: {table.excuse}.")
    if notation != table.features and first != FIRST_NEURON:
        notes.append(
            f"Neurons from {first} on stand for those from {FIRST_NEURON} on: the model is {width} wide."
        )
    asked, missing = features(
        table, notation, len(blocks_of(donor.model)), width, table.pages.get(page or "", {})
    )
    by_text = ids_by_text(texts[:width] if table.artefact else texts)
    found = METHODS[table.method](donor, [feature.spec for feature in asked]) if asked else {}
    cells = [
        cell(table, feature, way, inputs[row], texts, by_text)._asdict()
        for row, feature in enumerate(asked)
        for way, inputs in found.items()
    ]
    if table.artefact and (
        indices := own_indices([feature.spec for feature in asked], found[FLAGGED])
    ):
        missing.append(
            f"On the hidden axis {sum(indices)} of {len(indices)} tokens have the id of their own neuron."
        )
    return {
        "table": table.name,
        "features": notation,
        "untrained": table.untrained,
        "notes": notes + missing,
        "cells": cells,
    }


def own_indices(specs: list[Feature], inputs: list[list[int]]) -> list[bool]:
    """Whether each token, where the features of one neuron are, has that neuron's index for its id."""
    return [
        tokens[position] == spec.neurons.start
        for spec, tokens in zip(specs, inputs, strict=True)
        if len(spec.neurons) == 1
        for position in spec.positions or range(len(tokens))
    ]


def features(
    table: Table, notation: str, depth: int, width: int, pages: Mapping[int, Sequence[str | None]]
) -> tuple[list[SearchOptions], list[str]]:
    """The features of a table that a model of these sizes has, and notes on what is left out."""
    asked, notes = [], []
    for block in table.blocks:
        specs = parse_features(notation, block, width)
        page = pages.get(block, ())
        if page and len(page) != len(specs):
            notes.append(
                f"The page's row of block {block} has {len(page)} cells for {len(specs)} features: {page}."
            )
        if block <= depth:
            asked += map(
                SearchOptions, specs, page if len(page) == len(specs) else [None] * len(specs)
            )
    if deeper := [str(block) for block in table.blocks if block > depth]:
        notes.append(f"Skipped, as the model has {depth} blocks: {', '.join(deeper)}.")
    return asked, notes


def ids_by_text(texts: list[str]) -> dict[str, list[int]]:
    """The ids of the tokens of each text, white space apart."""
    ids: dict[str, list[int]] = {}
    for token, text in enumerate(texts):
        ids.setdefault(squeezed(text), []).append(token)
    return ids


def cell(
    table: Table,
    asked: SearchOptions,
    way: str,
    ids: list[int],
    texts: list[str],
    by_text: dict[str, list[int]],
) -> Cell:
    spec, page = asked
    words = [texts[token] for token in ids]
    tokens = None if page is None else split(page, by_text, len(ids))
    excuse = "the page did not decode them" if way == DECODED else table.excuse
    return Cell(
        block=spec.block,
        feature=str(spec).removeprefix(f"block {spec.block} "),
        way=way,
        tokens=ids,
        texts=words,
        page=page,
        page_ids=None if tokens is None else [by_text[token] for token in tokens],
        verdict=verdict(words, page, positions=spec.positions, tokens=tokens, excuse=excuse),
        artefact=way == FLAGGED,
    )


def measured(
    checkpoint: Checkpoint, tables: Sequence[Table], seed: int, device: str, dtype: str
) -> dict[str, Any]:
    """Fill the tables for one model: those of its own weights, then those of random ones, drawn by the next seed."""
    config = AutoConfig.for_model(**checkpoint.config)
    named, trained = checkpoint.has_tokenizer, bool(checkpoint.tensors)
    texts = (
        token_texts(checkpoint) if named else [f"<{token}>" for token in range(config.vocab_size)]
    )
    document_model = model_of(config) if named else None
    drawn_on = "cpu" if device == "auto" else device
    told = []
    for untrained in (False, True):
        chosen = [table for table in tables if table.untrained == untrained]
        if not chosen:
            continue
        own = trained and not untrained
        donor = Donor(
            load_model(checkpoint, Placement(dtype, device))
            if own
            else untrained_model(checkpoint, seed + untrained, Placement(device=drawn_on))
        )
        for table in chosen:
            click.echo(f"{checkpoint.name}: {table.name}", err=True)
            told.append(filled(table, donor, texts, document_model if own or untrained else None))
    return {
        "model": checkpoint.name,
        "document_model": document_model,
        "trained": trained,
        "tokenizer": named,
        "verdicts": Counter(cell["verdict"] for table in told for cell in table["cells"]),
        "tables": told,
    }


def random_checkpoint(name: str, tokenizer: Path | None) -> Checkpoint:
    """A checkpoint without weights, in the shape of one of the document's models, for `untrained_model` to draw them."""
    return Checkpoint(
        f"random {name}",
        tokenizer or Path(f"random {name}"),
        AutoConfig.for_model(**MODELS[name]).to_dict(),
        {},
    )


def show(told: dict[str, Any], out: Console) -> None:
    """Print one model's tables."""
    shape = told["document_model"] or "none of the models of the document, by its shape"
    out.print(
        f"{told['model']}: {shape}{'' if told['trained'] else ', random weights'}\n",
        style="bold",
        markup=False,
    )
    for table in told["tables"]:
        rows = {"block": [], "feature": [], "way": [], "found": [], "document": [], "verdict": []}
        for cell in table["cells"]:
            rows["block"].append(str(cell["block"]))
            rows["feature"].append(cell["feature"])
            rows["way"].append(f"{cell['way']} (artefact)" if cell["artefact"] else cell["way"])
            rows["found"].append(" ".join(map(repr, cell["texts"])))
            rows["document"].append("" if cell["page"] is None else repr(cell["page"]))
            rows["verdict"].append(cell["verdict"])
        rows = {name: column for name, column in rows.items() if any(column)}
        made = RichTable(
            *rows, title=f"{table['table']}, {table['features']}", title_justify="left", box=SIMPLE
        )
        for row in zip(*rows.values(), strict=True):
            made.add_row(*map(escape, row))
        if rows:
            out.print(made)
        for note in table["notes"]:
            out.print(note, style="dim", markup=False)
        out.print()
    counts = ", ".join(f"{count} {verdict}" for verdict, count in told["verdicts"].items())
    out.print(f"{told['model']}: {counts}\n", markup=False)


@click.command()
@click.option(
    "--model", "donors", multiple=True, help="A donor's folder or hub id; may be repeated."
)
@click.option(
    "--random",
    "shape",
    type=click.Choice(list(MODELS)),
    help="Random weights in the shape of one of the document's models.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Its folder, for --random; without one, tokens are shown as ids.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help="Draws the random weights; the next seed, those of the untrained control.",
)
@click.option(
    "--table",
    "names",
    multiple=True,
    type=click.Choice([table.name for table in TABLES]),
    help="May be repeated; all by default.",
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
    """Print the document's tables for models, and how far they agree with its own."""
    if not donors and not shape:
        raise click.UsageError("name a --model or a --random shape")
    tables = [table for table in TABLES if not names or table.name in names]
    try:
        checkpoints = [open_checkpoint(name, download=download) for name in donors]
        checkpoints += [random_checkpoint(shape, tokenizer)] if shape else []
        told = [measured(checkpoint, tables, seed, device, dtype) for checkpoint in checkpoints]
    except FrankenmergeError as error:
        raise click.ClickException(str(error)) from error
    versions = {
        "frankenmerge": frankenmerge.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if as_json:
        made = {"seed": seed, "dtype": dtype, "device": device, "versions": versions}
        console.print_json({"models": told, "made": made})
        return
    out = Console(highlight=False)
    for model in told:
        show(model, out if out.is_terminal else Console(highlight=False, width=140))


if __name__ == "__main__":
    main()
