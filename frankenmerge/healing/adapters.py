"""LoRA: low-rank changes to the maps of all blocks, trained by peft and folded in at the end."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from frankenmerge.errors import fail
from frankenmerge.models.hooks import blocks_path
from frankenmerge.splicing.replication import Unrepeated

RANK, ALPHA = 16, 32


class Adapter:
    """A LoRA in a model: at first it changes nothing."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        """Add it to the linear maps of all blocks.

        Raises FrankenmergeError where peft is not installed or cannot change these blocks.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            expected, remedy = "peft, which trains it", "pip install 'frankenmerge[lora]'"
            raise fail("--scope lora", expected, "not installed", remedy) from error
        prefix = blocks_path(model)
        maps = [
            name
            for name, module in model.named_modules()
            if name.startswith(f"{prefix}.") and isinstance(module, nn.Linear | Conv1D)
        ]
        self.weights = {name: model.get_submodule(name).weight for name in maps}
        transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in maps)
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=maps,
            lora_dropout=0.0,
            fan_in_fan_out=transposed,
            task_type="CAUSAL_LM",
        )
        with _seeded(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a model that has no name
            warnings.simplefilter("ignore", FutureWarning)  # peft uses deprecated names
            self.model: Any = get_peft_model(model, config)
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }

    @torch.no_grad()
    def folded(self) -> Iterator[tuple[str, Tensor]]:
        """The names of the weights in the model without the LoRA, with it folded in, float32."""
        for name, weight in self.weights.items():
            layer = self.model.base_model.model.get_submodule(name)
            yield f"{name}.weight", weight.float() + layer.get_delta_weight("default").float()

    def save(self, folder: Path, base: Unrepeated) -> None:
        """Write the adapter alone, for its base, to a folder."""
        config = self.model.peft_config["default"]
        config.target_modules = sorted(config.target_modules)  # a set, in no order
        for name, value in base.settings.items():
            setattr(config, name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # peft looks for the base on the hub
            warnings.simplefilter("ignore", FutureWarning)
            self.model.save_pretrained(folder, save_embedding_layers=False)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Sample from this seed, and leave torch's random state as it was."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(state)
