"""Align two donors, or their atlases: everything that `align` may be asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from frankenmerge.analysis.align import (
    align,
    check_comparable,
    missing_inputs,
    searched_neurons,
)
from frankenmerge.analysis.inputs import even_neurons
from frankenmerge.analysis.modules import module_scores
from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.atlas import Atlas
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import Fault, fail, raise_all
from frankenmerge.evaluation.block_swaps import exchange
from frankenmerge.models.loading import Placement, load_model
from frankenmerge.models.sampling import states_on_sampled
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.opening import open_donor
from frankenmerge.workflows.atlases import add_inputs, atlas_of

Donor = str | Checkpoint | Atlas
"""A donor or an atlas file by name, a donor that is open, an atlas."""


@dataclass(frozen=True)
class AlignOptions:
    """What is compared, and how donors are run."""

    method: str = "complete"
    """`complete`, or a search for inputs of several tokens: `greedy`, `ascent`, `gradient`; for
    vision transformers `pixels`.
    """
    neurons: tuple[int, ...] | None = None
    """Neurons that are searched (not complete); 16, evenly spaced, by default."""
    tokens: int | None = None
    """Tokens in an input (not complete); 4 by default."""
    bos: bool = False
    """Compare tokens after BOS, not alone (complete)."""
    sampled: bool = False
    """Base predictions on tokens that the donors generate, not on random ones."""
    exchange: bool = False
    """Measure what exchanging blocks costs, on random tokens."""
    modules: bool = False
    """Score the exchange of attention, MLP and single linear maps, on random tokens."""
    images: Path | None = None
    """A folder of images that vision transformers are shown; images of noise by default."""
    device: str = "cpu"
    dtype: str = "float32"
    download: bool = False
    allow_pickle: bool = False


def align_donors(
    a: Donor,
    b: Donor,
    options: AlignOptions = AlignOptions(),  # noqa: B008 - it is immutable
    *,
    progress: Progress = silent,
) -> Alignment:
    """Score how two donors agree, for every pair of blocks.

    Args:
        a: one donor; from a name, its atlas comes from the cache or is computed.
        b: another one, or the same.
        options: what to compare.
        progress: of searches and measurements.

    Raises:
        FrankenmergeError: for donors that cannot be compared, or options that need the donors
            where atlases are given.
    """
    pair = (a, b)
    runs = options.sampled or options.exchange or options.modules
    if runs:
        _check_runnable(pair)
    atlases = [_atlas(donor, options, progress) for donor in pair]
    if runs and any(atlas.of_images for atlas in atlases):
        expected, remedy = "language models, which predict tokens", "leave the option out"
        raise fail("--sampled, --exchange, --modules", expected, "vision transformers", remedy)
    if options.method != "complete":
        atlases = _with_same_inputs(pair, atlases, options, progress)
    models = _loaded(pair, options) if runs else {}
    alignment = align(
        *atlases,
        context="bos" if options.bos else "plain",
        method=options.method,
        states=states_on_sampled(models) if options.sampled else None,
    )
    if options.exchange:
        first, second = zip(alignment.donors, alignment.blocks, strict=True)
        with progress("exchanging blocks", None, "changes") as advance:
            costs = exchange(first, second, models, advance=advance)
        alignment = replace(alignment, exchange=costs)
    if options.modules:
        first, second = (models[name] for name in alignment.donors)
        with progress("exchanging modules", None, "changes") as advance:
            alignment = replace(alignment, modules=module_scores(first, second, advance=advance))
    return alignment


def _is_atlas(donor: Donor) -> bool:
    return isinstance(donor, Atlas) or (isinstance(donor, str) and Path(donor).is_file())


def _check_runnable(pair: tuple[Donor, Donor]) -> None:
    raise_all(
        Fault(
            "--sampled, --exchange, --modules",
            "donors, which are run",
            f"an atlas: {name}",
            "give donors",
        )
        for name in (_name(donor) for donor in pair if _is_atlas(donor))
    )


def _name(donor: Donor) -> str:
    if isinstance(donor, Atlas):
        return donor.donor
    return donor.name if isinstance(donor, Checkpoint) else donor


def _atlas(donor: Donor, options: AlignOptions, progress: Progress) -> Atlas:
    if isinstance(donor, Atlas):
        return donor
    return atlas_of(
        donor,
        device=options.device,
        dtype=options.dtype,
        download=options.download,
        allow_pickle=options.allow_pickle,
        images=options.images,
        progress=progress,
    )


def _loaded(pair: tuple[Donor, Donor], options: AlignOptions) -> Mapping[str, PreTrainedModel]:
    """The donors in memory, by name."""
    opened: dict[str, Checkpoint] = {}
    for donor in pair:
        assert not isinstance(donor, Atlas)
        if isinstance(donor, str):
            donor = opened.get(donor) or open_donor(
                donor, download=options.download, allow_pickle=options.allow_pickle
            )
        opened[donor.name] = donor
    placement = Placement(options.dtype, options.device)
    return {name: load_model(donor, placement) for name, donor in opened.items()}


def _with_same_inputs(
    pair: tuple[Donor, Donor], atlases: list[Atlas], options: AlignOptions, progress: Progress
) -> list[Atlas]:
    """Atlases with inputs for the same neurons, of as many tokens as a given atlas has, if any."""
    check_comparable(atlases[0], atlases[1])  # before a search that may take hours
    given = [atlas for donor, atlas in zip(pair, atlases, strict=True) if _is_atlas(donor)]
    raise_all(fault for atlas in given for fault in missing_inputs(atlas, options.method))
    neurons, tokens = options.neurons, options.tokens
    if given:
        searched = searched_neurons(given[0], options.method)
        inputs = given[0].inputs.get(options.method)
        length = inputs.tokens.shape[2] if inputs else None
        if neurons or tokens:
            found = f"{len(searched)} neurons" + (f", {length} tokens" if length else "")
            expected = "the ones that the atlas was made with"
            remedy = "leave them out"
            raise fail(
                "--neurons, --tokens", expected, f"others than the atlas has: {found}", remedy
            )
        neurons, tokens = tuple(searched.tolist()), length
    neurons = neurons or tuple(even_neurons(min(atlas.width for atlas in atlases)))
    made = []
    for donor, atlas in zip(pair, atlases, strict=True):
        if _is_atlas(donor) or isinstance(donor, Atlas):
            made.append(atlas)
            continue
        made.append(
            add_inputs(
                donor,
                atlas,
                options.method,
                neurons,
                tokens,
                device=options.device,
                dtype=options.dtype,
                download=options.download,
                allow_pickle=options.allow_pickle,
                progress=progress,
            )
        )
    return made
