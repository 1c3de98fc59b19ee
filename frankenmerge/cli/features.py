"""`features`: the document's tables, for any donor and by every method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

from frankenmerge.cli.console import device_option, download_option, dtype_option, json_option, out, print_json, progress, table
from frankenmerge.errors import fail


class Asked(NamedTuple):
    """What the user asked for."""

    layers: list[int]
    neurons: list[int]
    tokens: int
    site: Literal["block", "attention"]
    isolated: bool
    prefix: tuple[int, ...]
    bottom: bool
    candidates: int | None


def _numbers(_context: Any, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Read `1,4,8` and `0-3`, ends included."""
    if value is None:
        return None
    numbers: list[int] = []
    try:
        for part in value.split(","):
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: write numbers and ranges, such as 1,4,8 or 0-3", param=parameter) from error
    if not numbers or min(numbers) < 0:
        raise click.BadParameter(f"{value!r} names nothing", param=parameter)
    return list(dict.fromkeys(numbers))


@click.command()
@click.argument("donor")
@click.option("--method", type=click.Choice(["complete", "greedy", "gradient", "softmax-prior"]), default="complete", show_default=True)
@click.option("--layers", callback=_numbers, help="Blocks, 1-based, such as 1,4,8; 0 is the embedding. [default: 1, then every quarter]")
@click.option("--neurons", callback=_numbers, default="0-3", show_default=True, help="Neurons of the residual stream.")
@click.option(
    "--tokens", type=click.IntRange(1), default=4, show_default=True, help="Tokens of an input; for complete, how many are shown."
)
@click.option("--site", type=click.Choice(["block", "attention"]), default="block", show_default=True, help="Whose output.")
@click.option("--isolated", is_flag=True, help="Feed the embedding straight into every block.")
@click.option("--untrained", type=int, metavar="SEED", help="Search random weights of the same config instead: the control.")
@click.option("--bos", is_flag=True, help="Put BOS before the tokens (complete and greedy).")
@click.option("--bottom", is_flag=True, help="The tokens that excite least (complete).")
@click.option("--candidates", type=click.IntRange(1), help="Try only so many tokens at each later step, and report the recall (greedy).")
@device_option
@dtype_option
@download_option
@json_option
def features(
    donor: str,
    method: str,
    layers: list[int] | None,
    neurons: list[int],
    tokens: int,
    site: Literal["block", "attention"],
    isolated: bool,
    untrained: int | None,
    bos: bool,
    bottom: bool,
    candidates: int | None,
    device: str,
    dtype: str,
    download: bool,
    as_json: bool,
) -> None:
    """Show which tokens excite the neurons of DONOR's blocks most."""
    from frankenmerge.analysis.analyze import token_texts
    from frankenmerge.analysis.features import Feature, check_features
    from frankenmerge.architectures import quantity
    from frankenmerge.checkpoint import open_checkpoint
    from frankenmerge.models import load_model, untrained_model

    checkpoint = open_checkpoint(donor, download=download)
    layers = layers or sorted({1, *(max(1, checkpoint.blocks * quarter // 4) for quarter in range(1, 5))})
    width = quantity(checkpoint.config, "width") or 0
    check_features([Feature(layer, neuron) for layer in layers for neuron in neurons], blocks=checkpoint.blocks, width=width)
    first = checkpoint.config.get("bos_token_id")
    if bos and not isinstance(first, int):
        raise fail(donor, "a bos_token_id in config.json", repr(first), "search without --bos")
    vocabulary = token_texts(checkpoint)
    model = (
        load_model(checkpoint, dtype=dtype, device=device) if untrained is None else untrained_model(checkpoint, untrained, device=device)
    )
    prefix = (first,) if bos and isinstance(first, int) else ()
    asked = Asked(layers, neurons, tokens, site, isolated, prefix, bottom, candidates)
    with progress(f"{method} search", None, "inputs") as advance:
        found, told = METHODS[method](model, asked, advance)
    texts = {key: [vocabulary[token] for token in ids] for key, ids in found.items()}
    if as_json:
        rows = [{"block": key[0], "neuron": key[1], "tokens": found[key], "texts": texts[key]} for key in found]
        print_json({"donor": donor, "method": method, "untrained": untrained, "features": rows, **told})
        return
    title = f"{Path(donor).name}, {method}" + ("" if untrained is None else f", random weights (seed {untrained})")
    made = table(title, "block", *(f"[:, :, {neuron}]" for neuron in neurons))
    for layer in layers:
        made.add_row(str(layer), *(" ".join(map(repr, texts[layer, neuron])) for neuron in neurons))
    out().print(made)
    for name, value in told.items():
        out().print(f"{name.replace('_', ' ')}: {value}", markup=False)


Found = tuple[dict[tuple[int, int], list[int]], dict[str, Any]]
"""Tokens by (block, neuron), and what else there is to tell."""


def _complete(model: Any, asked: Asked, advance: Callable[[int], None]) -> Found:
    from frankenmerge.analysis.complete import complete_search

    top = complete_search(
        model, k=asked.tokens, prefix=asked.prefix, site=asked.site, isolated=asked.isolated, bottom=asked.bottom, progress=advance
    )  # fmt: skip
    return {(layer, neuron): top.tokens[layer, neuron].tolist() for layer in asked.layers for neuron in asked.neurons}, {}


def _greedy(model: Any, asked: Asked, advance: Callable[[int], None]) -> Found:
    from frankenmerge.analysis.features import Feature
    from frankenmerge.analysis.greedy import greedy_search

    wanted = [Feature(layer, neuron) for layer in asked.layers for neuron in asked.neurons]
    result = greedy_search(
        model, wanted, n=asked.tokens, site=asked.site, isolated=asked.isolated, candidates=asked.candidates, start=asked.prefix,
        progress=advance,
    )  # fmt: skip
    told = {"vocabulary_passes": result.passes} | ({} if result.recall is None else {"recall": result.recall})
    return {(feature.block, feature.neuron): row.tolist() for feature, row in zip(wanted, result.tokens, strict=True)}, told


def _gradient(model: Any, asked: Asked, advance: Callable[[int], None]) -> Found:
    from frankenmerge.analysis.gradient import gradient_search

    wanted = _specs(asked)
    result = gradient_search(
        model, list(wanted.values()), tokens=asked.tokens, site=asked.site, isolated=asked.isolated, progress=advance
    )  # fmt: skip
    told = {"excluded_tokens": len(result.excluded), "token_id_equals_neuron": result.artefact_share}
    return dict(zip(wanted, result.tokens.tolist(), strict=True)), told


def _softmax_prior(model: Any, asked: Asked, advance: Callable[[int], None]) -> Found:
    from frankenmerge.analysis.prior import prior_search

    wanted = _specs(asked)
    result = prior_search(
        model, list(wanted.values()), tokens=asked.tokens, site=asked.site, isolated=asked.isolated, progress=advance
    )  # fmt: skip
    return dict(zip(wanted, result.tokens.tolist(), strict=True)), {"mean_gap_from_one_hot": float(result.gap.mean())}


def _specs(asked: Asked) -> dict[tuple[int, int], Any]:
    from frankenmerge.analysis.specs import FeatureSpec

    return {(layer, n): FeatureSpec(layer, range(n, n + 1)) for layer in asked.layers for n in asked.neurons}


METHODS: dict[str, Callable[[Any, Asked, Callable[[int], None]], Found]] = {
    "complete": _complete,
    "greedy": _greedy,
    "gradient": _gradient,
    "softmax-prior": _softmax_prior,
}
