"""Fill the tables of the source document for one model, with a verdict on each cell."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from document import ARTEFACT, FIRST_NEURON, Table, Verdict, split, squeezed, verdict
from document_claims import claims
from transformers import PreTrainedModel

from frankenmerge.analysis.complete import complete_search
from frankenmerge.analysis.decode import Decoder, decode_hidden, decoder_of, embedding_table
from frankenmerge.analysis.features import Feature, parse_features
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.analysis.greedy import greedy_search
from frankenmerge.analysis.inversion import Loss, invert, outputs_of
from frankenmerge.analysis.prior import prior_search
from frankenmerge.artefacts.atlas import TopTokens
from frankenmerge.models.hooks import blocks_of, embedding_of

GREEDY_TOKENS, GRADIENT_TOKENS = 4, 5
DECODED, FLAGGED = "E^+", "hidden axis"


class Wanted(NamedTuple):
    """One feature of a table."""

    spec: Feature
    page: str | None
    """The document's own string, if the model is the one that it used."""


class Cell(NamedTuple):
    """The tokens found for a feature, and how they compare with the document."""

    block: int
    feature: str
    way: str
    """How they were found, if there are several ways."""
    tokens: list[int]
    texts: list[str]
    page: str | None
    page_ids: list[list[int]] | None
    """For each token of the document's string its possible ids; in gradient tables only those below
    the width, as those of the artefact are.
    """
    verdict: Verdict
    artefact: bool
    """Whether the tokens are neuron indices read as token ids."""


@dataclass(frozen=True)
class Donor:
    """A model, and results that several tables use."""

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
"""Token ids, one input for each feature, by the way they were found."""
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
    """One table for one model: its cells, and notes for the reader."""
    width = embedding_of(donor.model).shape[1]
    first = FIRST_NEURON if width > FIRST_NEURON + 4 else width // 2
    notation = table.features.format(*range(first, first + 5))
    notes = [ARTEFACT] if table.artefact else []
    if table.excuse:
        notes.append(f"A difference means nothing: {table.excuse}.")
    if notation != table.features and first != FIRST_NEURON:
        notes.append(
            f"Neurons from {first} replace those from {FIRST_NEURON}: the model's width is {width}."
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
            f"On the hidden axis, {sum(indices)} of {len(indices)} tokens have the id of their "
            "own neuron."
        )
    return {
        "table": table.name,
        "features": notation,
        "untrained": table.untrained,
        "notes": notes + missing,
        "claims": [
            each._asdict()
            for each in claims(
                table, [feature.spec for feature in asked], found, lambda: donor.best, len(texts)
            )
        ],
        "cells": cells,
    }


def own_indices(specs: list[Feature], inputs: list[list[int]]) -> list[bool]:
    """Whether the id of each token is the index of its neuron, for features of one neuron."""
    return [
        tokens[position] == spec.neurons.start
        for spec, tokens in zip(specs, inputs, strict=True)
        if len(spec.neurons) == 1
        for position in spec.positions or range(len(tokens))
    ]


def features(
    table: Table, notation: str, depth: int, width: int, pages: Mapping[int, Sequence[str | None]]
) -> tuple[list[Wanted], list[str]]:
    """The features of a table that a model of this size has, and notes on what is left out."""
    asked, notes = [], []
    for block in table.blocks:
        specs = parse_features(notation, block, width)
        page = pages.get(block, ())
        if page and len(page) != len(specs):
            notes.append(
                f"The document's row of block {block} has {len(page)} cells for "
                f"{len(specs)} features: {page}."
            )
        if block <= depth:
            asked += map(Wanted, specs, page if len(page) == len(specs) else [None] * len(specs))
    if deeper := [str(block) for block in table.blocks if block > depth]:
        notes.append(f"Skipped, because the model has {depth} blocks: {', '.join(deeper)}.")
    return asked, notes


def ids_by_text(texts: list[str]) -> dict[str, list[int]]:
    """The ids of the tokens of each text, ignoring white space."""
    ids: dict[str, list[int]] = {}
    for token, text in enumerate(texts):
        ids.setdefault(squeezed(text), []).append(token)
    return ids


def cell(
    table: Table,
    asked: Wanted,
    way: str,
    ids: list[int],
    texts: list[str],
    by_text: dict[str, list[int]],
) -> Cell:
    """One cell, with its verdict."""
    spec, page = asked
    words = [texts[token] for token in ids]
    tokens = None if page is None else split(page, by_text, len(ids))
    excuse = "the document did not decode them" if way == DECODED else table.excuse
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
