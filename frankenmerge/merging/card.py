"""The README.md that a merged checkpoint carries."""

from collections.abc import Mapping
from typing import Any

import yaml

from frankenmerge.architectures import FAMILIES
from frankenmerge.checkpoint import Checkpoint
from frankenmerge.recipe import Recipe


def model_card(recipe: Recipe, donors: Mapping[str, Checkpoint], config: Mapping[str, Any]) -> str:
    """Return the card: front matter for the hub, the slices as a table, the recipe."""
    front = {"library_name": "transformers", "base_model": list(donors), "tags": ["merge", "frankenmerge"]}
    rows, position = [], 0
    for source in recipe.sources:
        count = source.layer_range[1] - source.layer_range[0]
        rows.append(f"| {position}-{position + count - 1} | {source.model} | {source.layer_range[0]}-{source.layer_range[1] - 1} |")
        position += count
    told = "some turned to another basis" if any(part.gauge for part in recipe.slices) else "their weights unchanged"
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# A frankenmodel of {config[FAMILIES[config["model_type"]].keys.blocks]} blocks

Made by stacking blocks of other models, {told}. It has not been trained since; measure it before you use it.

| blocks here | donor | its blocks |
|---|---|---|
{chr(10).join(rows)}

Embedding: {recipe.sources[0].model}. Final norm and head: {recipe.sources[-1].model}. Tokenizer: {recipe.tokenizer}.

```yaml
{recipe.dump().strip()}
```

`frankenmerge.json` names the origin of every tensor.
"""
