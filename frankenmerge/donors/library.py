"""A config as transformers completes it: with the family's defaults, old fields converted.

Only configs of families that are not in the table need it. Importing transformers takes seconds, so
it happens where two configs differ and nothing else can say whether that matters.
"""

from collections.abc import Mapping
from functools import lru_cache
from logging import CRITICAL
from typing import Any

from frankenmerge.donors.architecture import Config


@lru_cache
def own_names(model_type: str) -> Mapping[str, str]:
    """A family's own names of config fields by their common ones, as transformers maps them.

    GPT-2's config, for one, calls `hidden_size` `n_embd`.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return {}
    return dict(CONFIG_MAPPING[model_type].attribute_map)


@lru_cache
def declared(model_type: str) -> frozenset[str]:
    """The fields that a family's config has by itself; none for an unknown family."""
    from transformers import CONFIG_MAPPING

    known = model_type in CONFIG_MAPPING
    return frozenset(CONFIG_MAPPING[model_type]().to_dict() if known else ())


@lru_cache
def ties(model_type: str) -> Mapping[str, str]:
    """What a family's causal language model ties: names of tensors, with those that they are.

    Empty for a family without such a model. Imports torch.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    tied = getattr(getattr(transformers, name or "", None), "_tied_weights_keys", None)
    return tied if isinstance(tied, Mapping) else {}


def completed(config: Config) -> dict[str, Any] | None:
    """The config with all fields of its family; None for a config that transformers cannot read.

    The class is transformers' own; no code of a donor runs.
    """
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    name = config["model_type"]
    if name not in CONFIG_MAPPING:
        return None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        fields = {key: _plain(value) for key, value in config.items() if key != "model_type"}
        return CONFIG_MAPPING[name](**fields).to_dict()
    except Exception:  # whatever a config of any origin makes a class of transformers raise
        return None
    finally:
        logging.set_verbosity(verbosity)


def _plain(value: Any) -> Any:
    """A copy of a value of config.json; transformers writes numbers that JSON lacks as objects."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value
