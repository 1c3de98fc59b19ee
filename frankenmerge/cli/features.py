"""`features`: the tables of the source document (docs/method.md), for any donor and method."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.text import Text as RichText

from frankenmerge.artefacts.searches import SEARCHES, searches_with
from frankenmerge.cli.console import (
    device_option,
    download_option,
    dtype_option,
    json_option,
    max_memory_option,
    numbers,
    offload_option,
    out,
    output_option,
    pickle_option,
    print_json,
    progress,
    refuse_others,
    table,
)
from frankenmerge.cli.measuring import TEXT_HELP, read_texts, separator_option
from frankenmerge.errors import fail, visible

if TYPE_CHECKING:
    from frankenmerge.artefacts.features import ExampleRecord, FeatureRecord
    from frankenmerge.artefacts.token_overlap import Agreement
    from frankenmerge.workflows.searches import SearchResult

MEANT_FOR: dict[str, tuple[str, ...]] = {
    option: searches_with(option)
    for option in dict.fromkeys(option for info in SEARCHES.values() for option in info.options)
}
"""The methods that an option applies to; options that are missing here apply to all."""
_OF_FEATURES = tuple(method for method in SEARCHES if method != "inversion")
MEANT_FOR |= dict.fromkeys(("texts", "separator", "output"), _OF_FEATURES)
MOST_COLUMNS = 12
"""How many blocks the table of their agreement has at most."""
_FRONT_ROWS = 8
"""Rows of a printed front at most."""


def _method_help() -> str:
    rows = (f"{name}: {info.explanation} ({info.cost})" for name, info in SEARCHES.items())
    return "; ".join(rows) + "."


def _help(text: str, option: str) -> str:
    """A help text with the methods that the option applies to."""
    return f"{text} ({' and '.join(MEANT_FOR[option])})."


@click.command()
@click.argument("donor")
@click.option(
    "--method",
    type=click.Choice(list(SEARCHES)),
    default="complete",
    show_default=True,
    help=_method_help(),
)
@click.option(
    "--layers",
    callback=numbers,
    help="Blocks, 1-based, such as 1,4,8; 0 is the embedding. [default: 1, then every quarter]",
)
@click.option(
    "--features",
    "notation",
    default="[:, :, 0-3]",
    show_default=True,
    help="Features as [:, positions, neurons]: 0-3 is four features, "
    "0:4 one feature of four neurons.",
)
@click.option(
    "--neurons",
    callback=numbers,
    help="Short for --features: single neurons, such as 0-3 or 1,4,8.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Number of tokens in an input; for complete, number of tokens shown.",
)
@click.option(
    "--site",
    type=click.Choice(["block", "attention"]),
    default="block",
    show_default=True,
    help="Whose output to use.",
)
@click.option("--isolated", is_flag=True, help="Feed the embedding directly into every block.")
@click.option(
    "--untrained",
    type=int,
    metavar="SEED",
    help="Search random weights of the same config instead: the control.",
)
@click.option("--bos", is_flag=True, help=_help("Put BOS before the tokens", "bos"))
@click.option(
    "--bottom", is_flag=True, help=_help("Show the tokens with the lowest activation", "bottom")
)
@click.option(
    "--mask-special",
    is_flag=True,
    help=_help("Leave out special and untrained tokens", "mask_special"),
)
@click.option(
    "--beam",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help=_help("Number of inputs to continue at each step", "beam"),
)
@click.option(
    "--positions",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help=_help("Choose a token by the last position or by the sum over all", "positions"),
)
@click.option(
    "--candidates",
    type=click.IntRange(1),
    help=_help(
        "Try only this many tokens at each later step, or at a position, and report the recall",
        "candidates",
    ),
)
@click.option(
    "--starts",
    type=click.IntRange(1),
    help=_help(
        "Number of inputs to begin from; without --candidates the first is that of greedy search",
        "starts",
    )[:-1]
    + ". [default: 8]",
)
@click.option(
    "--fluent",
    is_flag=True,
    help=_help(
        "Also search the front of activation against the model's cross-entropy of the input",
        "fluent",
    ),
)
@click.option(
    "--optimizer",
    type=click.Choice(["descent", "adam"]),
    help="[default: descent for gradient, adam for inversion]",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="[default: 100 for gradient, 60 for softmax-prior, 300 for inversion, 40 generations for "
    "--fluent]",
)
@click.option(
    "--target",
    type=float,
    default=100.0,
    show_default=True,
    help=_help("Value that outputs are driven to", "target"),
)
@click.option(
    "--decode",
    type=click.Choice(["pinv", "hidden"]),
    default="pinv",
    show_default=True,
    help=_help(
        "How embeddings become tokens; `hidden` reproduces the source document's artefact", "decode"
    ),
)
@click.option(
    "--input",
    "text",
    metavar="TEXT",
    help=_help("Text to recover from a block's output", "text"),
)
@click.option(
    "--distance",
    type=click.Choice(["l1", "cosine"]),
    default="l1",
    show_default=True,
    help=_help("Distance between outputs", "distance"),
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help=f"Also show the places of a text with the highest activation. {TEXT_HELP} May be "
    "repeated.",
)
@separator_option
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of PNG and JPEG files to rank, for vision transformers "
    "(complete). [default: 1,024 images of noise]",
)
@output_option(
    "Also write what was found: NAME.features.json, which `report` shows; of a vision transformer, "
    "the images, a row for each block, to a PNG file.",
    required=False,
)
@device_option
@max_memory_option
@offload_option
@dtype_option
@download_option
@pickle_option
@json_option
@click.pass_context
def features(
    context: click.Context,
    donor: str,
    method: str,
    untrained: int | None,
    output: Path | None,
    download: bool,
    allow_pickle: bool,
    texts: tuple[Path, ...],
    separator: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Show the tokens with the highest activation of the neurons of DONOR's blocks.

    With `--method inversion`, show instead how much of a text can be recovered from each block's
    output. Of a vision transformer, show the images of a folder with the highest activation, or
    with `--method pixels` images that are optimised.
    """
    from frankenmerge.analysis.analyze import token_texts
    from frankenmerge.artefacts.features import save
    from frankenmerge.donors.images import is_vision
    from frankenmerge.models.loading import Placement
    from frankenmerge.splicing.opening import open_donor
    from frankenmerge.workflows.feature_records import features_file
    from frankenmerge.workflows.searches import SearchOptions, search

    refuse_others(context, method, MEANT_FOR)
    source = context.get_parameter_source("notation")
    if given["neurons"] and source is not ParameterSource.DEFAULT:
        raise fail(
            "--neurons",
            "either --neurons or --features",
            "both",
            "write all of it in --features",
        )
    checkpoint = open_donor(donor, download=download, allow_pickle=allow_pickle)
    options = SearchOptions(**{field.name: given[field.name] for field in fields(SearchOptions)})
    placement = Placement(
        given["dtype"], given["device"], given["max_memory"] or {}, given["offload"]
    )
    vocabulary = [] if is_vision(checkpoint.config) else token_texts(checkpoint)
    result = search(
        checkpoint,
        method,
        options,
        placement,
        untrained=untrained,
        texts=read_texts(texts, separator, download=download),
        progress=progress,
    )
    if output and not is_vision(checkpoint.config):
        save(features_file(checkpoint, method, options, result, vocabulary, untrained), output)
    record = {
        "donor": donor,
        "method": method,
        "untrained": untrained,
        "context": "bos" if options.bos else "plain",
    }
    title = f"{Path(donor).name}, {method}, {'after BOS' if options.bos else 'plain'}"
    title += "" if untrained is None else f", random weights (seed {untrained})"
    if result.pictures is not None:
        from frankenmerge.cli.pictures import ShownPictures, write_sheet

        del record["context"]
        title = title.replace(", plain", "")
        if output:
            write_sheet(result.pictures, output)
            record["output"] = str(output)
        if result.pictures.activations is not None:
            pictures = ShownPictures(result, result.pictures, title, record)
            print_json(pictures.json()) if as_json else pictures.print()
            return
        vocabulary = result.pictures.names
    shown = _Shown(result, vocabulary, title, record)
    if as_json:
        print_json(shown.json())
    else:
        shown.print()
        if output:
            out().print(f"Written to {output}", markup=False)


