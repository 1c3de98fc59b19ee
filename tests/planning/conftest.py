"""Alignments of small donors."""

import pytest

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.donors.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def alignments(donors) -> dict[str, Alignment]:
    atlases = {name: analyze(open_checkpoint(str(donors[name]))) for name in ("a", "b", "deep")}
    return {
        f"{a}-{b}": align(atlases[a], atlases[b])
        for a, b in (("a", "b"), ("a", "deep"), ("b", "deep"), ("a", "a"))
    }
