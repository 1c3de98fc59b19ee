"""`transplant-tokenizer`: a model with the tokenizer of another."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from frankenmerge.artefacts.recipe_schema import ANCHORS, APPROXIMATIONS
from frankenmerge.cli.console import out, progress, table
from frankenmerge.cli.measuring import read_texts, separator_option
from frankenmerge.cli.merge import write_checkpoint, writing_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from frankenmerge.splicing.stages import Stages
    from frankenmerge.workflows.transplanting import Measured


@click.command("transplant-tokenizer")
@click.argument("model")
@click.argument("donor")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--method",
    type=click.Choice(APPROXIMATIONS),
    default="nearest",
    show_default=True,
    help="How a token that MODEL lacks gets its row: the mean of pieces that it knows, or a "
    "combination of tokens that both know, as they lie in the embedding of DONOR: by orthogonal "
    "matching pursuit, barycentric weights, or the nearest.",
)
@click.option(
    "--anchors",
    type=click.IntRange(1, 1024),
    help=f"Maximum number of tokens that one is combined from.  [default: {ANCHORS}]",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Measure bits per byte before and after on this text; may be repeated. With --dry-run "
    "write nothing.",
)
@separator_option
@writing_options
def transplant_tokenizer(
    model: str,
    donor: str,
    output: Path,
    method: Any,
    anchors: int | None,
    texts: tuple[Path, ...],
    separator: str | None,
    **options: Any,
) -> None:
    """Write MODEL with the tokenizer of DONOR to the new folder OUTPUT.

    Tokens that both have keep MODEL's rows of embedding and head; rows of others are made from
    these. All other tensors are copied. Then the two models can be spliced.
    """
    from frankenmerge.artefacts.recipe import transplant_recipe
    from frankenmerge.workflows.merging import with_weights
    from frankenmerge.workflows.transplanting import measured, tokens_of

    read = read_texts(texts, separator, download=options["download"])
    if anchors is not None and method == "pieces":
        raise click.UsageError("--anchors belongs to --method omp, barycentric or nearest")
    recipe = transplant_recipe(model, donor, method, anchors or ANCHORS)

    def before(stages: "Stages") -> dict[str, Any]:
        tokens = tokens_of(stages.result)
        also: dict[str, Any] = {"tokens": tokens._asdict()}
        if not options["as_json"]:
            out().print(
                f"{sum(tokens):,} tokens: {tokens.exact:,} exact, {tokens.composed:,} composed of "
                f"known pieces, {tokens.approximated:,} approximated."
            )
        if read:
            ready = with_weights(stages, options["download"], options["allow_pickle"])
            found = measured(ready.result, read, progress=progress)
            also["bits_per_byte"] = [each._asdict() for each in found]
            if not options["as_json"]:
                _print_measured(found)
        return also

    write_checkpoint([recipe], "recipe", output, before=before, **options)


def _print_measured(found: "Sequence[Measured]") -> None:
    shown = table("Bits per byte", "text", "own tokenizer", "new tokenizer")
    for each in found:
        shown.add_row(Path(each.text).name, f"{each.before:.3f}", f"{each.after:.3f}")
    out().print(shown)
