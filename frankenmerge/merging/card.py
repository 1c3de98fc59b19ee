"""The README.md that a merged checkpoint carries."""

from collections.abc import Mapping
from typing import Any

import yaml

from frankenmerge.architectures import quantity
from frankenmerge.checkpoint import Checkpoint
from frankenmerge.recipe import Recipe
from frankenmerge.splice import spelled_out


def model_card(recipe: Recipe, donors: Mapping[str, Checkpoint], config: Mapping[str, Any]) -> str:
    """Return the card: front matter for the hub, the slices as a table, the recipe."""
    front = {"library_name": "transformers", "base_model": list(donors), "tags": ["merge", "frankenmerge"]}
    spelled = spelled_out(recipe, donors)
    rows, position = [], 0
    for part in spelled.parts:
        ranges = [f"{source.layer_range[0]}-{source.layer_range[1] - 1}" for source in part.sources]
        count = part.sources[0].layer_range[1] - part.sources[0].layer_range[0]
        names = " + ".join(source.model for source in part.sources)
        rows.append(f"| {position}-{position + count - 1} | {names} | {' + '.join(ranges)} |")
        position += count
    touched = (
        recipe.dtype or recipe.out_dtype or any(level.parameters for level in (recipe, recipe.stack, *spelled.parts, *spelled.sources))
    )
    plain = recipe.merge_method == "passthrough" and not touched
    weights = "some turned to another basis" if spelled.has_gauges else "their weights unchanged"
    made = f"by stacking blocks of other models, {weights}" if plain else "from blocks of other models"
    ends = {"Embedding": spelled.embedding_donors, "Final norm": spelled.final_donors, "Head": spelled.head_donors}
    ends["Tokenizer"] = ["union of all"] if recipe.vocabulary == "union" else [recipe.tokenizer_donor]
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# A frankenmodel of {quantity(config, "blocks")} blocks

Made {made}, by the method {recipe.merge_method}. It has not been trained since; measure it before you use it.

| blocks here | donor | its blocks |
|---|---|---|
{chr(10).join(rows)}

{" ".join(f"{role}: {' + '.join(names)}." for role, names in ends.items())}

```yaml
{recipe.dump().strip()}
```

`frankenmerge.json` names the origin of every tensor.
"""
