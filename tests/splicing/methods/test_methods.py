"""Every method against a brute-force oracle in NumPy's float64, written from the formulas; and what must not change a result."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.methods import METHODS, faults, resolved, span
from frankenmerge.splicing.methods.combine import RULES, Operand, combine
from frankenmerge.splicing.methods.inputs import BLOCK
from frankenmerge.splicing.methods.noise import SCALE, words

SEED, NAME = 11, "layers.0.weight"


def part_of(array, parameters=None, asked=None):
    """A part that spoils what it returned as soon as it is read again."""
    flat = torch.from_numpy(np.asarray(array, dtype=np.float32).reshape(-1).copy())
    last = []

    def read(start, stop):
        assert 0 <= start < stop <= len(flat)
        for tensor in last:
            tensor.fill_(math.nan)
        last[:] = [flat[start:stop].clone()]
        if asked is not None:
            asked.append(stop - start)
        return last[0]

    return Operand(read, parameters or {})


def merged(method, arrays, base=None, models=None, chunk=BLOCK, seed=SEED, name=NAME, **parameters):
    models = models or [{}] * len(arrays)
    parts = [part_of(array, given) for array, given in zip(arrays, models, strict=True)]
    chunks = combine(
        method,
        parts,
        None if base is None else part_of(base),
        shape=arrays[0].shape,
        parameters=parameters,
        name=name,
        seed=seed,
        chunk=chunk,
    )
    return torch.cat([chunk.clone() for chunk in chunks]).numpy().reshape(arrays[0].shape)


# The oracles: models and base (float32 values in float64), a list of the models' parameters, those
# of the tensor.


def length(x):
    return math.sqrt((x * x).sum())


def arc(a, b, t, straight):
    """From a to b by turning: b's part across a's direction, Gram-Schmidt, instead of the formula of two sines."""
    if not length(a) or not length(b):
        return math.cos(t * math.pi / 2) * a + math.sin(t * math.pi / 2) * b
    cosine = np.clip((a * b).sum() / length(a) / length(b), -1, 1)
    if math.sqrt(1 - cosine**2) <= straight:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    u, v = a / length(a), b / length(b)
    w = (v - cosine * u) / math.sin(angle)
    # unit vectors scaled on their own: sin((1-t)A)/sin A of u has a's length, the rest b's
    along = math.cos(t * angle) - math.sin(t * angle) * cosine / math.sin(angle)
    return length(a) * along * u + length(b) * (
        math.cos(t * angle) * u + math.sin(t * angle) * w - along * u
    )


def rows_of(function, *arrays):
    flat = [array.reshape(-1, array.shape[-1]) for array in arrays]
    return np.stack([function(*rows) for rows in zip(*flat, strict=True)]).reshape(arrays[0].shape)


def o_passthrough(xs, b, models, p):
    return models[0]["scale"] * xs[0]


def o_linear(xs, b, models, p):
    weights = [m["weight"] for m in models]
    return sum(w * x for w, x in zip(weights, xs, strict=True)) / (
        sum(weights) if p["normalize"] else 1
    )


def o_slerp(xs, b, models, p):
    return arc(b, xs[0], p["t"], straight=math.sqrt(1 - 0.9995**2))


def o_nuslerp(xs, b, models, p):
    t = models[1]["weight"] / (models[0]["weight"] + models[1]["weight"])
    base = 0 * xs[0] if b is None else b
    one, other = xs[0] - base, xs[1] - base

    def rotation(x, y):
        return arc(x, y, t, straight=1e-3)

    if p["nuslerp_flatten"] or one.ndim < 2:
        return base + rotation(one, other)
    if not p["nuslerp_row_wise"]:
        return base + rows_of(rotation, one, other)
    columns = [x.reshape(-1, x.shape[-1]).T.copy() for x in (one, other)]
    return base + rows_of(rotation, *columns).T.reshape(base.shape)


def o_multislerp(xs, b, models, p):
    weights = np.array([m["weight"] for m in models])
    if p["normalize_weights"]:
        weights = weights / weights.sum()
    base = 0 * xs[0] if b is None else b
    deltas = [x - base for x in xs]
    mean = sum(
        (w * d / length(d) for w, d in zip(weights, deltas, strict=True) if length(d)), 0 * base
    )
    if not length(mean):
        return base
    return base + mean / length(mean) * sum(
        w * length(d) for w, d in zip(weights, deltas, strict=True)
    )


def o_karcher(xs, b, models, p):
    units = [x / length(x) for x in xs]
    point = units[0]
    for _ in range(300):  # small steps from another start than the method's
        gradient = np.zeros_like(point)
        for unit in units:
            cosine = np.clip((unit * point).sum(), -1, 1)
            across = unit - cosine * point
            if length(across) > 1e-12:
                gradient += math.acos(cosine) * across / length(across)
        point = point + 0.5 * gradient / len(units)
        point = point / length(point)
    return point * np.mean([length(x) for x in xs])


def o_model_stock(xs, b, models, p):
    def stock(base, *models):
        deltas = [x - base for x in models]
        cosines = [
            (d * e).sum() / (length(d) * length(e)) for d, e in itertools.combinations(deltas, 2)
        ]
        t = len(models) * np.mean(cosines) / (1 + (len(models) - 1) * np.mean(cosines))
        return t * np.mean(models, axis=0) + (1 - t) * base

    return rows_of(stock, b, *xs) if p["filter_wise"] and b.ndim > 1 else stock(b, *xs)


def task(xs, b, models, p, keep, consensus, scale):
    weights = [m["weight"] for m in models]
    terms = []
    for number, (x, model) in enumerate(zip(xs, models, strict=True)):
        delta = x - b
        kept = np.where(keep(number, delta, model), delta, 0)
        terms.append(weights[number] * kept * (scale(delta, kept, model) if p["rescale"] else 1))
    result = np.zeros(b.size)
    flat = [term.reshape(-1) for term in terms]
    for i in range(b.size):
        if not consensus:
            result[i] = sum(term[i] for term in flat) / (sum(weights) if p["normalize"] else 1)
            continue
        plus = sum(term[i] for term in flat) >= 0
        agree = [n for n, term in enumerate(flat) if term[i] and (term[i] > 0) == plus]
        mass = sum(weights[n] for n in agree)
        result[i] = sum(flat[n][i] for n in agree) / (
            mass if p["normalize"] and abs(mass) > 1e-6 * sum(map(abs, weights)) else 1
        )
    return b + p["lambda"] * result.reshape(b.shape)


def by_mass(delta, kept, model):
    return np.abs(delta).sum() / np.abs(kept).sum() if kept.any() else 1


def ranked(first, count):
    def keep(number, delta, model):
        order = sorted(range(delta.size), key=lambda i: (-abs(delta.flat[i]), i))
        mask = np.zeros(delta.size, dtype=bool)
        n = count(delta.size, model["density"])
        mask[order[min(first(delta.size, model), delta.size - n) :][:n]] = True
        return mask.reshape(delta.shape)

    return keep


def o_task_arithmetic(xs, b, models, p):
    return task(xs, b, models, p | {"rescale": False}, lambda *_: True, False, None)


def o_ties(xs, b, models, p):
    keep = ranked(
        lambda size, m: 0, lambda size, density: max(int(density * size), 1) if density else 0
    )
    return task(xs, b, models, p, keep, True, by_mass)


def o_breadcrumbs(xs, b, models, p, consensus=False):
    keep = ranked(lambda size, m: int(m["gamma"] * size), lambda size, density: int(density * size))
    return task(xs, b, models, p, keep, consensus, by_mass)


def o_breadcrumbs_ties(xs, b, models, p):
    return o_breadcrumbs(xs, b, models, p, consensus=True)


def drawn(number, size):
    return words(SEED, NAME, number, 0, size) / SCALE


def o_dare_linear(xs, b, models, p, consensus=False):
    def keep(number, delta, model):
        return (drawn(number, delta.size) < model["density"]).reshape(delta.shape)

    return task(xs, b, models, p, keep, consensus, lambda delta, kept, m: 1 / (m["density"] or 1))


def o_dare_ties(xs, b, models, p):
    return o_dare_linear(xs, b, models, p, consensus=True)


def o_della(xs, b, models, p, consensus=True):
    def keep(number, delta, model):
        width = delta.shape[-1] if delta.ndim else 1
        mask = np.ones(delta.size, dtype=bool)
        noise = drawn(number, delta.size)
        for start in range(0, delta.size, width):
            row = np.abs(delta.reshape(-1)[start : start + width])
            for rank, i in enumerate(sorted(range(width), key=lambda i: (row[i], i))):
                spread = (
                    model["epsilon"] * (2 * rank / (width - 1) - 1)
                    if width > 1 and 0 < model["density"] < 1
                    else 0
                )
                mask[start + i] = noise[start + i] < model["density"] + spread
        return mask.reshape(delta.shape)

    return task(xs, b, models, p, keep, consensus, by_mass)


def o_della_linear(xs, b, models, p):
    return o_della(xs, b, models, p, consensus=False)


def o_nearswap(xs, b, models, p):
    result = np.empty(b.size)
    for i, (x, y) in enumerate(zip(xs[0].flat, b.flat, strict=True)):
        w = min(1, p["t"] / abs(x - y)) if x != y else 1
        result[i] = w * x + (1 - w) * y
    return result.reshape(b.shape)


def o_arcee_fusion(xs, b, models, p):
    def importance(x, base):
        odds_x, odds_b = np.exp(x) / np.exp(x).sum(), np.exp(base) / np.exp(base).sum()
        return np.abs(x - base) * (odds_x * np.log(odds_x / odds_b)).sum()

    scores = rows_of(importance, xs[0], b) if b.ndim else np.zeros(())
    low, median, high = (np.quantile(scores, q, method="lower") for q in (0.25, 0.5, 0.75))
    return np.where(scores >= median + 1.5 * (high - low), xs[0], b)


def o_sce(xs, b, models, p):
    deltas = [x - b for x in xs]
    variance = np.var(deltas, axis=0)
    if p["select_topk"] < 1:
        order = sorted(
            (i for i in range(b.size) if len({d.flat[i] for d in deltas}) > 1),
            key=lambda i: (-variance.flat[i], i),
        )
        mask = np.zeros(b.size, dtype=bool)
        mask[order[: int(p["select_topk"] * len(order))]] = True
        deltas = [np.where(mask.reshape(b.shape), d, 0) for d in deltas]
    weights = np.array([(d**2).mean() for d in deltas])
    if not weights.any():
        return b
    weights = weights / weights.sum()
    result = np.zeros(b.size)
    for i in range(b.size):
        plus = sum(d.flat[i] for d in deltas) >= 0
        agree = [n for n, d in enumerate(deltas) if d.flat[i] and (d.flat[i] > 0) == plus]
        if agree:
            result[i] = sum(weights[n] * deltas[n].flat[i] for n in agree) / sum(
                weights[n] for n in agree
            )
    return b + result.reshape(b.shape)


def o_ram(xs, b, models, p):
    changed = [{i for i in range(b.size) if abs(x.flat[i] - b.flat[i]) > p["epsilon"]} for x in xs]
    result = np.zeros(b.size)
    for i in range(b.size):
        owners = [n for n in range(len(xs)) if i in changed[n]]
        if len(owners) == 1 and "r" in p:
            others = set().union(*(c for n, c in enumerate(changed) if n != owners[0]))
            shared, own = len(changed[owners[0]] & others), len(changed[owners[0]] - others)
            result[i] = (1 + p["r"] * min(shared / own, p["alpha"])) * (
                xs[owners[0]].flat[i] - b.flat[i]
            )
        elif owners:
            result[i] = np.mean([xs[n].flat[i] - b.flat[i] for n in owners])
    return b + result.reshape(b.shape)


ORACLES = {
    name.removeprefix("o_"): oracle for name, oracle in globals().items() if name.startswith("o_")
} | {"ramplus_tl": o_ram}

WEIGHTS = ([0.5, 0.3, 0.4], [1.0, -0.6, 0.2])
TASK = [
    {},
    {"normalize": True, "lambda": 0.7},
    {"normalize": False, "rescale": True},
    {"rescale": False, "normalize": True},
]
SHARED = {
    "linear": [{}, {"normalize": False}],
    "slerp": [{"t": 0.0}, {"t": 0.3}, {"t": 1}],
    "nuslerp": [
        {},
        {"nuslerp_flatten": False},
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    ],
    "multislerp": [{}, {"normalize_weights": False}],
    "karcher": [{"tol": 1e-9, "max_iter": 50}],
    "model_stock": [{}, {"filter_wise": True}],
    "nearswap": [{"t": 0.0}, {"t": 0.2}, {"t": 10}],
    "sce": [{}, {"select_topk": 0.4}, {"select_topk": 0}],
    "ram": [{}, {"epsilon": 0.3}],
    "ramplus_tl": [{}, {"r": 0.7, "alpha": 3.0, "epsilon": 0.2}],
}
OWN = {
    "scale": [[1.0] * 3, [-0.4] * 3],
    "density": [[0.53, 0.3, 1.0], [0.0, 0.5, 0.999]],
    "gamma": [[0.01, 0.2, 0.3]],
    "epsilon": [[0.15, 0.2, 0.0], [0.1, 0.3, 0.0005]],
    "weight": WEIGHTS,
}


def cases(method):
    """(number of models, whether there is a base, the models' parameters, those of the tensor)."""
    spec = METHODS[method]
    low, high = spec.models
    names = [name for name, parameter in spec.parameters.items() if parameter.per_model]
    rounds = max([len(OWN[name]) for name in names], default=1)
    own = [
        [{name: OWN[name][r % len(OWN[name])][n] for name in names} for n in range(3)]
        for r in range(rounds)
    ]
    shared = SHARED.get(method, TASK if "lambda" in spec.parameters else [{}])
    for base in {"none": [False], "optional": [False, True], "required": [True]}[spec.base]:
        for count in sorted({low, min(high or 3, 3)}):
            for models, parameters in itertools.product(own, shared):
                yield count, base, models[:count], parameters


CASES = [(method, *case) for method in METHODS for case in cases(method)]
SHAPES = [(6, 20), (3, 4, 5), (31,), (5, 1), (1,), ()]


def example(shape, seed=0, count=3):
    """A base and models near it that leave a third of it as it is; some of their changes are equal."""
    generator = np.random.default_rng(seed)
    base = generator.normal(size=shape)
    models = [
        base + 0.8 * generator.normal(size=shape) * (generator.random(shape) < 0.7)
        for _ in range(count)
    ]
    return np.float32(base).astype(np.float64), [
        np.float32(model).astype(np.float64) for model in models
    ]


def test_every_method_has_a_rule_and_an_oracle():
    assert set(METHODS) == set(RULES) == set(ORACLES)


def test_the_table_is_read_without_torch():
    code = "import sys, frankenmerge.splicing.methods as m; assert m.METHODS and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_against_the_oracle(method, shape):
    base, xs = example(shape)
    rounded = wrong = 0
    for count, with_base, models, parameters in cases(method):
        if method in ("model_stock", "nuslerp") and shape in ((5, 1), (1,), ()):
            continue  # angles of single numbers are 0 and 180 degrees: below
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
def test_chunks_change_no_bit_where_blocks_are_many_and_none_holds_the_tensor(method):
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
def test_degenerate_values_give_finite_results_whatever_the_chunks(method, values, data):
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
def test_random_methods_follow_the_seed_and_the_name_and_keep_what_they_promise(method):
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
def test_a_method_without_base_does_not_look_at_one(method):
    base, (x, *_) = example((6, 20))
    models = [{"weight": 2.0} if method == "linear" else {}]
    assert (merged(method, [x], base, models) == merged(method, [x], None, models)).all()


def test_angles_of_what_is_too_large_to_be_squared_are_an_error_that_names_the_tensor():
    for method in ("slerp", "nuslerp", "multislerp", "karcher", "model_stock"):
        for count, with_base, models, parameters in cases(method):
            base, xs = example((3, 4))
            xs[0][1, 1] = 1e30
            with pytest.raises(FrankenmergeError, match=f"{NAME}\n.*squared"):
                merged(method, xs[:count], base if with_base else None, models, **parameters)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoiled", ["model", "base"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_stays_in_its_own_element(method, spoiled, value):
    for count, with_base, models, parameters in cases(method):
        base, xs = example((6, 20))
        if spoiled == "model":
            xs[0][2, 3] = value
        elif with_base:
            base[2, 3] = value
        found = merged(method, xs[:count], base if with_base else None, models, **parameters)
        assert set(map(tuple, np.argwhere(~np.isfinite(found)))) <= {(2, 3)}, (
            count,
            with_base,
            models,
            parameters,
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", [name for name in span.RULES if name != "passthrough"])
def test_lengths_and_angles_are_those_of_the_finite_elements(method, value):
    for count, with_base, models, parameters in cases(method):
        base, xs = example((6, 20))
        holed = [x.copy() for x in xs]
        xs[0][2, 3] = value
        # neither adds to an inner product; slerp's angle is the models' own
        holed[0][2, 3] = base[2, 3] if with_base and method != "slerp" else 0
        found, wanted = (
            merged(method, some[:count], base if with_base else None, models, **parameters)
            for some in (xs, holed)
        )
        assert not np.isfinite(found[2, 3]) or method == "linear"
        found[2, 3] = wanted[2, 3]
        assert found.tobytes() == wanted.tobytes(), (count, with_base, models, parameters)


W = {"weight": 1.0}


@pytest.mark.parametrize(
    ("method", "models", "parameters", "base", "told"),
    [
        ("linear", [W, {"weight": -1}], {}, False, "1.0 + -1 = 0"),
        ("linear", [{"weight": 0.0}], {}, False, "= 0"),
        ("linear", [{"weight": 0.1}, {"weight": 0.2}, {"weight": -0.3}], {}, False, "= 0"),
        ("nuslerp", [W, {"weight": -1.0}], {}, False, "= 0"),
        ("multislerp", [W, {"weight": -1.0}], {}, False, "= 0"),
        ("task_arithmetic", [W, {"weight": -1.0}], {"normalize": True}, True, "= 0"),
        ("dare_linear", [W, {"weight": -1.0}], {"normalize": 1}, True, "= 0"),
        ("linear", [{}], {}, False, "weight"),
        ("linear", [{"weight": math.nan}], {}, False, "nan"),
        ("linear", [{"weight": "1"}], {}, False, "'1'"),
        ("linear", [W], {"normalise": True}, False, "normalise"),
        ("linear", [W], {"normalize": 0.5}, False, "true or false"),
        ("linear", [], {}, False, "1 or more"),
        ("slerp", [{}], {"t": math.nan}, True, "nan"),
        ("slerp", [{}], {"t": 1.1}, True, "0 to 1"),
        ("slerp", [{}], {}, True, "nothing"),
        ("slerp", [{}], {"t": 0.5}, False, "base"),
        ("slerp", [{}, {}], {"t": 0.5}, True, "1 model besides the base"),
        ("karcher", [{}], {"max_iter": 2.5}, False, "whole"),
        ("ties", [W | {"density": 1.5}], {}, True, "model 1"),
        ("ties", [W], {"weight": 1.0}, True, "weight"),
        ("della", [W | {"density": 0.9}], {}, True, "0.9 + 0.15"),
        ("della", [W, W | {"density": 0.15}], {}, True, "model 2"),
        ("nearswap", [{}], {"t": -1.0}, True, "0 to inf"),
    ],
)
def test_faults(method, models, parameters, base, told):
    found = faults(method, models, parameters, base=base, place="recipe.yaml")
    assert len(found) == 1
    assert told in str(found[0])
    assert "recipe.yaml" in found[0].place
    with pytest.raises(FrankenmergeError, match="layers.0.weight"):
        next(
            combine(
                method,
                [part_of(X, model) for model in models],
                part_of(X) if base else None,
                shape=X.shape,
                parameters=parameters,
                name=NAME,
                seed=0,
            )
        )


def test_all_faults_at_once():
    found = faults(
        "ties",
        [{"weight": math.inf, "density": -1}, {}],
        {"lambda": None, "lamda": 1},
        base=False,
        place="p",
    )
    assert len(found) == 6


def test_no_fault_where_weights_cancel_but_nothing_divides_by_them():
    opposite = [{"weight": 1.0}, {"weight": -1.0}]
    for method, parameters in (
        ("linear", {"normalize": False}),
        ("task_arithmetic", {}),
        ("ties", {}),
        ("della", {}),
        ("dare_ties", {"normalize": True}),
    ):
        assert not faults(
            method,
            [
                given | ({"density": 0.5} if "density" in METHODS[method].parameters else {})
                for given in opposite
            ],
            parameters,
            base=True,
            place="p",
        )