@dataclass(frozen=True)
class _Shown:
    """A result and what its output needs."""

    result: "SearchResult"
    vocabulary: list[str]
    title: str
    record: dict[str, Any]
    """What was searched."""

    @property
    def agreement(self) -> "Agreement":
        """Of all pairs of blocks."""
        from frankenmerge.artefacts.token_overlap import token_agreement

        return token_agreement(self.result.compared, self.result.compared)

    @property
    def texts(self) -> list[list[list[str]]]:
        """Of the tokens, block by block and feature by feature."""
        from frankenmerge.workflows.feature_records import texts_of

        return [
            [texts_of(tokens, self.vocabulary) for tokens in of_block.tolist()]
            for of_block in self.result.tokens
        ]

    @property
    def features(self) -> "list[FeatureRecord]":
        """The features with their inputs."""
        from frankenmerge.workflows.feature_records import feature_records

        return feature_records(self.result, self.vocabulary)

    @property
    def input_texts(self) -> list[str]:
        """For inversion: the texts of the true tokens."""
        from frankenmerge.workflows.feature_records import texts_of

        assert self.result.target is not None
        return texts_of(self.result.target.tolist(), self.vocabulary)

    @property
    def recalls(self) -> list[tuple[float, float | None]]:
        """For inversion: each block's share of recovered tokens, and that of permuted positions."""
        from frankenmerge.artefacts.token_overlap import token_agreement

        assert self.result.target is not None
        recall = token_agreement(self.result.compared, self.result.target[None, :, None])
        permuted = [_known(value) for value in recall.permuted[:, 0].tolist()]
        return list(zip(recall.matrix[:, 0].tolist(), permuted, strict=True))

    def json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        found = self._features() if self.result.target is None else self._recovered()
        agreement = _agreement_as_json(self.result.blocks, self.agreement)
        return {**self.record, **found, **self.result.record, "agreement": agreement}

    def _features(self) -> dict[str, Any]:
        return {"features": [feature.as_json() for feature in self.features]}

    def _recovered(self) -> dict[str, Any]:
        result, target = self.result, self.result.target
        assert target is not None
        rows = [
            {"block": block, "tokens": tokens, "texts": texts, "recall": share, "permuted": chance}
            for block, (tokens,), (texts,), (share, chance) in zip(
                result.blocks, result.tokens.tolist(), self.texts, self.recalls, strict=True
            )
        ]
        return {
            "input": {
                "tokens": target.tolist(),
                "texts": self.input_texts,
            },
            "recovered": rows,
            "chance": 1 / len(self.vocabulary),
        }

    def print(self) -> None:
        """Print tables."""
        result, console = self.result, out()
        console.print(self._table())
        if result.target is not None:
            console.print(
                f"A random token is right with probability 1 in {len(self.vocabulary):,}; "
                "permuted: the recall when positions are exchanged."
            )
        for name, value in result.record.items():
            console.print(f"{name.replace('_', ' ')}: {value}", markup=False)
        if result.record.get("artefact"):
            console.print(
                "[bold red]Warning:[/] these are neuron indices read as token ids; "
                "they say nothing about the donor.",
                markup=True,
            )
        for feature in self.features:
            if feature.front:
                _print_front(feature)
            if feature.examples:
                _print_examples(feature)
        permuted = "features" if result.target is None else "positions"
        what = "tokens" if result.pictures is None else "images"
        _print_agreement(result.blocks, self.agreement, permuted, what)

    def _table(self):
        result = self.result
        if result.target is None:
            of_one_block = result.features[: result.tokens.shape[1]]
            rows = table(self.title, "block", *(feature.notation for feature in of_one_block))
            for block, texts in zip(result.blocks, self.texts, strict=True):
                rows.add_row(str(block), *map(_quoted, texts))
            return rows
        rows = table(self.title, "block", "recovered", "recall", "permuted")
        rows.add_row("input", _quoted(self.input_texts), "", "")
        for block, (texts,), (share, chance) in zip(
            result.blocks, self.texts, self.recalls, strict=True
        ):
            permuted = "" if chance is None else f"{chance:.2f}"
            rows.add_row(str(block), _quoted(texts), f"{share:.2f}", permuted)
        return rows


