"""Properties that follow from a method's definition, and degenerate tensors."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import NAME, SEED, cases, example, merged, part_of

from frankenmerge.splicing.methods import METHODS
from frankenmerge.splicing.methods.combine import combine


@pytest.mark.parametrize("method", METHODS)
def test_models_equal_to_the_base_change_nothing(method):
    base, _ = example((6, 20))
    for count, with_base, models, parameters in cases(method):
        found = merged(method, [base] * count, base if with_base else None, models, **parameters)
        if METHODS[method].base == "required" and method != "slerp":
            assert (found == base).all()
        else:
            gain = {"scale": models[0].get("scale")}.get("scale") or 1.0
            if (
                method in ("linear", "multislerp")
                and False in parameters.values()
                and not with_base
            ):
                gain = sum(model["weight"] for model in models)
            assert found == pytest.approx(gain * base, rel=1e-6, abs=1e-7)


AGREEING = [
    method
    for method in METHODS
    if method not in ("passthrough", "nearswap", "arcee_fusion", "slerp")
]


@pytest.mark.parametrize("method", AGREEING)
def test_equal_models_give_that_model(method):
    base, (x, *_) = example((6, 20))
    spec = METHODS[method]
    count = spec.models[0] + (spec.models[1] is None)
    models = [{"weight": 1 / count} if "weight" in spec.parameters else {}] * count
    found = merged(method, [x] * count, None if spec.base == "none" else base, models)
    assert found == pytest.approx(x, rel=2e-6, abs=2e-6)


WEIGHTED = [method for method, spec in METHODS.items() if "weight" in spec.parameters]


@pytest.mark.parametrize("method", WEIGHTED)
def test_all_weight_on_one_model_gives_that_model(method):
    base, (x, y, _) = example((6, 20))
    found = merged(
        method,
        [y, x],
        None if METHODS[method].base == "none" else base,
        [{"weight": 0}, {"weight": 1.0}],
    )
    assert found == pytest.approx(x, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("method", [m for m in AGREEING if not METHODS[m].random])
def test_the_order_of_models_does_not_matter(method):
    base, xs = example((6, 20))
    for count, with_base, models, parameters in cases(method):
        there = merged(method, xs[:count], base if with_base else None, models, **parameters)
        back = merged(
            method, xs[:count][::-1], base if with_base else None, models[::-1], **parameters
        )
        assert there == pytest.approx(back, rel=2e-6, abs=2e-6)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(METHODS)),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-3]), min_size=8, max_size=8),
    st.data(),
)
def test_degenerate_values_give_finite_results_for_any_chunks(method, values, data):
    """Zeros, equal and opposite values, ties in every order statistic."""
    count, with_base, models, parameters = data.draw(
        st.sampled_from([case for case in cases(method)])
    )
    arrays = [np.array(data.draw(st.permutations(values))).reshape(2, 4) for _ in range(count + 1)]
    base = arrays[-1] if with_base else None
    found = merged(method, arrays[:count], base, models, **parameters)
    assert np.isfinite(found).all()
    assert (
        found.tobytes()
        == merged(method, arrays[:count], base, models, chunk=3, **parameters).tobytes()
    )


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_without_elements_has_no_chunks(method, shape):
    count, with_base, models, parameters = next(iter(cases(method)))
    empty = [part_of(np.zeros(shape), given) for given in models]
    base = part_of(np.zeros(shape)) if with_base else None
    assert not list(
        combine(method, empty, base, shape=shape, parameters=parameters, name=NAME, seed=0)
    )


ZERO, X = np.zeros((2, 3)), np.arange(1.0, 7.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("method", "arrays", "base", "parameters", "expected"),
    [
        ("slerp", [X], X, {"t": 0.3}, X),
        ("slerp", [-X], X, {"t": 0.3}, 0.4 * X),
        ("slerp", [X], ZERO, {"t": 0.3}, math.sin(0.15 * math.pi) * X),
        ("slerp", [ZERO], ZERO, {"t": 0.3}, ZERO),
        ("nuslerp", [X, -X], None, {}, 0.5 * X),
        ("nuslerp", [X, X], X, {}, X),
        ("nuslerp", [2 * X, 0 * X], X, {}, 1.5 * X),
        ("nuslerp", [2 * X, 0 * X], X, {"nuslerp_flatten": False}, 1.5 * X),
        ("karcher", [X, -X], None, {}, X),
        ("karcher", [X, 3 * X], None, {}, 2 * X),
        ("karcher", [X, ZERO], None, {}, 0.5 * X),
        ("karcher", [ZERO, ZERO], None, {}, ZERO),
        ("karcher", [X, 2 * X], None, {"max_iter": 0}, 1.5 * X),
        ("multislerp", [X, -X], X / 2, {}, 1.5 / 2 * 0 + X / 2),
        ("multislerp", [ZERO, ZERO], None, {}, ZERO),
        ("multislerp", [X, ZERO], None, {}, 0.75 * X),
        ("model_stock", [X, X], ZERO, {}, X),
        ("model_stock", [X, -X], ZERO, {}, ZERO),
        ("model_stock", [X, ZERO], ZERO, {}, ZERO),
        ("ties", [X], ZERO, {"lambda": 0}, ZERO),
        ("sce", [X], ZERO, {"select_topk": 0.5}, ZERO),
        ("arcee_fusion", [X + 1], X, {}, X + 1),
        ("ramplus_tl", [X, X], ZERO, {}, X),
    ],
)
def test_degenerate_tensors(method, arrays, base, parameters, expected):
    weights = (
        [{"weight": w} for w in (0.75, 0.25)]
        if method in ("nuslerp", "multislerp", "ties")
        else [{}, {}]
    )
    if (method, base is None, len(arrays)) == ("multislerp", False, 2):
        weights = [{"weight": 0.5}] * 2
        arrays = [base + X, base - X]
    found = merged(method, arrays, base, weights[: len(arrays)], **parameters)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize(
    "method",
    [m for m, spec in METHODS.items() if "density" in spec.parameters and m != "task_arithmetic"],
)
def test_density_0_gives_the_base_and_1_every_change(method, density):
    base, (x, *_) = example((6, 20))
    found = merged(method, [x], base, [{"weight": 1.0, "density": density}])
    assert found == pytest.approx(x if density else base, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("method", [m for m, spec in METHODS.items() if spec.random])
def test_random_methods_depend_on_seed_and_name_and_keep_the_expected_shares(method):
    shape, density, epsilon = (400, 500), 0.4, 0.3
    base = np.zeros(shape)
    x = np.random.default_rng(0).normal(size=shape)
    models = [
        {"weight": 1.0, "density": density} | ({"epsilon": epsilon} if "della" in method else {})
    ]
    found = merged(method, [x], base, models)
    assert (found == merged(method, [x], base, models)).all()
    assert (found != merged(method, [x], base, models, seed=SEED + 1)).mean() > 0.3
    assert (found != merged(method, [x], base, models, name="other")).mean() > 0.3
    kept = found != 0
    assert kept.mean() == pytest.approx(density, abs=5 * 0.5 / math.sqrt(x.size))
    assert np.abs(found).sum() == pytest.approx(np.abs(x).sum(), rel=0.01)  # rescaled
    order = np.argsort(np.abs(x), axis=1)
    by_rank = np.take_along_axis(kept, order, axis=1).mean(axis=0)  # 500 ranks, 400 rows
    expected = (
        np.linspace(density - epsilon, density + epsilon, 500)
        if "della" in method
        else np.full(500, density)
    )
    assert np.abs(by_rank - expected).max() < 5.5 * 0.5 / math.sqrt(400)


@pytest.mark.parametrize("method", [m for m, spec in METHODS.items() if spec.base == "none"])
def test_a_method_without_base_ignores_one(method):
    base, (x, *_) = example((6, 20))
    models = [{"weight": 2.0} if method == "linear" else {}]
    assert (merged(method, [x], base, models) == merged(method, [x], None, models)).all()
