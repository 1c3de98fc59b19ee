"""The objective is the divergence by its definition; batches use every row once in a round."""

import numpy as np
import pytest
import torch
from conftest import write_donor

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.domains import Domain
from frankenmerge.healing.objective import Batch, Objective
from frankenmerge.models.loading import load_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    paths = [write_donor(root / str(seed), seed=seed) for seed in (1, 2, 3)]
    return [load_model(open_checkpoint(str(path))) for path in paths]


def domain(rows: int, seed: int = 0) -> Domain:
    ids = torch.randint(0, 48, (rows, 9), generator=torch.Generator().manual_seed(seed))
    counted = torch.ones(rows, 8, dtype=torch.bool)
    counted[0, 5:] = False
    return Domain("d", ids, counted, np.arange(rows))


def probabilities(model, ids) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.double().numpy()
    powers = np.exp(logits)
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kept", [True, False])
def test_the_loss_is_the_sum_over_tokens_and_vocabulary(models, mix, kept, monkeypatch):
    student, *teachers = models
    given, rows = domain(3), np.array([2, 0])
    if not kept:
        monkeypatch.setattr("frankenmerge.healing.objective.TARGET_BYTES", 0)
    objective = Objective([given], [{"a": teachers[0], "b": teachers[1]}], mix)
    batch = Batch(0, rows)
    expected = 0.0
    ours = probabilities(student, given.ids)
    theirs = (probabilities(teachers[0], given.ids) + probabilities(teachers[1], given.ids)) / 2
    for row in rows:
        for place in range(5 if row == 0 else 8):
            p, q = theirs[row, place], ours[row, place]
            own = -np.log(q[given.ids[row, place + 1]])
            expected += (1 - mix) * (p * np.log(p / q)).sum() + mix * own
    assert objective.loss(student, batch).item() == pytest.approx(expected, rel=1e-4)
    assert objective.weight(batch) == 13


def test_batches_depend_on_seed_and_step_and_use_every_row_once(models):
    objective = Objective([domain(10), domain(6, 1)], [{}, {}], 1.0)
    steps = [objective.batches((0,), step, 8) for step in range(15)]
    for number, size in enumerate((10, 6)):
        rows = np.concatenate([step[number].rows for step in steps])
        assert all(len(step[number].rows) == 4 for step in steps)
        for start in range(0, 60, size):
            assert sorted(rows[start : start + size]) == list(range(size))
    again = objective.batches((0,), 7, 8)
    assert all((one.rows == other.rows).all() for one, other in zip(again, steps[7], strict=True))
    other = objective.batches((1,), 7, 8)
    assert any((one.rows != each.rows).any() for one, each in zip(other, steps[7], strict=True))
