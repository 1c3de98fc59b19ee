"""Every merge method compared with its oracle, for any chunk size."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from method_cases import NAME, SEED, SHAPES, cases, example, merged, part_of
from method_oracles import ORACLES

from frankenmerge.splicing.methods import METHODS, resolved
from frankenmerge.splicing.methods.combine import RULES, combine
from frankenmerge.splicing.methods.inputs import BLOCK


def test_every_method_has_a_rule_and_an_oracle():
    assert set(METHODS) == set(RULES) == set(ORACLES)


def test_the_table_is_read_without_torch():
    code = (
        "import sys, frankenmerge.splicing.methods as m; "
        "assert m.METHODS and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_against_the_oracle(method, shape):
    base, xs = example(shape)
    rounded = wrong = 0
    for count, with_base, models, parameters in cases(method):
        if method in ("model_stock", "nuslerp") and shape in ((5, 1), (1,), ()):
            continue  # angles of single numbers are 0 or 180 degrees, see test_degenerate_tensors
        oracle = ORACLES[method](
            xs[:count],
            base if with_base else None,
            [resolved(method, model, per_model=True) for model in models],
            resolved(method, parameters, per_model=False),
        )
        found = merged(method, xs[:count], base if with_base else None, models, **parameters)
        assert found == pytest.approx(
            oracle, rel=0, abs=2e-6 * max(np.abs(oracle).max(), np.abs(xs).max())
        ), (count, models, parameters)
        rounded += found.size
        wrong += (
            torch.from_numpy(found).bfloat16()
            != torch.from_numpy(np.asarray(oracle)).float().bfloat16()
        ).sum()
    assert wrong <= 0.002 * rounded


@pytest.mark.parametrize("method", METHODS)
def test_chunks_change_no_bit(method):
    for shape in ((6, 20), (31,)):
        base, xs = example(shape)
        for count, with_base, models, parameters in cases(method):
            results = [
                merged(
                    method,
                    xs[:count],
                    base if with_base else None,
                    models,
                    chunk=chunk,
                    **parameters,
                )
                for chunk in (BLOCK, 1, 7, 33)
            ]
            assert all(result.tobytes() == results[0].tobytes() for result in results), (
                shape,
                count,
                models,
                parameters,
            )


@pytest.mark.parametrize("method", METHODS)
def test_chunks_change_no_bit_of_a_tensor_of_several_blocks(method):
    shape = (1237, 303)
    base, xs = example(shape)
    *_, (count, with_base, models, parameters) = cases(method)
    results, asked = [], []
    for chunk in (BLOCK, 77_777, 4096):
        parts = [part_of(x, given, asked) for x, given in zip(xs[:count], models, strict=True)]
        chunks = combine(
            method,
            parts,
            part_of(base) if with_base else None,
            shape=shape,
            parameters=parameters,
            name=NAME,
            seed=SEED,
            chunk=chunk,
        )
        results.append(b"".join(chunk.numpy().tobytes() for chunk in chunks))
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 4 * 1237 * 303
    assert max(asked) <= BLOCK
