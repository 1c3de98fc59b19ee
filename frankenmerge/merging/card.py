"""What a merged checkpoint carries for people: the README.md that the hub shows, and the picture in it."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

import frankenmerge
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import quantity
from frankenmerge.splicing import diagram
from frankenmerge.splicing.compatibility import spelled_out
from frankenmerge.storage.hub import hub_ids

PICTURE = "splice.svg"


def model_card(recipe: Recipe, donors: Mapping[str, Checkpoint], config: Mapping[str, Any]) -> str:
    """Return the card: front matter for the hub, the picture, the slices as a table, how to load it, the recipe, its origin."""
    spelled = spelled_out(recipe, donors)
    rows, position = [], 0
    for part in spelled.parts:
        ranges = [f"{source.layer_range[0]}-{source.layer_range[1] - 1}" for source in part.sources]
        names = " + ".join(source.model for source in part.sources)
        rows.append(f"| {position}-{position + part.length - 1} | {names} | {' + '.join(ranges)} |")
        position += part.length
    touched = (
        recipe.dtype
        or recipe.out_dtype
        or any(
            level.parameters for level in (recipe, recipe.stack, *spelled.parts, *spelled.sources)
        )
    )
    plain = recipe.merge_method == "passthrough" and not touched
    weights = "some rotated to another basis" if spelled.has_gauges else "their weights unchanged"
    made = (
        f"by stacking blocks of other models, {weights}" if plain else "from blocks of other models"
    )
    ends = {
        "Embedding": spelled.embedding_donors,
        "Final norm": spelled.final_donors,
        "Head": spelled.head_donors,
    }
    ends["Tokenizer"] = (
        ["union of all"] if recipe.vocabulary == "union" else [recipe.tokenizer_donor]
    )
    prints = "\n".join(f"| {name} | `{donor.fingerprint}` |" for name, donor in donors.items())
    return f"""---
{yaml.safe_dump(front_matter(donors), sort_keys=False).strip()}
---

# A frankenmodel of {quantity(config, "blocks")} blocks

Made {made}, by the method {recipe.merge_method}. It has not been trained since; measure it before you use it.

![Which block comes from where; the table below says the same]({PICTURE})

| blocks here | donor | its blocks |
|---|---|---|
{chr(10).join(rows)}

{" ".join(f"{role}: {' + '.join(names)}." for role, names in ends.items())}

## Loading it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
```

## Recipe

```yaml
{recipe.dump().strip()}
```

## Origin

Merged by frankenmerge {frankenmerge.__version__} from the recipe with SHA-256 `{hashlib.sha256(recipe.dump().encode()).hexdigest()}`.
`frankenmerge.json` names the origin of every tensor.

| donor | fingerprint |
|---|---|
{prints}
"""


def front_matter(donors: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """What the hub reads: it refuses a card that names anything but models of its own, so folders are left out."""
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if named := hub_ids(donors):
        front |= {"base_model": named, "base_model_relation": "merge"}
    licences = [_licence(donor) for donor in donors.values()]
    if licences[0] and set(licences) == {licences[0]}:
        front["license"] = licences[0]
    return front | {"tags": ["merge", "frankenmerge"]}


def _licence(donor: Checkpoint) -> str | None:
    """The licence in the donor's own card, as a single word that the hub knows; nothing is inferred."""
    try:
        head = re.match(
            r"---\n(.*?)\n---", (donor.path / "README.md").read_text(encoding="utf-8"), re.S
        )
        told = yaml.safe_load(head[1]) if head else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    licence = told.get("license") if isinstance(told, Mapping) else None
    return licence if isinstance(licence, str) and licence != "other" else None


def card_picture(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> str:
    """Return the picture of the splice, as a file of SVG."""
    depths = {name: donor.blocks for name, donor in donors.items()}
    return diagram.svg(diagram.pieces_of(spelled_out(recipe, donors), depths), depths, "splice")
