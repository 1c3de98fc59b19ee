"""The files of an extracted LoRA besides its weights: peft's config, provenance, card."""

import hashlib
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from filecmp import cmp as equal
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import frankenmerge
from frankenmerge.artefacts import lora as artefact
from frankenmerge.artefacts.lora import LoraProvenance, ModuleRecord
from frankenmerge.artefacts.provenance import PROVENANCE, DonorRecord
from frankenmerge.artefacts.recipe_schema import reference
from frankenmerge.errors import Fault, raise_all
from frankenmerge.merging.card import front_matter
from frankenmerge.merging.lora_plan import LoraOptions, LoraPlan
from frankenmerge.merging.lora_writer import Module
from frankenmerge.models.lora import CONFIG_NAME
from frankenmerge.storage.hashing import file_hash
from frankenmerge.storage.hub import is_folder

ERRORS = "errors.svg"


def lora_files(
    plan: LoraPlan,
    modules: Sequence[Module],
    options: LoraOptions,
    weights: Path,
    figure: bytes,
) -> dict[str, bytes]:
    """The contents by name.

    Args:
        plan: what the adapter holds.
        modules: its linear maps.
        options: how they were extracted.
        weights: the file of weights.
        figure: the errors as a file of SVG.
    """
    files = {CONFIG_NAME: _json(adapter_config(plan, modules))}
    files |= {
        str(path.relative_to(plan.model.path)): path.read_bytes()
        for path in plan.model.tokenizer_files
        if not _same(path, plan.base.path / path.relative_to(plan.model.path))
    }
    files[ERRORS] = figure
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    hashes[weights.name] = file_hash(weights)
    files[PROVENANCE] = artefact.dump(_provenance(plan, modules, options, hashes))
    files["README.md"] = card(plan, modules, options).encode()
    return files


def _same(path: Path, other: Path) -> bool:
    return other.is_file() and equal(path, other, shallow=False)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def adapter_config(plan: LoraPlan, modules: Sequence[Module]) -> dict[str, Any]:
    """The content of peft's adapter_config.json; alpha is the rank, so that factors are unscaled.

    The most frequent rank is that of the whole, the others are in patterns.
    """
    ranks = Counter(module.rank for module in modules)
    usual = max(ranks, key=lambda rank: (ranks[rank], rank))
    others = {module.name: module.rank for module in modules if module.rank != usual}
    path, revision, _ = reference(plan.base.name)
    # Both copies are in the file, so that versions of peft that do not know the key load it too.
    tied = {"ensure_weight_tying": True} if plan.tied else {}
    return tied | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": path,
        "revision": revision,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "all" if plan.biases else "none",
        "fan_in_fan_out": bool(plan.transposed),
        "target_modules": target_modules(plan),
        "modules_to_save": list(plan.saved_modules) or None,
    }


def target_modules(plan: LoraPlan) -> list[str]:
    """The maps that get factors: by the last part of their path where that names no other map."""
    changed = {pair.module for pair in plan.maps}
    others = {name.rpartition(".")[2] for name in plan.linear if name not in changed}
    names = ((name, name.rpartition(".")[2]) for name in sorted(changed))
    return list(dict.fromkeys(name if last in others else last for name, last in names))


def _provenance(
    plan: LoraPlan, modules: Sequence[Module], options: LoraOptions, hashes: Mapping[str, str]
) -> LoraProvenance:
    from importlib.metadata import version

    computed = "numpy" if options.device == "cpu" else "torch"
    chosen = {"rank": options.fixed_rank, "energy": options.energy, "error": options.error}
    chosen |= {"dtype": options.dtype, "device": options.device, "seed": options.seed}
    return LoraProvenance.of(
        kind=artefact.KIND,
        frankenmerge=frankenmerge.__version__,
        versions={"python": platform.python_version(), computed: version(computed)},
        model=plan.model.name,
        base=plan.base.name,
        donors={
            donor.name: DonorRecord.of(fingerprint=donor.fingerprint)
            for donor in (plan.model, plan.base)
        },
        options={name: value for name, value in chosen.items() if value is not None},
        files=dict(hashes),
        modules={
            module.name: ModuleRecord.of(rank=module.rank, error=module.error, norm=module.norm)
            for module in modules
        },
        saved=list(plan.saved_modules),
    )


