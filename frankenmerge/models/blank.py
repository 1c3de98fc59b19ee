"""Models without weights: what transformers builds from a config, on the meta device."""

from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from frankenmerge.donors.architecture import Config
from frankenmerge.donors.config import is_multimodal
from frankenmerge.models.quiet import quiet


def model_class(config: Config) -> Any:
    """The class that transformers loads a config's model with.

    That of causal language models; for multimodal and other models the one that the config names.
    """
    kind = CONFIG_MAPPING[config["model_type"]]
    causal = kind in AutoModelForCausalLM._model_mapping
    names = config.get("architectures") or ()
    named = getattr(transformers, str(names[0]), None) if names else None
    of_library = isinstance(named, type) and issubclass(named, PreTrainedModel)
    if of_library and (is_multimodal(config) or not causal):
        return named
    seeing = kind in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if seeing and not causal else AutoModelForCausalLM


def config_object(config: Config) -> PreTrainedConfig:
    """A config as an object of transformers.

    Raises whatever transformers raises for one that it cannot read.
    """
    return AutoConfig.for_model(**config)


def blank_model(config: Config, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a config, with parameters on the meta device and buffers in memory.

    Raises whatever transformers raises for a config that it cannot build.
    """
    with quiet(), init_empty_weights(include_buffers=False):
        return build(model_class(config), config_object(unquantised(config)), dtype)


def build(kind: Any, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """Build a model of a class, automatic or not, from a config alone."""
    automatic = hasattr(kind, "_model_mapping")
    return (kind.from_config if automatic else kind._from_config)(config, dtype=dtype)


def unquantised(config: Config) -> dict[str, Any]:
    """The config of the same model with plain weights."""
    return {key: value for key, value in config.items() if key != "quantization_config"}
