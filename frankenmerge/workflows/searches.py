"""Run a search for features by name: from a donor and options to the tokens found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from frankenmerge.analysis.ascent import ascent_search
from frankenmerge.analysis.complete import complete_search
from frankenmerge.analysis.decode import decoder_of, embedding_table
from frankenmerge.analysis.examples import Example, Stretch, text_examples
from frankenmerge.analysis.features import Feature, check_features, check_single, parse_features
from frankenmerge.analysis.fluent import FrontPoint, fluent_search
from frankenmerge.analysis.gradient import check_length, gradient_search
from frankenmerge.analysis.greedy import WHY_SINGLE, greedy_search
from frankenmerge.analysis.images import thumbnail, top_images
from frankenmerge.analysis.inversion import invert, outputs_of
from frankenmerge.analysis.masks import meaningless_tokens
from frankenmerge.analysis.pixels import Ascent, bytes_of, pixel_search
from frankenmerge.analysis.prior import prior_search
from frankenmerge.artefacts.searches import SEARCHES
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import quantity
from frankenmerge.donors.images import image_shape, is_vision, need_language, need_vision
from frankenmerge.errors import fail
from frankenmerge.evaluation.documents import Text
from frankenmerge.evaluation.language import encode_text, windows
from frankenmerge.models.hooks import embedding_of
from frankenmerge.models.images import images_in, noise_images
from frankenmerge.models.loading import CPU, Placement, load_model, load_tokenizer
from frankenmerge.progress import Advance, Progress, silent

CONTEXT = 128
"""Most tokens in a window of a text of which examples are taken."""
RecordValue = int | float | bool | list[int] | None

WHY_COMPLETE = (
    "use gradient or softmax-prior (pixels for images): this search ranks single inputs for single "
    "neurons"
)
WHY_EXAMPLES = "search without --text: examples are of single neurons"
WHY_ONE_NEURON = {"complete": WHY_COMPLETE, "greedy": WHY_SINGLE, "ascent": WHY_SINGLE}
"""Why some searches take only features of one neuron at all positions."""


@dataclass(frozen=True)
class SearchOptions:
    """What to search for and how; `artefacts.searches` names the options of each search."""

    layers: list[int] | None = None
    """Blocks, 1-based; 0 is the embedding. By default 1, then every quarter."""
    notation: str = "[:, :, 0-3]"
    """Features in the source document's notation, see `parse_features`."""
    neurons: list[int] | None = None
    """Single neurons, instead of `notation`."""
    tokens: int = 4
    """Tokens of an input; for the complete search, how many to return."""
    site: Literal["block", "attention"] = "block"
    """The output of the block, or of its attention."""
    isolated: bool = False
    """Whether every block takes the embedding as its input."""
    bos: bool = False
    """Whether BOS precedes the tokens."""
    bottom: bool = False
    """Whether to find the tokens with the lowest activation."""
    mask_special: bool = False
    """Whether to skip special and untrained tokens."""
    beam: int = 1
    """Inputs to continue at each step."""
    positions: Literal["last", "all"] = "last"
    """Whether a token is chosen by the activation at its own position or summed over all."""
    candidates: int | None = None
    """Tokens to try after the first one, or at a position; all by default."""
    starts: int | None = None
    """Inputs that ascent begins from; by default its own."""
    fluent: bool = False
    """Whether to search the front of activation against the model's cross-entropy of the input."""
    optimizer: Literal["descent", "adam"] | None = None
    """By default the search's own."""
    steps: int | None = None
    """By default the search's own."""
    target: float = 100.0
    """The value that outputs are driven to."""
    decode: Literal["pinv", "hidden"] = "pinv"
    """How embeddings become tokens, see `gradient_search`."""
    text: str | None = None
    """The text that inversion recovers."""
    distance: Literal["l1", "cosine"] = "l1"
    """The distance between outputs that inversion minimises."""
    images: Path | None = None
    """A folder of images that a vision transformer is shown; images of noise by default."""

    def set_values(self, *names: str) -> dict[str, Any]:
        """Those of some options that are not None; the search knows the defaults of the others."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class FoundPictures(NamedTuple):
    """The images that a search in a vision transformer found."""

    names: list[str]
    """Of the images that were ranked; empty where images were optimised."""
    pixels: np.ndarray
    """`[blocks, m, n, h, w, c]`, uint8: `n` images for each feature, the best first."""
    activations: np.ndarray | None
    """`[blocks, m]`, float32, of optimised images: standard deviations above images of noise."""


@dataclass(frozen=True)
class SearchResult:
    """The tokens that a search found."""

    blocks: list[int]
    """Which blocks were searched."""
    features: list[Feature]
    """Block by block, `m` for each; empty for inversion."""
    tokens: np.ndarray
    """Token ids `[blocks, m, n]`; for inversion `m = 1`, the recovered text."""
    compared: np.ndarray
    """The tokens by which blocks are compared: the same, but only the best token of a complete
    search, and `[blocks, n, 1]` for inversion.
    """
    record: Mapping[str, RecordValue]
    """Further results, such as a recall, by name."""
    target: np.ndarray | None = None
    """For inversion, the true tokens `[n]`."""
    activations: np.ndarray | None = None
    """Of features of single neurons: at the last token of each input `[blocks, m]`, or of the best
    token of a complete search.
    """
    fronts: list[list[FrontPoint]] | None = None
    """With `fluent`, in the order of the features."""
    examples: list[list[Example]] | None = None
    """Where a text was given, in the order of the features."""
    pictures: FoundPictures | None = None
    """For vision transformers, the images that were found; `tokens` are their indices among those
    that were ranked, and `[blocks, m, 0]` where images were optimised.
    """


@dataclass(frozen=True)
class _Search:
    """One search, ready to run."""

    checkpoint: Checkpoint
    options: SearchOptions
    blocks: list[int]
    features: list[Feature]
    prefix: tuple[int, ...]

    def result(self, tokens: np.ndarray, **record: RecordValue) -> SearchResult:
        """The result of a search that found `options.tokens` tokens for each feature."""
        by_block = tokens.reshape(len(self.blocks), -1, self.options.tokens)
        return SearchResult(self.blocks, self.features, by_block, by_block, record)

    def searched(self, ranked: np.ndarray) -> np.ndarray:
        """Of what is ranked for every block and neuron `[l+1, d, k]`, that of the features."""
        of_one_block = self.features[: len(self.features) // len(self.blocks)]
        return ranked[self.blocks][:, [feature.neuron for feature in of_one_block]]

    def by_block(self, values: np.ndarray) -> np.ndarray:
        """Values of all features `[blocks, m]`."""
        return values.reshape(len(self.blocks), -1)


def search(
    checkpoint: Checkpoint,
    method: str,
    options: SearchOptions,
    placement: Placement = CPU,
    *,
    untrained: int | None = None,
    texts: Sequence[Text] = (),
    progress: Progress = silent,
) -> SearchResult:
    """Load a donor and search the inputs with the highest activation of its features.

    Args:
        checkpoint: the donor.
        method: a name in `artefacts.searches.SEARCHES`.
        options: what to search for; options of other searches are ignored.
        placement: type and devices of the model.
        untrained: a seed: search a model with random weights of the same config, the control.
        texts: also find the windows of these in which the features have the highest activation.
        progress: reports the inputs, features or blocks done.

    Raises:
        FrankenmergeError: for features, tokens or an input that the donor or the search does not
            have, before the model is loaded where that can be known.
    """
    _check_kind(checkpoint, method, options)
    blocks = options.layers or default_blocks(checkpoint.blocks)
    features = [] if method == "inversion" else features_of(checkpoint, method, options, blocks)
    prepared = _Search(checkpoint, options, blocks, features, _prefix(checkpoint, options))
    if method == "inversion" and not options.text:
        expected, remedy = "a text to recover", 'add one, such as --input "the quick brown fox"'
        raise fail("--input", expected, "none", remedy)
    if texts:
        need_language(checkpoint)
        check_single(features, WHY_EXAMPLES)
    if method == "ascent" and options.steps and not options.fluent:
        raise fail("--steps", "--fluent, whose generations they are", "none", "add it")
    if options.fluent and options.isolated:
        expected, remedy = "blocks in their order, for its cross-entropy", "leave one of them out"
        raise fail("--fluent", expected, "--isolated", remedy)
    model = load_model(checkpoint, placement, untrained=untrained)
    total, unit = _work(method, prepared)
    ranks_images = method == "complete" and is_vision(checkpoint.config)
    with progress(SEARCHES[method].title, total, unit) as advance:
        result = (_ranked_images if ranks_images else METHODS[method])(prepared, model, advance)
    if texts:
        with progress("reading the text", None, "tokens") as advance:
            examples = _examples(prepared, model, texts, advance)
        result = replace(result, examples=examples)
    return result


def _check_kind(checkpoint: Checkpoint, method: str, options: SearchOptions) -> None:
    """Refuse searches for tokens in vision transformers, and for images in language models."""
    if method == "pixels":
        need_vision(checkpoint, "--method pixels")
    elif options.images:
        need_vision(checkpoint, "--images")
    elif method != "complete" or options.bos or options.mask_special:
        need_language(checkpoint)


def default_blocks(count: int) -> list[int]:
    """The first of `count` blocks, then those at every quarter."""
    return sorted({1, *(max(1, count * quarter // 4) for quarter in range(1, 5))})


def features_of(
    checkpoint: Checkpoint, method: str, options: SearchOptions, blocks: list[int]
) -> list[Feature]:
    """The features that options describe, block by block.

    Raises:
        FrankenmergeError: for features that the donor or the search does not have.
    """
    width = quantity(checkpoint.config, "width") or 0
    if options.neurons:
        features = [Feature.of(block, neuron) for block in blocks for neuron in options.neurons]
    else:
        features = [
            feature
            for block in blocks
            for feature in parse_features(options.notation, block, width)
        ]
    if why := WHY_ONE_NEURON.get(method):
        check_single(features, why)
    positions = options.tokens
    if is_vision(checkpoint.config):
        positions = image_shape(checkpoint).patches
    check_features(features, blocks=checkpoint.blocks, width=width, tokens=positions)
    return features


def _prefix(checkpoint: Checkpoint, options: SearchOptions) -> tuple[int, ...]:
    if not options.bos:
        return ()
    token = checkpoint.config.get("bos_token_id")
    if not isinstance(token, int):
        expected = "a bos_token_id in config.json"
        raise fail(checkpoint.name, expected, repr(token), "search without --bos")
    return (token,)


def _work(method: str, search: _Search) -> tuple[int | None, str]:
    """How many units of what a search runs, for a progress bar; None if that is unknown."""
    if method == "complete":
        images = is_vision(search.checkpoint.config)
        count = None if images else quantity(search.checkpoint.config, "vocabulary")
        return count, "images" if images else "inputs"
    if method in ("greedy", "ascent"):
        return None, "inputs"
    if method == "inversion":
        return len(search.blocks), "blocks"
    return len(search.features), "features"


def _complete(search: _Search, model: PreTrainedModel, advance: Advance) -> SearchResult:
    options = search.options
    masked = (
        meaningless_tokens(search.checkpoint, embedding_of(model)) if options.mask_special else []
    )
    top = complete_search(
        model,
        k=options.tokens,
        prefix=search.prefix,
        site=options.site,
        isolated=options.isolated,
        bottom=options.bottom,
        masked=masked,
        advance=advance,
    )
    advance(len(masked))
    tokens = search.searched(top.tokens)
    record = {"masked_tokens": masked} if options.mask_special else {}
    values = search.searched(top.values)[:, :, 0]
    result = SearchResult(search.blocks, search.features, tokens, tokens[:, :, :1], record)
    return replace(result, activations=values)


def _greedy(search: _Search, model: PreTrainedModel, advance: Advance) -> SearchResult:
    options = search.options
    found = greedy_search(
        model,
        search.features,
        n=options.tokens,
        site=options.site,
        isolated=options.isolated,
        positions=options.positions,
        beam=options.beam,
        candidates=options.candidates,
        start=search.prefix,
        advance=advance,
    )
    recall = {} if found.recall is None else {"recall": found.recall}
    result = search.result(found.tokens, vocabulary_passes=found.passes, **recall)
    return replace(result, activations=search.by_block(found.values[:, -1]))


def _ascent(search: _Search, model: PreTrainedModel, advance: Advance) -> SearchResult:
    options = search.options
    found = ascent_search(
        model,
        search.features,
        n=options.tokens,
        site=options.site,
        isolated=options.isolated,
        positions=options.positions,
        candidates=options.candidates,
        start=search.prefix,
        advance=advance,
        **options.set_values("starts"),
    )
    recall = {} if found.recall is None else {"recall": found.recall}
    record = {"inputs": found.inputs, "vocabulary_passes": round(found.passes, 1), **recall}
    if not options.fluent:
        result = search.result(found.tokens, **record)
        return replace(result, activations=search.by_block(found.values[:, -1]))
    evolved = fluent_search(
        model,
        search.features,
        torch.from_numpy(found.tokens).long(),
        site=options.site,
        positions=options.positions,
        start=search.prefix,
        advance=advance,
        **options.set_values("steps"),
    )
    best = [front[0] for front in evolved.fronts]
    result = search.result(
        np.array([point.tokens for point in best]), **record, fluent_inputs=evolved.inputs
    )
    activations = search.by_block(np.array([point.activation for point in best]))
    return replace(result, activations=activations, fronts=evolved.fronts)


def _gradient(search: _Search, model: PreTrainedModel, advance: Advance) -> SearchResult:
    options = search.options
    found = gradient_search(
        model,
        search.features,
        tokens=options.tokens,
        site=options.site,
        isolated=options.isolated,
        target=options.target,
        decode=options.decode,
        advance=advance,
        **options.set_values("steps", "optimizer"),
    )
    record = {
        "excluded_tokens": len(found.excluded),
        "token_id_equals_neuron": found.artefact_share,
    }
    artefact = {"artefact": True} if found.artefact else {}
    return search.result(found.tokens.numpy(), **record, **artefact)


def _softmax_prior(search: _Search, model: PreTrainedModel, advance: Advance) -> SearchResult:
    options = search.options
    found = prior_search(
        model,
        search.features,
        tokens=options.tokens,
        site=options.site,
        isolated=options.isolated,
        target=options.target,
        advance=advance,
        **options.set_values("steps"),
    )
    return search.result(found.tokens.numpy(), mean_gap_from_one_hot=float(found.gap.mean()))


def _ranked_images(search: _Search, model: PreTrainedModel, advance: Advance) -> SearchResult:
    """The complete search of a vision transformer: of all images."""
    options, shape = search.options, image_shape(search.checkpoint)
    images = images_in(options.images) if options.images else noise_images()
    top, _ = top_images(
        model,
        images,
        shape,
        k=options.tokens,
        site=options.site,
        isolated=options.isolated,
        bottom=options.bottom,
        advance=advance,
    )
    found = search.searched(top.tokens)
    small = np.stack([thumbnail(images.read(index, shape)) for index in found.ravel().tolist()])
    pictures = FoundPictures(
        list(images.names), small.reshape(*found.shape, *small.shape[1:]), None
    )
    return SearchResult(
        search.blocks, search.features, found, found[:, :, :1], {}, pictures=pictures
    )


def _pixels(search: _Search, model: PreTrainedModel, advance: Advance) -> SearchResult:
    options = search.options
    found = pixel_search(
        model,
        search.features,
        image_shape(search.checkpoint),
        Ascent(**options.set_values("steps")),
        site=options.site,
        isolated=options.isolated,
        advance=advance,
    )
    pixels, size = bytes_of(found.pixels), (len(search.blocks), -1)
    activations = found.activations.reshape(size).numpy()
    pictures = FoundPictures([], pixels.reshape(*size, 1, *pixels.shape[1:]), activations)
    none = np.zeros((*activations.shape, 0), dtype=np.int32)
    return SearchResult(search.blocks, search.features, none, none, {}, pictures=pictures)


def _inversion(search: _Search, model: PreTrainedModel, advance: Advance) -> SearchResult:
    options = search.options
    encoded = load_tokenizer(search.checkpoint).encode(options.text or "", add_special_tokens=False)
    true = torch.tensor(encoded, dtype=torch.long)
    check_length(model, len(true))
    decoder = decoder_of(embedding_table(model), excluded=None)
    recovered = []
    for block in search.blocks:
        where = {"site": options.site, "isolated": options.isolated}
        outputs = outputs_of(model, true[None].to(embedding_of(model).device), block, **where)
        found = invert(
            model,
            outputs,
            block,
            loss=options.distance,
            decoder=decoder,
            **where,
            **options.set_values("steps", "optimizer"),
        )
        recovered.append(found.tokens.numpy())
        advance(1)
    tokens = np.stack(recovered)
    result = SearchResult(search.blocks, [], tokens, tokens.transpose(0, 2, 1), {})
    return replace(result, record={"excluded_tokens": len(decoder.left_out)}, target=true.numpy())


def _examples(
    search: _Search, model: PreTrainedModel, texts: Sequence[Text], advance: Advance
) -> list[list[Example]]:
    """The windows of texts with the highest activation of each feature."""
    options, tokenizer = search.options, load_tokenizer(search.checkpoint)
    context = min(CONTEXT, quantity(search.checkpoint.config, "positions") or CONTEXT) - 1
    stretches = []
    for text in texts:
        encoded = encode_text(tokenizer, text)
        for window in windows(encoded, context):
            end = window.start + window.width + 1
            ids = torch.from_numpy(encoded.ids[window.start : end])
            stretches.append(Stretch(ids, window.kept, text.name))
    return text_examples(
        model,
        search.features,
        stretches,
        site=options.site,
        isolated=options.isolated,
        advance=advance,
    )


METHODS: dict[str, Callable[[_Search, PreTrainedModel, Advance], SearchResult]] = {
    "complete": _complete,
    "greedy": _greedy,
    "ascent": _ascent,
    "gradient": _gradient,
    "softmax-prior": _softmax_prior,
    "pixels": _pixels,
    "inversion": _inversion,
}
"""The function of every entry of `artefacts.searches.SEARCHES`."""
