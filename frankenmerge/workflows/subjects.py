"""Models to be evaluated: checkpoints, recipes and LoRAs, opened and resolved together."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_file import load_recipes
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import FrankenmergeError, raise_all
from frankenmerge.evaluation.lineage import Lineage, splice_lineage
from frankenmerge.models.lora import find_adapter, is_adapter
from frankenmerge.splicing.opening import open_donor
from frankenmerge.splicing.replication import base_of, open_repeated
from frankenmerge.splicing.resolve import Splice
from frankenmerge.splicing.stages import Stages, execute, resolve_stages
from frankenmerge.storage.scratch import scratch_folder
from frankenmerge.workflows.stages_in_memory import make_in_memory

Model = str | Path | Checkpoint | Recipe
"""A folder, a hub id, a recipe's file, a checkpoint that is open, a recipe."""


class Subjects(NamedTuple):
    """What is to be evaluated, by unique names."""

    checkpoints: dict[str, Checkpoint]
    """Those that were named."""
    splices: dict[str, Splice]
    """The recipes that were named, resolved, their stages made in memory."""
    names: list[str]
    """All of these in the order given."""
    donors: dict[str, Checkpoint]
    """Donors of the splices."""
    stages: dict[str, Checkpoint]
    """Donors of the splices that were made in memory."""
    lineages: dict[str, Lineage]
    """What the splices are made of, through their stages."""
    files: dict[str, Path]
    """Files of recipes, by the recipes' names."""
    adapters: dict[str, Path]
    """Folders of the LoRAs that repeat their base's blocks; the splices are without the LoRA."""


def is_recipe(name: str) -> bool:
    """Whether a name on the command line is a recipe's."""
    return Path(name).suffix in (".yaml", ".yml") and not Path(name).is_dir()


@contextmanager
def opened_subjects(
    models: Sequence[Model],
    *,
    download: bool = False,
    allow_pickle: bool = False,
    weights: bool = True,
    opened: Mapping[str, Checkpoint] | None = None,
) -> Iterator[Subjects]:
    """Open every checkpoint once, and resolve every recipe once.

    Args:
        models: what is to be evaluated; the same one given twice is evaluated once.
        download: whether donors may be fetched.
        allow_pickle: whether donors that have only pickles are converted.
        weights: whether they will be read; if not, headers suffice, and no stage is made.
        opened: donors that are open already, by name.

    Raises:
        FrankenmergeError: with everything that is wrong with any model or recipe.
    """
    with ExitStack() as closing:
        scratch = closing.enter_context(scratch_folder())
        subjects = Subjects({}, {}, [], {}, {}, {}, {}, {})
        known = dict(opened or {})
        known |= {model.name: model for model in models if isinstance(model, Checkpoint)}
        opening: Any = {"download": download, "allow_pickle": allow_pickle, "weights": weights}
        faults = []
        for number, model in enumerate(models):
            try:
                if (recipes := _recipes(model)) is None:
                    name = _add_model(subjects, model, known, opening)
                else:
                    folder = scratch / str(number)
                    folder.mkdir()
                    stages = resolve_stages(
                        recipes,
                        folder,
                        opened=known,
                        place=str(model) if isinstance(model, str | Path) else "recipe",
                        **opening,
                    )
                    known |= stages.opened
                    made = execute(stages, make_in_memory, closing) if weights else stages.result
                    name = _add_recipe(subjects, model, stages, made)
                if name not in subjects.names:
                    subjects.names.append(name)
            except FrankenmergeError as error:
                faults += error.faults
        raise_all(faults)
        yield subjects


def _add_recipe(subjects: Subjects, model: Model, stages: Stages, splice: Splice) -> str:
    """Add the result of a recipe; returns its name."""
    name = _unique(model, splice, subjects.splices)
    subjects.splices[name] = splice
    subjects.donors.update(stages.opened)
    made = splice.donors.keys() - stages.opened.keys()
    subjects.stages.update({donor: splice.donors[donor] for donor in made})
    used = dict.fromkeys(donor for each in stages.all for donor in each.recipe.tensor_donors)
    donors = tuple(donor for donor in used if donor in stages.opened)
    subjects.lineages[name] = Lineage(stages.blocks, donors)
    if isinstance(model, str | Path):
        subjects.files[name] = Path(model)
    return name


def _recipes(model: Model) -> list[Recipe] | None:
    if isinstance(model, Recipe):
        return [model]
    if not isinstance(model, Checkpoint) and is_recipe(str(model)):
        return load_recipes(Path(model))
    return None


def _add_model(
    subjects: Subjects,
    model: Model,
    known: dict[str, Checkpoint],
    opening: dict[str, Any],
) -> str:
    """Open a checkpoint, or a LoRA with its base, and add it; returns its name."""
    name = model.name if isinstance(model, Checkpoint) else str(model)
    download: bool = opening["download"]
    if name not in known:
        fetching = {key: value for key, value in opening.items() if key != "weights"}
        if repeated := open_repeated(name, opened=known, **fetching):
            known |= repeated.splice.donors
            subjects.donors.update(repeated.splice.donors)
            subjects.splices[name], subjects.adapters[name] = repeated.splice, repeated.adapter.path
            subjects.lineages[name] = splice_lineage(repeated.splice)
            return name
        if is_adapter(name, download=download):
            name = f"{base_of(name, find_adapter(name, download=download))}+{name}"
        known[name] = open_donor(name, **opening)
    subjects.checkpoints[name] = known[name]
    return name


def _unique(model: Model, splice: Splice, others: Mapping[str, Splice]) -> str:
    """A recipe's file, or its summary, with its key where another recipe has the same summary."""
    if isinstance(model, str | Path):
        return str(model)
    name = str(splice.recipe)
    same = name not in others or others[name].key == splice.key
    return name if same else f"{name} #{splice.key[:8]}"
