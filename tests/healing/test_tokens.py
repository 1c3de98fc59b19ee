"""How many tokens are sampled to heal on."""

import pytest

from frankenmerge.healing.tokens import FITTING, USES, fitting_rows
from frankenmerge.healing.training import ROWS


@pytest.mark.parametrize(
    ("steps", "donors", "rows"),
    [(300, 2, FITTING), (25, 1, FITTING), (300, 1, 960), (1000, 1, 3200), (1000, 2, 1600)],
)
def test_rows_are_used_a_few_times(steps, donors, rows):
    assert fitting_rows(steps, donors) == rows
    assert steps * ROWS / donors <= USES * rows