def card(plan: LoraPlan, modules: Sequence[Module], options: LoraOptions) -> str:
    """README.md: front matter for the hub, what the adapter holds, errors by kind of map."""
    front = front_matter({plan.base.name: plan.base}) | {
        "library_name": "peft",
        "tags": ["lora", "frankenmerge"],
    }
    if "base_model" in front:
        front["base_model_relation"] = "adapter"
    rows = "\n".join(
        f"| {row.kind} | {row.count} | {row.ranks} | {row.mean:.3g} | {row.largest:.3g} |"
        for row in by_kind(modules)
    )
    table = f"""![Relative error by block]({ERRORS})

| map | matrices | rank | mean error | largest error |
|---|---|---|---|---|
{rows}

The error of a matrix is the Frobenius norm of what its factors leave out of the difference, over
the difference's own, computed from the factors as they are written ({options.dtype}).
Of all differences together {total_error(modules):.3g} is left out.
"""
    full = "\n".join(f"- {kind}" for kind in saved_kinds(plan.saved_modules))
    full = f"\nHeld in full:\n\n{full}\n" if full else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {_shown(plan.model.name)} as a LoRA of {_shown(plan.base.name)}

{_goal(options)}

{table}{full}
## Loading it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({plan.base.name!r}, dtype="auto")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

Extracted by frankenmerge {frankenmerge.__version__}. `frankenmerge.json` has the rank and the error
of every matrix.
"""


def _shown(name: str) -> str:
    return Path(name).name if is_folder(name) else name


def _goal(options: LoraOptions) -> str:
    if options.error is not None:
        return f"The rank of each matrix is the smallest for a relative error of {options.error:g}."
    if options.energy is not None:
        share = f"{options.energy:g} of the difference's squared norm"
        return f"The rank of each matrix is the smallest that keeps {share}."
    return f"The rank of each matrix is {options.fixed_rank}, or its own where that is smaller."


class Row(NamedTuple):
    """Errors of the maps of one kind in all blocks."""

    kind: str
    count: int
    ranks: str
    mean: float
    largest: float


def by_kind(modules: Sequence[Module]) -> list[Row]:
    """Errors of the maps of each kind, the largest first."""
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(kind_of(module.name), []).append(module)
    rows = [_row(kind, group) for kind, group in groups.items()]
    return sorted(rows, key=lambda row: -row.largest)


def _row(kind: str, group: Sequence[Module]) -> Row:
    ranks, errors = [each.rank for each in group], [each.error for each in group]
    span = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}-{max(ranks)}"
    return Row(kind, len(group), span, sum(errors) / len(errors), max(errors))


def saved_kinds(modules: Sequence[str]) -> list[str]:
    """Modules in words: those of one kind in several blocks together."""
    counts = Counter(map(kind_of, modules))
    return [kind if count == 1 else f"{kind} in {count} blocks" for kind, count in counts.items()]


def kind_of(module: str) -> str:
    """What is behind the block's number in a module's path, such as `self_attn.q_proj`."""
    return re.split(r"\.\d+\.", module, maxsplit=1)[-1]


def total_error(modules: Sequence[Module]) -> float:
    """The relative error of all matrices together, in the Frobenius norm."""
    total = math.sqrt(sum(module.norm**2 for module in modules))
    left = math.sqrt(sum((module.error * module.norm) ** 2 for module in modules))
    return left / total


def verify_lora(folder: Path) -> int:
    """Compare an adapter's files with its frankenmerge.json; returns how many there are.

    Raises FrankenmergeError with all that differ or are missing. The card may be edited.
    """
    record = artefact.load(folder)
    raise_all(
        Fault(str(folder / name), "the file that was written", "another, or none", "extract again")
        for name, expected in record.files.items()
        if not (folder / name).is_file() or file_hash(folder / name) != expected
    )
    return len(record.files)
