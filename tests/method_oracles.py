"""Every merge method in float64 NumPy, written from its formula, as an oracle.

Arguments of an oracle: models and base (float32 values in float64), a list of the models'
parameters, and the parameters of the tensor.
"""

import itertools
import math

import numpy as np
from method_cases import NAME, SEED

from frankenmerge.splicing.methods.noise import SCALE, words


def length(x):
    return math.sqrt((x * x).sum())


def arc(a, b, t, straight):
    """Rotate from a to b, by Gram-Schmidt instead of the formula with two sines."""
    if not length(a) or not length(b):
        return math.cos(t * math.pi / 2) * a + math.sin(t * math.pi / 2) * b
    cosine = np.clip((a * b).sum() / length(a) / length(b), -1, 1)
    if math.sqrt(1 - cosine**2) <= straight:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    u, v = a / length(a), b / length(b)
    w = (v - cosine * u) / math.sin(angle)
    # two scales: the part sin((1-t)A)/sin A of u has a's length, the rest b's
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
    for _ in range(300):  # small steps, from a different start than the method
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


def uniform(number, size):
    return words(SEED, NAME, number, 0, size) / SCALE


def o_dare_linear(xs, b, models, p, consensus=False):
    def keep(number, delta, model):
        return (uniform(number, delta.size) < model["density"]).reshape(delta.shape)

    return task(xs, b, models, p, keep, consensus, lambda delta, kept, m: 1 / (m["density"] or 1))


def o_dare_ties(xs, b, models, p):
    return o_dare_linear(xs, b, models, p, consensus=True)


def o_della(xs, b, models, p, consensus=True):
    def keep(number, delta, model):
        width = delta.shape[-1] if delta.ndim else 1
        mask = np.ones(delta.size, dtype=bool)
        noise = uniform(number, delta.size)
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
