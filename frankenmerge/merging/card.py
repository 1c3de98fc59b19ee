"""What a merged checkpoint carries for people: README.md, which the hub shows, and a diagram."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import frankenmerge
from frankenmerge.artefacts.mixture import Mixture
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.splicing import diagram
from frankenmerge.splicing.resolve import Splice
from frankenmerge.storage.hub import hub_ids

DIAGRAM = "splice.svg"


def model_card(splice: Splice) -> str:
    """Return the card: front matter for the hub, diagram, slices, loading, recipe, origin."""
    recipe, spelled = splice.recipe, splice.spelled
    ends = {
        "Embedding": spelled.embedding_donors,
        "Final norm": spelled.final_donors,
        "Head": spelled.head_donors,
        "Tokenizer": [recipe.tokenizer_donor],
    }
    if recipe.vocabulary == "union":
        ends["Tokenizer"] = ["union of all"]
    return f"""---
{yaml.safe_dump(front_matter(splice.donors), sort_keys=False).strip()}
---

{_made(splice)}

{" ".join(f"{role}: {' + '.join(names)}." for role, names in ends.items())}

## Loading it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
```

{_measured(splice)}{_recipe_and_origin(splice)}"""


def raw_card(splice: Splice) -> str:
    """Return the card of tensors without a model."""
    front = {"base_model": named} if (named := hub_ids(splice.donors)) else {}
    front |= {"tags": ["merge", "frankenmerge"]}
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {len(splice.operations)} tensors merged by {splice.recipe.merge_method}

They are matched by their names; there is no config.

{_recipe_and_origin(splice)}"""


def _recipe_and_origin(splice: Splice) -> str:
    recipe = splice.recipe
    fingerprints = "\n".join(
        f"| {name} | `{donor.fingerprint}` |" for name, donor in splice.donors.items()
    )
    return f"""## Recipe

```yaml
{recipe.dump().strip()}
```

## Origin

Merged by frankenmerge {frankenmerge.__version__} from the recipe with SHA-256 `{recipe.key}`.
`frankenmerge.json` names the origin of every tensor.

| donor | fingerprint |
|---|---|
{fingerprints}
"""


def _made(splice: Splice) -> str:
    """What it is made of: slices of donors, or a base and experts."""
    if mixture := splice.recipe.mixture:
        return f"""# A mixture of {len(mixture.experts)} experts in {len(splice.blocks)} blocks

Made from dense models: every expert is one donor's MLPs, everything else is from
{splice.recipe.base}. {mixture.experts_per_token} experts a token; gates: {mixture.gate_mode}.
{_since(splice)}

| expert | donor | positive prompts |
|---|---|---|
{_expert_rows(mixture)}"""
    return f"""# A frankenmodel of {len(splice.blocks)} blocks

Made {_how(splice)}, by the method {splice.recipe.merge_method}. {_since(splice)}

![Which block comes from where; the table below says the same]({DIAGRAM})

| blocks here | donor | its blocks |
|---|---|---|
{_slice_rows(splice)}"""


def _measured(splice: Splice) -> str:
    """The figures of its evaluations, beside those of the other models in them."""
    tables = []
    for evaluation in splice.evaluations:
        rows = [
            f"| {'**this model**' if model.key == splice.key else model.name} "
            f"| {model.bits_per_byte:.4f} | {_between(model.intervals.get('bits_per_byte'))} |"
            for model in evaluation.models
            if model.bits_per_byte is not None
        ]
        if rows:
            names = ", ".join(Path(text.path).name for text in evaluation.texts)
            head = "| model | bits per byte | 95 % |\n|---|---|---|\n"
            tables.append(f"On {names}:\n\n{head}" + "\n".join(rows))
        named = {model.name for model in evaluation.models if model.key == splice.key}
        tests = [each for each in evaluation.task_differences if each.model in named]
        if tests:
            head = "| task | than | difference | 95 % | p (Holm) |\n|---|---|---|---|---|\n"
            tables.append(
                head
                + "\n".join(
                    f"| {each.task} {each.metric} | {each.donor} | {each.difference:+.3f} "
                    f"| {_between(each.interval)} | {each.p_holm:.2g} |"
                    for each in tests
                )
            )
    return "## Measured\n\n" + "\n\n".join(tables) + "\n\n" if tables else ""


def _between(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""


def _expert_rows(mixture: Mixture) -> str:
    """The table of experts, with the number of their prompts."""
    listed = [*map(str, range(len(mixture.experts)))] + ["shared"] * len(
        mixture.shared_experts or []
    )
    return "\n".join(
        f"| {name} | {expert.source_model} | {len(expert.positive_prompts or ())} |"
        for name, expert in zip(listed, mixture.all_experts, strict=True)
    )


def _slice_rows(splice: Splice) -> str:
    """The table of slices: the result's blocks, their donors and the donors' blocks."""
    rows, position = [], 0
    for part in splice.slices:
        ranges = [f"{source.layer_range[0]}-{source.layer_range[1] - 1}" for source in part.sources]
        names = " + ".join(
            source.model + (f" ({', '.join(source.filter)})" if source.filter else "")
            for source in part.sources
        )
        rows.append(f"| {position}-{position + part.length - 1} | {names} | {' + '.join(ranges)} |")
        position += part.length
    return "\n".join(rows)


def _how(splice: Splice) -> str:
    recipe = splice.recipe
    changed = recipe.dtype or recipe.out_dtype or splice.parameters
    if recipe.merge_method != "passthrough" or changed:
        return "from blocks of other models"
    stacking = "by stacking blocks of other models"
    if splice.has_gauges:
        return f"{stacking}, some rotated to another basis"
    return stacking if splice.healing else f"{stacking}, their weights unchanged"


def _since(splice: Splice) -> str:
    """What was done with it after merging."""
    healing = splice.healing
    if healing is None:
        return "It has not been trained since;\nmeasure it before you use it."
    taught = {"none": "the tokens themselves", "ensemble": "the mean of the donors' probabilities"}
    teacher = taught.get(healing.teacher, f"the probabilities of {', '.join(healing.teachers)}")
    on = "tokens that its donors generated" if healing.sampled else ", ".join(healing.on)
    best, control = healing.best_donor, healing.control
    compared = (
        "No control was run: how much a donor alone gains from the same training is not known."
        if control is None
        else f"{control.name}, healed alike, has {control.nats:.4f}: a difference of "
        f"{control.difference:+.4f} ({control.interval[0]:+.4f} to {control.interval[1]:+.4f}, "
        "95 %)."
    )
    judged = ", ".join(healing.measured_on)
    return f"""It has been healed since:

{healing.steps} steps on {on} ({healing.tokens:,} tokens), towards
{teacher}; trained: {healing.scope}.

Nats per token on held-out tokens of {judged}: before {healing.before:.4f}, healed
{healing.after:.4f}; its best donor, {best.name}, {best.nats:.4f}, a difference of
{best.difference:+.4f} ({best.interval[0]:+.4f} to {best.interval[1]:+.4f}, 95 %).

{compared}"""


def front_matter(donors: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """What the hub reads. Folders are left out: it accepts the names of its own models alone."""
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if named := hub_ids(donors):
        front |= {"base_model": named, "base_model_relation": "merge"}
    licences = [_licence(donor) for donor in donors.values()]
    if licences[0] and set(licences) == {licences[0]}:
        front["license"] = licences[0]
    return front | {"tags": ["merge", "frankenmerge"]}


def _licence(donor: Checkpoint) -> str | None:
    """The licence in the donor's card, where it is one word that the hub knows."""
    try:
        head = re.match(
            r"---\n(.*?)\n---", (donor.path / "README.md").read_text(encoding="utf-8"), re.S
        )
        front = yaml.safe_load(head[1]) if head else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    licence = front.get("license") if isinstance(front, Mapping) else None
    return licence if isinstance(licence, str) and licence != "other" else None


def card_diagram(splice: Splice) -> str:
    """Return the diagram of the splice, as a file of SVG."""
    depths = {name: donor.blocks for name, donor in splice.donors.items()}
    return diagram.svg(diagram.pieces_of(splice.spelled, depths), depths, "splice")
