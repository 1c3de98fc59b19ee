"""The stages and workflows as functions: `import frankenmerge as fm`.

Everything that the command line does can be called here. Donors may be given by name, or open, as
`open_donor` returns them: those are not opened again. Each module is imported when it is first
used.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from frankenmerge.artefacts.alignment import Alignment, load_alignment, save_alignment
from frankenmerge.artefacts.atlas import Atlas, load_atlas, save_atlas
from frankenmerge.artefacts.recipe import Recipe, transplant_recipe
from frankenmerge.artefacts.recipe_file import load_recipe, load_recipes
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.opening import open_donor

if TYPE_CHECKING:
    from frankenmerge.evaluation.documents import Text
    from frankenmerge.evaluation.routing import Routing
    from frankenmerge.merging.lora_plan import LoraOptions
    from frankenmerge.merging.verify import Verified
    from frankenmerge.merging.write_plan import MergeOptions
    from frankenmerge.merging.writer import Merged
    from frankenmerge.models.loading import Placement
    from frankenmerge.planning.search import Constraints
    from frankenmerge.splicing.compatibility import Compatibility
    from frankenmerge.splicing.replication import Unrepeated
    from frankenmerge.workflows.aligning import AlignOptions
    from frankenmerge.workflows.evaluating import Evaluated, EvaluateOptions
    from frankenmerge.workflows.extracting import Extracted
    from frankenmerge.workflows.gaining import GainOptions, Gains
    from frankenmerge.workflows.healing import Healed
    from frankenmerge.workflows.patients import HealOptions
    from frankenmerge.workflows.planning import Planned
    from frankenmerge.workflows.tuning import Tuned, TuneOptions

__all__ = [
    "align",
    "analyze",
    "check",
    "compare_donors",
    "evaluate",
    "extract_lora",
    "heal",
    "load_alignment",
    "load_atlas",
    "load_recipe",
    "load_recipes",
    "merge",
    "open_donor",
    "plan",
    "plan_gains",
    "report",
    "routing",
    "save_alignment",
    "save_atlas",
    "transplant_recipe",
    "tune",
    "verify",
    "write_adapter",
    "write_plans",
]

Donor = str | Path | Checkpoint
"""A folder, a hub id that is in the local cache, or a checkpoint that is open."""
Texts = Mapping[str, str | Sequence[str]] | Iterable[str | Path]
"""Texts by name, each a string or a list of documents; or files, folders, `hub:OWNER/NAME/PATH`."""
On = Literal["sampled"] | Texts
"""What recipes are measured on: tokens that the donors generate, texts by name, or files."""


def compare_donors(*donors: Donor) -> "Compatibility":
    """Whether donors can be spliced, and why not, from configs and headers alone.

    Raises:
        FrankenmergeError: for a donor that is not found or is broken.
    """
    from frankenmerge.splicing.inspection import compared

    return compared([_opened(donor) for donor in donors])


def analyze(
    donor: Donor,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    untrained: int | None = None,
    images: Path | None = None,
    progress: Progress = silent,
) -> Atlas:
    """Find the top-activating tokens of every neuron of every block; cached.

    Args:
        donor: what to analyze.
        dtype: the type to compute in: `float32`, `bfloat16` or `float16`.
        device: a torch device.
        untrained: analyze random weights of this seed in the donor's shape, as a control.
        images: a folder of images that a vision transformer is shown; images of noise by default.
        progress: reports inputs times blocks.

    Raises:
        FrankenmergeError: for a donor that is not found, is broken, or has no tokenizer.
    """
    from frankenmerge.workflows.atlases import atlas_of

    return atlas_of(
        _opened(donor),
        dtype=dtype,
        device=device,
        untrained=untrained,
        images=images,
        progress=progress,
    )


def align(
    a: Donor | Atlas,
    b: Donor | Atlas,
    options: "AlignOptions | None" = None,
    *,
    progress: Progress = silent,
) -> Alignment:
    """Score how A after `i` blocks and B after `j` agree, for every `i` and `j`, with the nulls.

    Args:
        a: a donor, or its atlas.
        b: another one's.
        options: `frankenmerge.workflows.aligning.AlignOptions`; the complete search by default.
        progress: of searches and measurements.

    Raises:
        FrankenmergeError: for donors that cannot be compared.
    """
    from frankenmerge.workflows.aligning import AlignOptions, align_donors

    first, second = (str(donor) if isinstance(donor, Path) else donor for donor in (a, b))
    return align_donors(first, second, options or AlignOptions(), progress=progress)


def plan(
    alignments: Alignment | Iterable[Alignment],
    constraints: "Constraints | int",
    *,
    top: int = 1,
    differ: int = 0,
    calibrate: On | None = None,
    verify: On | None = None,
    damp: On | None = None,
    placement: "Placement | None" = None,
    donors: Sequence[Checkpoint] = (),
    progress: Progress = silent,
) -> "Planned":
    """The recipes that are predicted, or measured, to do the least damage, the best first.

    Args:
        alignments: of pairs of donors; all donors are used.
        constraints: `frankenmerge.planning.search.Constraints`, or the depth in blocks.
        top: how many plans to return.
        differ: in how many blocks each must differ from all that are better.
        calibrate: measure a few splices on this, and predict by them.
        verify: measure the plans on this, and rank them by it.
        damp: scale what repeated blocks write, where that loses less on this.
        placement: `frankenmerge.models.loading.Placement`: in which type models compute, and where.
        donors: checkpoints that are open already; others are opened when they are measured.
        progress: of everything that is measured.

    Returns:
        `plans`, each with its `recipe`, and the `evidence` that `write_plans` writes with them.

    Raises:
        FrankenmergeError: when no recipe satisfies the constraints.
    """
    from frankenmerge.planning.search import Constraints
    from frankenmerge.workflows.planning import PlanOptions, plan_recipes

    given = [alignments] if isinstance(alignments, Alignment) else list(alignments)
    options = PlanOptions(
        Constraints(constraints) if isinstance(constraints, int) else constraints,
        top=top,
        differ=differ,
        calibrate=_on(calibrate),
        verify=_on(verify),
        damp=_on(damp),
        placement=placement,
    )
    opened = {donor.name: donor for donor in donors}
    return plan_recipes(given, options, opened=opened, progress=progress)


def write_plans(planned: "Planned", output: str | Path) -> list[Path]:
    """Write the best recipe to `output`, the others and the evidence next to it; their paths."""
    from frankenmerge.workflows.planning import write_plans as written

    return written(planned, Path(output))


def plan_gains(
    alignments: Alignment | Iterable[Alignment],
    options: "GainOptions",
    *,
    donors: Sequence[Checkpoint] = (),
    progress: Progress = silent,
) -> "Gains":
    """Recipes that are better than the best donor, searched for and confirmed on other tokens.

    Args:
        alignments: of pairs of donors, or of one donor with itself.
        options: `frankenmerge.workflows.gaining.GainOptions`.
        donors: checkpoints that are open already; others are opened.
        progress: of every stage.

    Returns:
        `plans`, each with its `gain`, and `controls`; `confirmed` says whether a gain is shown.

    Raises:
        FrankenmergeError: for donors that do not read the same tokens, texts that are too short,
            and a single donor on its own tokens.
    """
    from frankenmerge.workflows.gaining import plan_gains as planned

    given = [alignments] if isinstance(alignments, Alignment) else list(alignments)
    opened = {donor.name: donor for donor in donors}
    return planned(given, options, opened=opened, progress=progress)


def tune(
    recipe: Recipe | str | Path,
    options: "TuneOptions",
    *,
    donors: Sequence[Checkpoint] = (),
    progress: Progress = silent,
) -> "Tuned":
    """The recipe with the numbers that gain most; no model is written.

    Args:
        recipe: a recipe, or the file of one.
        options: `frankenmerge.workflows.tuning.TuneOptions`.
        donors: checkpoints that are open already; others are opened.
        progress: of the search.

    Raises:
        FrankenmergeError: for a recipe of several stages, one without numbers, and donors that do
            not read the same tokens.
    """
    from frankenmerge.workflows.tuning import one_recipe
    from frankenmerge.workflows.tuning import tune as tuned

    opened = {donor.name: donor for donor in donors}
    chosen = one_recipe(_recipes(recipe), str(recipe))
    return tuned(chosen, options, opened=opened, progress=progress)


def check(recipe: Recipe | str | Path, *, raw: bool = False) -> None:
    """Validate a recipe, or a file of several stages, from configs and headers alone.

    Args:
        recipe: a recipe, or its file.
        raw: whether its models are safetensors files, or folders of them, without a config.

    Raises:
        FrankenmergeError: with everything that is wrong with it.
    """
    from frankenmerge.workflows.merging import resolved

    with resolved(_recipes(recipe), raw=raw):
        pass


def merge(
    recipe: Recipe | str | Path,
    output: str | Path,
    options: "MergeOptions | None" = None,
    *,
    donors: Sequence[Checkpoint] = (),
    raw: bool = False,
    progress: Progress = silent,
) -> "Merged":
    """Write the checkpoint of a recipe to the new folder `output`, complete or not at all.

    Args:
        recipe: a recipe, or its file, which may have several stages.
        output: a folder that does not exist yet.
        options: `frankenmerge.merging.write_plan.MergeOptions`.
        donors: checkpoints that are open already; others are opened.
        raw: whether the recipe's models are safetensors files, or folders of them, without a
            config, whose tensors are matched by name.
        progress: in bytes written.

    Raises:
        FrankenmergeError: for a recipe that cannot become a model, or an output that exists or has
            no room.
    """
    from frankenmerge.artefacts.evaluation import beside
    from frankenmerge.merging.write_plan import MergeOptions
    from frankenmerge.workflows.merging import merge_stages, resolved

    opened = {donor.name: donor for donor in donors}
    measured = [] if isinstance(recipe, Recipe) else beside(Path(recipe))
    with resolved(_recipes(recipe), opened=opened, raw=raw) as stages:
        chosen = options or MergeOptions()
        return merge_stages(stages, Path(output), chosen, progress=progress, measured=measured)


def write_adapter(recipe: Recipe | str | Path, output: str | Path) -> "Unrepeated":
    """Write a self-merge as a LoRA of zeros over its unrepeated donor, to the new folder `output`.

    Args:
        recipe: of unchanged blocks of one donor, or its file.
        output: a folder that does not exist yet.

    Returns:
        The donor, and the ranges of its blocks, as peft's `layer_replication` has them.

    Raises:
        FrankenmergeError: for a recipe that no adapter can express, and an output that exists.
    """
    from frankenmerge.workflows.merging import resolved, write_stages_as_adapter

    with resolved(_recipes(recipe)) as stages:
        return write_stages_as_adapter(stages, Path(output))


def routing(
    mixture: Recipe | str | Path, *, device: str = "cpu", progress: Progress = silent
) -> "Routing":
    """Where a mixture of experts routes prompts that its gates were not made from.

    Args:
        mixture: a recipe with experts, or its file.
        device: a torch device.
        progress: in blocks.

    Raises:
        FrankenmergeError: for a recipe without experts, or an expert with too few prompts.
    """
    from frankenmerge.workflows.merging import resolved
    from frankenmerge.workflows.mixing import routing_of

    with resolved(_recipes(mixture)) as stages:
        return routing_of(stages, device=device, progress=progress)


def heal(
    model: Recipe | str | Path,
    output: str | Path,
    options: "HealOptions | None" = None,
    *,
    progress: Progress = silent,
) -> "Healed | None":
    """Train a splice for some steps towards its donors, and write it to the new folder `output`.

    Args:
        model: a recipe, its file, or a checkpoint that was merged.
        output: a folder that does not exist yet; what an interrupted run has done is in
            `OUTPUT.heal`, and the same call continues from there.
        options: `frankenmerge.workflows.patients.HealOptions`.
        progress: of sampling, steps and writing.

    Returns:
        What was done; None in all processes of `accelerate launch` but the first.

    Raises:
        FrankenmergeError: for donors that are not known or do not read the same tokens, a scope
            without tensors, too little memory, and an output that cannot be written.
    """
    from frankenmerge.workflows.healing import heal as healed
    from frankenmerge.workflows.patients import HealOptions

    return healed(model, Path(output), options or HealOptions(), progress=progress)


def extract_lora(
    model: Donor,
    base: Donor,
    output: str | Path,
    options: "LoraOptions | None" = None,
    *,
    progress: Progress = silent,
) -> "Extracted":
    """Write what makes `base` into `model` as a LoRA for peft to the new folder `output`.

    Args:
        model: a checkpoint.
        base: the one that it was trained from.
        output: a folder that does not exist yet.
        options: `frankenmerge.merging.lora_plan.LoraOptions`; rank 32 by default.
        progress: in parameters compared and decomposed.

    Returns:
        What was written, with rank and error of every matrix.

    Raises:
        FrankenmergeError: for checkpoints of other architectures or shapes, equal ones, options
            that cannot be kept, and an output that exists or has no room.
    """
    from frankenmerge.merging.lora_plan import LoraOptions
    from frankenmerge.workflows.extracting import extract_lora as extracted
    from frankenmerge.workflows.extracting import planned_lora

    chosen = options or LoraOptions()
    opened = _opened(model), _opened(base)
    plan = planned_lora(*opened, Path(output), chosen, progress=progress)
    return extracted(plan, Path(output), chosen, progress=progress)


def verify(folder: str | Path, *, progress: Progress = silent) -> "Verified":
    """Compare a merged checkpoint with its `frankenmerge.json`, and with its donors.

    Raises:
        FrankenmergeError: with all that differs.
    """
    from frankenmerge.merging.verify import verify as verified

    return verified(Path(folder), progress=progress)


def evaluate(
    *models: Donor | Recipe,
    texts: Texts = (),
    options: "EvaluateOptions | None" = None,
    donors: Sequence[Checkpoint] = (),
    progress: Progress = silent,
) -> "Evaluated":
    """Measure checkpoints and recipes on texts and tasks; recipes are run in memory.

    Args:
        models: folders, hub ids in the local cache, checkpoints, recipes or their files.
        texts: texts by name, each a string or a list of documents, or files and folders; none are
            needed where `options` name tasks.
        options: `frankenmerge.workflows.evaluating.EvaluateOptions`.
        donors: checkpoints that are open already; others are opened.
        progress: in every model.

    Returns:
        `results`: one for each of `models`, then one for every donor of the recipes that was not
        named; of equal models one. `record` is what `evaluate -o` writes.

    Raises:
        FrankenmergeError: for models that cannot be opened, and recipes that cannot be resolved.
    """
    from frankenmerge.workflows.evaluating import EvaluateOptions
    from frankenmerge.workflows.evaluating import evaluate as evaluated

    opened, chosen = {donor.name: donor for donor in donors}, options or EvaluateOptions()
    read = _texts(texts, chosen.download)
    return evaluated(models, read, chosen, opened=opened, progress=progress)


def report(run: str | Path, output: str | Path) -> Path:
    """Write one HTML page of everything that is in a run's folder.

    Raises:
        FrankenmergeError: for a folder that holds nothing to show.
    """
    from frankenmerge.reporting.page import page
    from frankenmerge.reporting.run import read_run
    from frankenmerge.storage.atomic import write_file

    write_file(Path(output), page(read_run(Path(run))).encode())
    return Path(output)


def _opened(donor: Donor) -> Checkpoint:
    return donor if isinstance(donor, Checkpoint) else open_donor(str(donor))


def _recipes(given: Recipe | str | Path) -> list[Recipe]:
    return [given] if isinstance(given, Recipe) else load_recipes(Path(given))


def _texts(texts: Texts, download: bool = False) -> "list[Text]":
    from frankenmerge.evaluation.documents import Text, read_text, text_of

    if isinstance(texts, Mapping):
        return [
            Text(str(name), content) if isinstance(content, str) else text_of(str(name), content)
            for name, content in texts.items()
        ]
    return [read_text(Path(text), download=download) for text in texts]


def _on(on: On | None) -> "Literal['sampled'] | list[Text] | None":
    if on is None:
        return None
    return "sampled" if isinstance(on, str) else _texts(on)
