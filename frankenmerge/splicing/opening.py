"""Open the donors that recipes name: folders, hub ids, and either with a LoRA folded in."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_schema import reference
from frankenmerge.donors.checkpoint import Checkpoint, open_checkpoint
from frankenmerge.errors import FrankenmergeError, raise_all
from frankenmerge.models.lora import (
    adapter_remarks,
    check_fit,
    check_unrepeated,
    find_adapter,
    folded,
)


def open_donors(
    recipe: Recipe,
    *,
    download: bool = False,
    allow_pickle: bool = False,
    weights: bool = True,
    opened: Mapping[str, Checkpoint] | None = None,
) -> dict[str, Checkpoint]:
    """Open every donor of a recipe, except those that are `opened` already.

    Raises FrankenmergeError with the faults of all.
    """
    return open_named(
        recipe.donors, download=download, allow_pickle=allow_pickle, weights=weights, opened=opened
    )


def open_named(
    names: Iterable[str],
    *,
    download: bool = False,
    allow_pickle: bool = False,
    weights: bool = True,
    opened: Mapping[str, Checkpoint] | None = None,
) -> dict[str, Checkpoint]:
    """Open donors by their names, as `open_donors` does those of a recipe."""
    options = {"download": download, "allow_pickle": allow_pickle, "weights": weights}
    donors, faults = {}, []
    for name in names:
        try:
            donors[name] = (
                opened[name] if opened and name in opened else open_donor(name, **options)
            )
        except FrankenmergeError as error:
            faults += error.faults
    raise_all(faults)
    return donors


def open_donor(
    name: str, *, download: bool = False, allow_pickle: bool = False, weights: bool = True
) -> Checkpoint:
    """Open a donor by the name that a recipe gives it, `path@revision+lora`.

    Args:
        name: the donor's; what is opened keeps it.
        download: whether it may be fetched from the hub.
        allow_pickle: whether weights that are there as pickles alone are converted.
        weights: whether they will be read. Without, headers are enough of a donor on the hub, and a
            LoRA is looked for and not folded in: what is opened is its base, whose names, shapes
            and types are the same.

    Raises:
        FrankenmergeError: for a donor or a LoRA that is not there or cannot be used.
    """
    path, revision, lora = reference(name)
    model = name if lora is None else path + (f"@{revision}" if revision else "")
    base = open_checkpoint(model, download=download, allow_pickle=allow_pickle, weights=weights)
    if lora is None:
        return base
    adapter = find_adapter(lora, download=download, weights=weights)
    check_unrepeated(adapter, model)
    check_fit(base, adapter)
    remarks = adapter_remarks(base, adapter)
    if weights:
        return replace(folded(base, adapter.path), name=name, remarks=remarks)
    return replace(base, name=name, whole=False, remarks=remarks)
