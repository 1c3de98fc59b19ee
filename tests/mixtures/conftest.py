"""Donors of mixtures, written once a session."""

import pytest
from mixture_cases import CASES, write_donors


@pytest.fixture(scope="session")
def experts(tmp_path_factory):
    """By family: a base and three other donors of its shape, of two blocks."""
    root = tmp_path_factory.mktemp("experts")
    families = dict.fromkeys(family for family, _ in CASES.values())
    return {family: write_donors(root, family, num_hidden_layers=2) for family in families}
