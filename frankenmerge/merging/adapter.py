"""Write a self-merge as a LoRA that changes nothing, over its unrepeated base."""

from pathlib import Path
from typing import Any

from frankenmerge.errors import fail, raise_all
from frankenmerge.merging.output import output_faults
from frankenmerge.models.lora import WEIGHTS_NAME, check_peft
from frankenmerge.splicing.replication import Unrepeated, unrepeated
from frankenmerge.splicing.resolve import Splice
from frankenmerge.storage.atomic import new_folder

_REMEDY = "omit --adapter, which writes all weights"


def write_adapter(splice: Splice, output: Path, *, dry: bool = False) -> Unrepeated:
    """Write `adapter_config.json` and `adapter_model.safetensors` to a new folder.

    peft makes no adapter without a LoRA. This one is of rank 1, on the first matrix of the first
    block, and zero.

    Args:
        splice: unchanged blocks of one donor, repeated, reordered or left out.
        output: the folder.
        dry: only check.

    Returns:
        What the adapter says about its base.

    Raises:
        FrankenmergeError: for a splice that no adapter can express, and an output that exists.
    """
    base = unrepeated(splice, _REMEDY)
    check_peft()
    if not base.ranges:
        expected = "blocks that are repeated, reordered or left out"
        raise fail("adapter", expected, f"{base.base} as it is", "use the donor itself")
    raise_all(output_faults(output, splice.donors))
    if dry:
        return base
    from peft import LoraConfig
    from safetensors.torch import save_file

    name, tensors = _zero_lora(splice)
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": [name], **base.settings}
    config = LoraConfig(r=1, lora_alpha=1, inference_mode=True, **settings)
    with new_folder(output) as folder:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})
    return base


def _zero_lora(splice: Splice) -> tuple[str, dict[str, Any]]:
    """A module of the model in memory, and the tensors of a LoRA of it, by peft's names."""
    import torch

    from frankenmerge.models.blank import blank_model
    from frankenmerge.models.hooks import blocks_path

    model = blank_model(splice.base.config, torch.float32)
    prefix = f"{blocks_path(model)}.0."
    name, module = next(
        (name, module)
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, torch.nn.Linear)
    )
    tensors = {
        "lora_A": torch.zeros(1, module.in_features),
        "lora_B": torch.zeros(module.out_features, 1),
    }
    return name, {f"base_model.model.{name}.{part}.weight": tensors[part] for part in tensors}
