"""Models without weights: what transformers builds from a config, on the meta device."""

import math
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
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

_LARGE = 2**20
"""Elements of tensors that are never made in memory."""


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
    with quiet(), init_empty_weights(include_buffers=False), _WithoutMemory():
        return build(model_class(config), config_object(unquantised(config)), dtype)


class _WithoutMemory(TorchFunctionMode):
    """Makes large empty tensors on the meta device at once.

    They would be moved there when they are registered, but all experts of a block may be larger
    than the memory.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and not kwargs.get("device"):
            size = args[0] if args and not isinstance(args[0], int) else args
            if size and math.prod(size) >= _LARGE:
                kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def build(kind: Any, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """Build a model of a class, automatic or not, from a config alone."""
    automatic = hasattr(kind, "_model_mapping")
    return (kind.from_config if automatic else kind._from_config)(config, dtype=dtype)


def unquantised(config: Config) -> dict[str, Any]:
    """The config of the same model with plain weights."""
    return {key: value for key, value in config.items() if key != "quantization_config"}
