"""A config as transformers completes it: with the family's defaults, old fields converted.

Only configs of families that are not in the table need it. Importing transformers takes seconds, so
it happens where two configs differ and nothing else can say whether that matters.
"""

from typing import Any

from frankenmerge.donors.architecture import Config


def completed(config: Config) -> dict[str, Any] | None:
    """The config with all of its family's fields; None for one that transformers cannot read.

    The class is transformers' own; no code of a donor runs.
    """
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    name = config["model_type"]
    if name not in CONFIG_MAPPING:
        return None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        fields = {key: value for key, value in config.items() if key != "model_type"}
        return CONFIG_MAPPING[name](**fields).to_dict()
    except Exception:  # whatever a config of any origin makes a class of transformers raise
        return None
    finally:
        logging.set_verbosity(verbosity)
