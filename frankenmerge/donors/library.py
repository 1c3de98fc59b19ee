"""A config as transformers completes it: with the family's defaults, old fields converted.

Only configs of families that are not in the table need it. Importing transformers takes seconds, so
it happens where two configs differ and nothing else can say whether that matters.
"""

from copy import deepcopy
from logging import CRITICAL
from typing import Any

from frankenmerge.donors.architecture import Config


def is_known(family: str) -> bool:
    """Whether transformers has the family, so that it needs no code of the donor's."""
    from transformers import CONFIG_MAPPING

    return family in CONFIG_MAPPING


def completed(config: Config) -> dict[str, Any] | None:
    """All fields that the config's family has; None for a config that transformers cannot read.

    Fields that only the config has are left out: no model of the family reads them. The class is
    transformers' own; no code of a donor runs.
    """
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    name = config["model_type"]
    if name not in CONFIG_MAPPING:
        return None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        fields = {key: deepcopy(value) for key, value in config.items() if key != "model_type"}
        declared = CONFIG_MAPPING[name]().to_dict()
        full = CONFIG_MAPPING[name](**fields).to_dict()
        return {key: value for key, value in full.items() if key in declared}
    except Exception:  # whatever a config of any origin makes a class of transformers raise
        return None
    finally:
        logging.set_verbosity(verbosity)
