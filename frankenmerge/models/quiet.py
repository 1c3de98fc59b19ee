"""Calls of transformers that leave the process's settings as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers; at the end restore its settings, and torch's random state.

    A model whose weights do not fit is filled with random ones before it is refused.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    state = torch.get_rng_state()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