def _quoted(texts: Sequence[str]) -> str:
    return " ".join(map(repr, texts))


def _print_front(feature: "FeatureRecord") -> None:
    """Print some inputs of a front, evenly spaced, the highest activation first."""
    assert feature.front
    title = f"Fluent inputs of {feature.name}: some of {len(feature.front)}"
    rows = table(title, "tokens", "activation", "nats per token")
    last = len(feature.front) - 1
    count = min(last, _FRONT_ROWS - 1)
    for step in range(count + 1):
        point = feature.front[round(step * last / max(1, count))]
        numbers = f"{point.activation:.3f}", f"{point.cross_entropy:.2f}"
        rows.add_row(_quoted(point.texts), *numbers)
    out().print(rows)


def _print_examples(feature: "FeatureRecord") -> None:
    assert feature.examples is not None
    title = f"Examples of {feature.name}"
    if feature.activation is not None:
        title += f"; of what it likes most {feature.activation:.3f}"
    rows = table(title, "place", "activation")
    for example in feature.examples:
        rows.add_row(_highlighted(example), f"{example.activation:.3f}")
    out().print(rows)


def _highlighted(example: "ExampleRecord") -> RichText:
    """The passage, with its token in brackets and bold."""
    texts, place = list(map(visible, example.texts)), example.place
    shown = RichText("".join(texts[:place]))
    shown.append(f"[{texts[place]}]", style="bold")
    return shown.append("".join(texts[place + 1 :]))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _agreement_as_json(layers: list[int], agreement: "Agreement") -> dict[str, Any]:
    permuted = [[_known(value) for value in row] for row in agreement.permuted.tolist()]
    return {"blocks": layers, "same_tokens": agreement.matrix.tolist(), "permuted": permuted}


def _print_agreement(
    layers: list[int], agreement: "Agreement", permuted: str, what: str = "tokens"
) -> None:
    """Print a table of all pairs of blocks.

    Above the diagonal is the share of tokens (or images: `what`) that are the same, below it that
    of permuted features.
    """
    if not 2 <= len(layers) <= MOST_COLUMNS:
        return
    rows = table(
        f"Same {what} in two blocks (above the diagonal); with {permuted} permuted (below)",
        "block",
        *map(str, layers),
    )
    for i, layer in enumerate(layers):
        values = [
            agreement.matrix[i, j] if i < j else agreement.permuted[i, j]
            for j in range(len(layers))
        ]
        cells = [
            "" if i == j or math.isnan(value) else f"{value:.2f}" for j, value in enumerate(values)
        ]
        rows.add_row(str(layer), *cells)
    out().print(rows)
