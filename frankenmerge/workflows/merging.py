"""Merge the recipes of one file: donors opened once, stages made in order, the result last."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from frankenmerge.artefacts.evaluation import Evaluation
from frankenmerge.artefacts.provenance import PROVENANCE, load_provenance
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.distributed import Rank
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.errors import FrankenmergeError, fail, raise_all
from frankenmerge.merging.adapter import write_adapter
from frankenmerge.merging.output import output_faults, room_faults
from frankenmerge.merging.write_plan import MergeOptions, planned
from frankenmerge.merging.writer import Merged, merge
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.opening import open_donor
from frankenmerge.splicing.raw import open_all, recipe_faults, resolve_raw
from frankenmerge.splicing.replication import Unrepeated
from frankenmerge.splicing.resolve import Splice
from frankenmerge.splicing.stages import Stages, execute, resolve_stages, with_donors
from frankenmerge.storage.scratch import scratch_folder


@contextmanager
def resolved(
    recipes: Sequence[Recipe],
    *,
    download: bool = False,
    allow_pickle: bool = False,
    opened: Mapping[str, Checkpoint] | None = None,
    place: str = "recipe",
    raw: bool = False,
) -> Iterator[Stages]:
    """Resolve the recipes of one file from configs and headers alone.

    Args:
        recipes: the stages of one file.
        download: whether headers may be fetched.
        allow_pickle: whether donors that have only pickles are converted.
        opened: donors that are open already, by name.
        place: where faults are.
        raw: whether the donors are tensors without a model.
    """
    if raw:
        yield Stages((), _resolved_raw(recipes, download, opened, place))
        return
    with scratch_folder() as scratch:
        yield resolve_stages(
            recipes,
            scratch,
            download=download,
            allow_pickle=allow_pickle,
            weights=False,
            opened=opened,
            place=place,
        )


def _resolved_raw(
    recipes: Sequence[Recipe], download: bool, opened: Mapping[str, Checkpoint] | None, place: str
) -> Splice:
    if len(recipes) > 1:
        raise fail(place, "one recipe", f"{len(recipes)} stages", "merge them one by one")
    raise_all(recipe_faults(recipes[0], place))
    return resolve_raw(recipes[0], open_all(recipes[0], download=download, opened=opened), place)


def check_merge(stages: Stages, output: Path, options: MergeOptions, rank: Rank) -> None:
    """Raise FrankenmergeError for what can be known before anything is written.

    Args:
        stages: what is to be merged.
        output: where the result is to go.
        options: how.
        rank: of this process.
    """
    if len(stages.all) == 1:
        planned(stages.result, output, options, rank, dry=True)
    elif rank.first:
        total = sum(splice.bytes for splice in stages.all)
        raise_all([*output_faults(output, stages.opened), *room_faults(output, total)])


def merge_stages(
    stages: Stages,
    output: Path,
    options: MergeOptions = MergeOptions(),  # noqa: B008 - it is immutable
    *,
    rank: Rank = Rank(),  # noqa: B008 - it is immutable
    download: bool = False,
    allow_pickle: bool = False,
    progress: Progress = silent,
    unchanged: Callable[[str], None] = lambda _: None,
    measured: Iterable[Evaluation] = (),
) -> Merged:
    """Merge stages in order: the result into `output`, the others into `OUTPUT.stages/NAME`.

    A stage that is there already and was made by the same recipe from the same donors is kept; any
    other is made again.

    Args:
        stages: resolved recipes of one file.
        output: where the result goes.
        options: how checkpoints are written.
        rank: of this process; only a merge without stages is shared among processes.
        download: whether weights may be fetched.
        allow_pickle: whether donors that have only pickles are converted.
        progress: of each checkpoint.
        unchanged: called with the names of the stages that were kept.
        measured: evaluations; those of the result go into its card.

    Raises:
        FrankenmergeError: before anything is written, for an output that exists or has no room.
    """
    if len(stages.all) > 1:
        check_merge(stages, output, options, rank)
    stages = with_weights(stages, download, allow_pickle)
    folder = output.with_name(f"{output.name}.stages")

    def make(splice: Splice, _closing: ExitStack) -> Checkpoint:
        place = folder / str(splice.recipe.name)
        if _is_made(splice, place):
            unchanged(str(splice.recipe.name))
        else:
            _remove(place)
            merge(splice, place, options, progress=progress)
        return open_checkpoint(str(place))

    with ExitStack() as closing:
        splice = execute(stages, make, closing, device=options.device, progress=progress)
        splice = splice.measured(measured)
        return merge(splice, output, options, rank=rank, progress=progress)


def write_stages_as_adapter(stages: Stages, output: Path, *, dry: bool = False) -> Unrepeated:
    """Write the recipe of a self-merge as an adapter; see `merging.adapter.write_adapter`.

    Raises:
        FrankenmergeError: for several stages, and as `write_adapter` does.
    """
    if len(stages.all) > 1:
        remedy = "merge the other stages first, and name their results"
        raise fail("adapter", "a recipe of one stage", f"{len(stages.all)} stages", remedy)
    return write_adapter(stages.result, output, dry=dry)


def with_weights(stages: Stages, download: bool, allow_pickle: bool) -> Stages:
    """The same stages of donors whose weights are there: fetched, converted, LoRAs folded in."""
    opened = {
        name: open_donor(name, download=download, allow_pickle=allow_pickle)
        for name, donor in stages.opened.items()
        if not donor.whole
    }
    return with_donors(stages, opened) if opened else stages


def _is_made(splice: Splice, folder: Path) -> bool:
    """Whether `folder` holds what a splice makes of its donors, by the provenance in it."""
    try:
        record = load_provenance(folder)
        open_checkpoint(str(folder))
    except FrankenmergeError:
        return False
    if record is None or record.healing or record.recipe_sha256 != splice.recipe.key:
        return False
    fingerprints = {name: donor.fingerprint for name, donor in splice.donors.items()}
    recorded = {name: donor.fingerprint for name, donor in record.donors.items()}
    return fingerprints == recorded and (record.texts or {}) == splice.texts


def _remove(folder: Path) -> None:
    """Remove an outdated stage, under another name, so that a kill leaves nothing in the way."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if (folder / PROVENANCE).is_file():
        folder.rename(old)
        shutil.rmtree(old)
