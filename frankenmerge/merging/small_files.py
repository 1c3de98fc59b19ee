"""The files of a merged checkpoint besides its weights."""

import json
from collections.abc import Mapping
from typing import Any

from frankenmerge.artefacts import provenance as artefact
from frankenmerge.artefacts.provenance import PROVENANCE
from frankenmerge.donors.checkpoint import INDEX_NAME
from frankenmerge.merging.card import DIAGRAM, card_diagram, model_card, raw_card
from frankenmerge.merging.provenance import provenance_of
from frankenmerge.merging.write_plan import WritePlan
from frankenmerge.splicing.rotation import Fit


def small_files(
    plan: WritePlan, fits: Mapping[int, Fit], checksums: Mapping[str, str]
) -> dict[str, bytes]:
    """Config, index, tokenizer, recipe, card with its diagram, provenance: contents by name.

    Args:
        plan: of the merge.
        fits: rotations of slices that have a gauge.
        checksums: SHA-256 of whole shards, where they were asked for.
    """
    splice = plan.splice
    files = {} if splice.raw else {"config.json": _json(splice.config)}
    if len(plan.shards) > 1:
        weight_map = {each.name: shard.name for shard in plan.shards for each in shard.operations}
        files[INDEX_NAME] = _json(
            {"metadata": {"total_size": plan.bytes}, "weight_map": weight_map}
        )
    files |= splice.tokenizer
    files |= splice.processor
    if splice.generation_config is not None:
        files["generation_config.json"] = splice.generation_config
    files["recipe.yaml"] = splice.recipe.dump().encode()
    if not splice.raw and not splice.recipe.mixture:
        files[DIAGRAM] = card_diagram(splice).encode()
    files[PROVENANCE] = artefact.dump(provenance_of(plan, fits, checksums, files))
    files["README.md"] = (raw_card if splice.raw else model_card)(splice).encode()
    return files


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
