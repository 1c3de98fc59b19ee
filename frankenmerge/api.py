"""The stages as functions, for scripts and notebooks: `import frankenmerge as fm`. Each is imported when it is first used."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frankenmerge.artefacts.alignment import Alignment, load_alignment, save_alignment  # noqa: F401 - offered by the package
from frankenmerge.artefacts.atlas import Atlas, load_atlas, save_atlas  # noqa: F401
from frankenmerge.artefacts.recipe import Recipe, load_recipe, open_donor, open_donors
from frankenmerge.donors.checkpoint import Checkpoint

if TYPE_CHECKING:
    from frankenmerge.evaluation.compare import Result
    from frankenmerge.merging.writer import Merged
    from frankenmerge.planning.plan import Plan

Donor = str | Path | Checkpoint


def analyze(donor: Donor, **options: Any) -> Atlas:
    """Ask every neuron of every block which tokens excite it most.

    Args:
        donor: a folder, a hub id that is in the local cache, or what `open_donor` returned.
        options: those of `frankenmerge.analysis.analyze.analyze`: `k`, `untrained`, `dtype`,
            `device`, `advance`.

    Raises:
        FrankenmergeError: for a donor that is not there, is broken, or has no tokenizer.
    """
    from frankenmerge.analysis.analyze import analyze as analyzed

    return analyzed(donor if isinstance(donor, Checkpoint) else open_donor(str(donor)), **options)


def align(
    a: Donor | Atlas, b: Donor | Atlas, *, context: str = "plain", **options: Any
) -> Alignment:
    """Score how A after `i` blocks and B after `j` agree, for every `i` and `j`, beside the nulls.

    Args:
        a: a donor, or its atlas.
        b: another one's.
        context: which complete search to compare, `plain` or `bos`.
        options: those of `analyze`, for what is not an atlas yet.

    Raises:
        FrankenmergeError: for donors that cannot be compared.
    """
    from frankenmerge.analysis.align import align as aligned

    first, second = (
        given if isinstance(given, Atlas) else analyze(given, **options) for given in (a, b)
    )
    return aligned(first, second, context=context)


def plan(
    alignments: Alignment | Iterable[Alignment],
    depth: int,
    *,
    top: int = 1,
    differ: int = 0,
    **constraints: Any,
) -> "list[Plan]":
    """The `top` recipes of `depth` blocks that are predicted to do the least damage, the best first.

    Args:
        alignments: of pairs of donors; all donors are used.
        depth: blocks of the result.
        top: how many to return.
        differ: in how many blocks each must differ from all that are better.
        constraints: the other fields of `frankenmerge.planning.search.Constraints`.

    Raises:
        FrankenmergeError: when no recipe keeps to the constraints.
    """
    from frankenmerge.planning.plan import plan as planned
    from frankenmerge.planning.search import Constraints

    given = [alignments] if isinstance(alignments, Alignment) else list(alignments)
    return planned(given, Constraints(depth, **constraints), top=top, differ=differ)


def merge(recipe: Recipe | str | Path, output: str | Path, **options: Any) -> "Merged":
    """Write the checkpoint that a recipe of one stage describes to the new folder `output`, complete or not at all.

    Args:
        recipe: a recipe, or its file.
        output: a folder that does not exist yet.
        options: the fields of `frankenmerge.merging.plan.Options`, and `advance`.

    Raises:
        FrankenmergeError: for a recipe that cannot become a model, or an output that exists or has
            no room.
    """
    from frankenmerge.merging.writer import merge as merged

    made = _recipe(recipe)
    return merged(made, open_donors(made), Path(output), **options)


def evaluate(
    *models: Donor | Recipe, texts: Mapping[str, str] | Iterable[str | Path], **options: Any
) -> "list[Result]":
    """Measure checkpoints and recipes on texts; a recipe is run as a virtual splice, and nothing is written.

    Args:
        models: folders, hub ids in the local cache, recipes or their files.
        texts: texts by name, or files.
        options: those of `frankenmerge.evaluation.compare.Bench`: `context`, `dtype`, `device`, ...

    Returns:
        One result for each of `models`, then one for every donor of the recipes that was not named.
    """
    from frankenmerge.evaluation.compare import Bench, Text, is_recipe, read_text

    if isinstance(texts, Mapping):
        shown = [Text(str(name), content) for name, content in texts.items()]
    else:
        shown = [read_text(Path(text)) for text in texts]
    names = [model.name if isinstance(model, Checkpoint) else str(model) for model in models]
    recipes = {
        name: _recipe(model)
        for name, model in zip(names, models, strict=True)
        if isinstance(model, Recipe) or (not isinstance(model, Checkpoint) and is_recipe(name))
    }
    used = dict.fromkeys(donor for recipe in recipes.values() for donor in recipe.donors)
    checkpoints = dict.fromkeys(name for name in names if name not in recipes)
    bench = Bench(
        shown, [*checkpoints, *(donor for donor in used if donor not in checkpoints)], **options
    )
    measured = [
        bench.recipe(name, recipes[name]) if name in recipes else bench.checkpoint(name)
        for name in names
    ]
    return measured + [
        bench.checkpoint(name, role="donor") for name in used if name not in checkpoints
    ]


def _recipe(given: Recipe | str | Path) -> Recipe:
    return given if isinstance(given, Recipe) else load_recipe(Path(given))
