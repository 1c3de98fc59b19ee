"""Loading a model leaves the process's settings as they were."""

import pytest
import torch
from transformers.utils import logging

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models.loading import load_model, load_tokenizer, quiet, untrained_model


def settings() -> tuple:
    random = torch.get_rng_state()
    return logging.get_verbosity(), logging.is_progress_bar_enabled(), random.sum().item()


@pytest.fixture(params=["info", "error"])
def before(request):
    """Settings that differ from the library's own."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    getattr(logging, f"set_verbosity_{request.param}")()
    (logging.enable_progress_bar if request.param == "info" else logging.disable_progress_bar)()
    yield settings()
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def test_loading_restores_them(before, donors, capfd):
    checkpoint = open_checkpoint(str(donors["a"]))
    for load in (load_model, load_tokenizer, lambda donor: untrained_model(donor, 3)):
        load(checkpoint)
        assert settings() == before
    assert capfd.readouterr().err == ""  # no bar, no message


def test_a_load_that_fails_restores_them(before, donors, tmp_path):
    folder = tmp_path / "short"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((donors["a"] / name).read_bytes())
    checkpoint = open_checkpoint(str(folder))
    checkpoint.config["vocab_size"] = 7
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"vocab_size": 48', '"vocab_size": 7')
    )
    with pytest.raises(FrankenmergeError, match="mismatched keys"):
        load_model(checkpoint)
    assert settings() == before


def test_inside_it_is_quiet():
    with quiet():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
