"""Pairs of donors of every type, and merges of their weighted means."""

from pathlib import Path

import pytest
from conftest import write_donor
from means import TYPES, linear_splice

from frankenmerge.merging.write_plan import MergeOptions
from frankenmerge.merging.writer import merge
from frankenmerge.progress import silent
from frankenmerge.splicing.methods import native_chunks


@pytest.fixture
def linear():
    """Merge whole donors tensor by tensor."""

    def call(first: Path, second: Path, output: Path, *, options=(), progress=silent, **how):
        options = MergeOptions(**dict(options))
        return merge(linear_splice(first, second, **how), output, options, progress=progress)

    return call


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict[str, list[Path]]:
    """Two donors of every type whose embedding is larger than a chunk."""
    root = tmp_path_factory.mktemp("pair")
    shape = {"hidden_size": 64, "vocab_size": 5003}
    return {
        name: [
            write_donor(
                root / f"{name}{seed}", seed=seed, dtype=str(dtype).removeprefix("torch."), **shape
            )
            for seed in (1, 2)
        ]
        for name, dtype in TYPES.items()
    }


@pytest.fixture
def without_extension(monkeypatch):
    """As where no compiler was there when the package was installed."""
    return lambda: monkeypatch.setattr(native_chunks, "extension", None)
