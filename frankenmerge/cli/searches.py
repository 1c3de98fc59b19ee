"""What `features` runs: for each method, from what was asked to the tokens found."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from frankenmerge.errors import fail
from frankenmerge.progress import Advance


@dataclass(frozen=True)
class SearchOptions:
    """What the user asked for; names are those of the options."""

    layers: list[int]
    notation: str
    neurons: list[int] | None
    tokens: int
    site: Literal["block", "attention"]
    isolated: bool
    prefix: tuple[int, ...]
    bottom: bool
    mask_special: bool
    beam: int
    positions: Literal["last", "all"]
    candidates: int | None
    optimizer: Literal["descent", "adam"] | None
    steps: int | None
    target: float
    decode: Literal["pinv", "hidden"]
    text: str | None
    distance: Literal["l1", "cosine"]

    def features(self, checkpoint: Any, method: str) -> list:
        """The features, block by block. Raises FrankenmergeError for those that the donor or the method does not have."""
        from frankenmerge.analysis.features import (
            Feature,
            check_features,
            check_single,
            parse_features,
        )
        from frankenmerge.analysis.greedy import WHY_SINGLE
        from frankenmerge.donors.config import quantity

        width = quantity(checkpoint.config, "width") or 0
        if self.neurons:
            wanted = [Feature.of(layer, neuron) for layer in self.layers for neuron in self.neurons]
        else:
            wanted = [
                feature
                for layer in self.layers
                for feature in parse_features(self.notation, layer, width)
            ]
        if why := {"complete": WHY_COMPLETE, "greedy": WHY_SINGLE}.get(method):
            check_single(wanted, why)
        check_features(wanted, blocks=checkpoint.blocks, width=width, tokens=self.tokens)
        return wanted

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the options that were given, where the method itself knows the default."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


WHY_COMPLETE = "every token is run by itself and ranked for each neuron; use gradient or softmax-prior for others"


class SearchResult(NamedTuple):
    """What a method found."""

    tokens: Any
    """Token ids `[layers, m, n]`: `m` features, or one text."""
    compared: Any
    """Those by which blocks are compared, likewise; of a text, `[layers, positions, 1]`."""
    told: dict[str, Any]
    """What else there is to tell."""


def _complete(
    checkpoint: Any, model: Any, asked: SearchOptions, wanted: list, advance: Advance
) -> SearchResult:
    from frankenmerge.analysis.complete import complete_search
    from frankenmerge.analysis.masks import meaningless_tokens
    from frankenmerge.models.loading import embedding_of

    masked = meaningless_tokens(checkpoint, embedding_of(model)) if asked.mask_special else []
    top = complete_search(
        model,
        k=asked.tokens,
        prefix=asked.prefix,
        site=asked.site,
        isolated=asked.isolated,
        bottom=asked.bottom,
        masked=masked,
        advance=advance,
    )
    advance(len(masked))
    neurons = [feature.neuron for feature in wanted[: len(wanted) // len(asked.layers)]]
    tokens = top.tokens[asked.layers][:, neurons]
    return SearchResult(
        tokens, tokens[:, :, :1], {"masked_tokens": masked} if asked.mask_special else {}
    )


def _greedy(
    _checkpoint: Any, model: Any, asked: SearchOptions, wanted: list, advance: Advance
) -> SearchResult:
    from frankenmerge.analysis.greedy import greedy_search

    result = greedy_search(
        model,
        wanted,
        n=asked.tokens,
        site=asked.site,
        isolated=asked.isolated,
        positions=asked.positions,
        beam=asked.beam,
        candidates=asked.candidates,
        start=asked.prefix,
        advance=advance,
    )
    told = {"vocabulary_passes": result.passes} | (
        {} if result.recall is None else {"recall": result.recall}
    )
    return _found(result.tokens, asked, told)


def _gradient(
    _checkpoint: Any, model: Any, asked: SearchOptions, wanted: list, advance: Advance
) -> SearchResult:
    from frankenmerge.analysis.gradient import gradient_search

    result = gradient_search(
        model,
        wanted,
        tokens=asked.tokens,
        site=asked.site,
        isolated=asked.isolated,
        target=asked.target,
        decode=asked.decode,
        advance=advance,
        **asked.given("steps", "optimizer"),
    )
    told = {
        "excluded_tokens": len(result.excluded),
        "token_id_equals_neuron": result.artefact_share,
    }
    return _found(
        result.tokens.numpy(), asked, told | ({"artefact": True} if result.artefact else {})
    )


def _softmax_prior(
    _checkpoint: Any, model: Any, asked: SearchOptions, wanted: list, advance: Advance
) -> SearchResult:
    from frankenmerge.analysis.prior import prior_search

    result = prior_search(
        model,
        wanted,
        tokens=asked.tokens,
        site=asked.site,
        isolated=asked.isolated,
        target=asked.target,
        advance=advance,
        **asked.given("steps"),
    )
    return _found(result.tokens.numpy(), asked, {"mean_gap_from_one_hot": float(result.gap.mean())})


def _found(tokens: Any, asked: SearchOptions, told: dict[str, Any]) -> SearchResult:
    by_layer = tokens.reshape(len(asked.layers), -1, asked.tokens)
    return SearchResult(by_layer, by_layer, told)


METHODS: dict[str, Callable[[Any, Any, SearchOptions, list, Advance], SearchResult]] = {
    "complete": _complete,
    "greedy": _greedy,
    "gradient": _gradient,
    "softmax-prior": _softmax_prior,
}


def recovered(
    checkpoint: Any, model: Any, asked: SearchOptions, advance: Advance
) -> tuple[SearchResult, Any]:
    """Recover the text's tokens from every asked block's output; with the true tokens `[s]`.

    Raises:
        FrankenmergeError: for no text, or one that is no input of the donor.
    """
    import numpy as np
    import torch

    from frankenmerge.analysis.decode import decoder_of, embedding_table
    from frankenmerge.analysis.gradient import check_length
    from frankenmerge.analysis.inversion import invert, outputs_of
    from frankenmerge.models.loading import embedding_of, load_tokenizer

    if not asked.text:
        raise fail(
            "--input",
            "a text to recover",
            "none",
            'give one, such as --input "the quick brown fox"',
        )
    true = torch.tensor(
        load_tokenizer(checkpoint).encode(asked.text, add_special_tokens=False), dtype=torch.long
    )
    check_length(model, len(true))
    decoder = decoder_of(embedding_table(model), excluded=None)
    found = []
    for layer in asked.layers:
        outputs = outputs_of(
            model,
            true[None].to(embedding_of(model).device),
            layer,
            site=asked.site,
            isolated=asked.isolated,
        )
        result = invert(
            model,
            outputs,
            layer,
            loss=asked.distance,
            site=asked.site,
            isolated=asked.isolated,
            decoder=decoder,
            **asked.given("steps", "optimizer"),
        )
        found.append(result.tokens.numpy())
        advance(1)
    tokens = np.stack(found)
    return SearchResult(
        tokens, tokens.transpose(0, 2, 1), {"excluded_tokens": len(decoder.left_out)}
    ), true.numpy()
