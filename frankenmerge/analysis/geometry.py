"""Scores of whole states on the probes: the literature's measures of similarity between layers.

Each takes two atlases, see `align.FUNCTIONS`. 1 is full agreement, except for `distance`.
"""

from collections.abc import Callable

import numpy as np

from frankenmerge.analysis.nulls import derangement, interval_of, mean_over, resampling_weights
from frankenmerge.artefacts.alignment import Score
from frankenmerge.artefacts.atlas import Atlas

NEIGHBOURS = 10
MOST_PROBES = 512
"""Probes for scores of pairs of probes, whose cost grows with the square of their number."""
ROUNDS = 4
"""Permutations for each null; every one is averaged over hundreds of probes."""
PROBES_AT_ONCE = 64
BLIND = frozenset(
    {"cka", "neighbours", "norm_ratio", "influence", "distance", "relative_depth", "gauge"}
)
"""Scores that do not depend on the order of the neurons."""


def debiased_cka(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """Linear CKA with the unbiased estimator of HSIC.

    Kornblith et al., arXiv:1905.00414; Song et al., 2012. With U-centred kernels `K~` (Szekely and
    Rizzo, 2014) HSIC is their inner product; the bootstrap resamples its summands, one per probe.
    """
    a_kernels, b_kernels = (
        _centred_kernels(states_of(atlas, width, spread=True)) for atlas in (a, b)
    )
    self_a, self_b = (
        np.einsum("lpq,lpq->lp", kernels, kernels) for kernels in (a_kernels, b_kernels)
    )

    def summands(kernels: np.ndarray) -> np.ndarray:
        return np.matmul(a_kernels.transpose(1, 0, 2), kernels.transpose(1, 2, 0)).transpose(
            1, 2, 0
        )

    def ratio(shared: np.ndarray, own_a: np.ndarray, own_b: np.ndarray) -> np.ndarray:
        scale = np.sqrt(np.maximum(own_a[:, None] * own_b[None], 0))
        return np.divide(shared, scale, out=np.zeros_like(shared), where=scale > 0)

    shared, generator, weights = (
        summands(b_kernels),
        np.random.default_rng(0),
        resampling_weights(self_a.shape[1]).T,
    )
    scale = self_a.sum(axis=1), self_b.sum(axis=1)

    def other_probes() -> np.ndarray:
        order = generator.permutation(b_kernels.shape[1])
        return ratio(summands(b_kernels[:, order][:, :, order]).sum(axis=2), *scale)

    resampled = ratio(shared @ weights, self_a @ weights, self_b @ weights)
    return _score(
        ratio(shared.sum(axis=2), *scale),
        {"permuted_probes": mean_over(other_probes, ROUNDS)},
        interval_of(resampled),
    )


def _centred_kernels(states: np.ndarray) -> np.ndarray:
    """U-centred linear kernels `[l, n, n]`, float32, of states `[l, n, d]`, each of unit norm."""
    kernels = np.empty((len(states), states.shape[1], states.shape[1]), dtype=np.float32)
    for index, state in enumerate(states):
        kernel = (state @ state.T).astype(np.float64)
        np.fill_diagonal(kernel, 0)
        count, sums = len(kernel), kernel.sum(axis=0)
        kernel += sums.sum() / ((count - 1) * (count - 2)) - (sums[:, None] + sums[None]) / (
            count - 2
        )
        np.fill_diagonal(kernel, 0)
        kernels[index] = kernel / (np.sqrt((kernel**2).sum()) or 1)
    return kernels


def mutual_neighbours(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """Share of each probe's 10 nearest probes, by cosine, that are the same in both.

    Huh et al., arXiv:2405.07987.
    """
    near_a, near_b = (_nearest(states_of(atlas, width, spread=True)) for atlas in (a, b))
    generator, count = np.random.default_rng(0), near_a.shape[1]

    def shared(near: np.ndarray) -> np.ndarray:
        return np.stack([np.stack([(x & y).sum(axis=1) for y in near]) for x in near_a]) / min(
            NEIGHBOURS, count - 1
        )

    def other_probes() -> np.ndarray:
        order = generator.permutation(count)
        return shared(near_b[:, order][:, :, order]).mean(axis=2)

    return _mean_score(shared(near_b), {"permuted_probes": mean_over(other_probes, ROUNDS)})


def _nearest(states: np.ndarray) -> np.ndarray:
    """Whether probe `q` is among the nearest of probe `p`, `[l, n, n]`; of equals the first."""
    near = np.zeros((len(states), states.shape[1], states.shape[1]), dtype=bool)
    for index, state in enumerate(states):
        cosine = _cosines(state)
        np.fill_diagonal(cosine, -np.inf)
        chosen = np.argsort(-cosine, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(state) - 1)]
        np.put_along_axis(near[index], chosen, True, axis=1)
    return near


def _cosines(state: np.ndarray) -> np.ndarray:
    """Cosines `[n, n]`, float64, of states `[n, d]`; equal states have exactly equal cosines.

    A token that occurs several times among the probes enters the first block as the same state.
    Computed one by one, its cosines would differ by rounding, and the order of summation would
    decide which of its occurrences are the nearest. Each distinct state is therefore computed once.
    """
    numbers: dict[bytes, int] = {}
    number = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in state])
    _, first = np.unique(number, return_index=True)
    direction = _directions(state[first].astype(np.float64))
    return (direction @ direction.T)[np.ix_(number, number)]


def angular(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """`1 - arccos(cos(x, y)) / pi`, mean over probes.

    One minus the angular distance of Gromov et al. (arXiv:2403.17887).
    """

    def detail(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        chords, _ = _distances(_directions(x), _directions(y))
        # arccos would lose small angles to rounding
        return 1 - 2 * np.arcsin(np.minimum(1, chords / 2)) / np.pi

    return _pairwise(a, b, width, detail)


def relative_error(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """`1 - |x - y| / sqrt(|x| |y|)`, mean over probes: one minus the relative error."""

    def detail(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        distances, sizes = _distances(x, y)
        return 1 - np.divide(distances, sizes, out=np.ones_like(sizes), where=sizes > 0)

    return _pairwise(a, b, width, detail)


def _pairwise(
    a: Atlas, b: Atlas, width: int, detail: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Score:
    """A score `[l_a, l_b, n]` of `detail` for all pairs of states of `n` probes.

    `detail` takes A's states `[n, l_a, d]` and B's `[n, l_b, d]`, float64, some probes at a time.
    Both permutation nulls are computed alike.
    """
    left, right, generator = states_of(a, width), states_of(b, width), np.random.default_rng(0)

    def table(states: np.ndarray) -> np.ndarray:
        parts = [
            detail(
                *(
                    each[:, start : start + PROBES_AT_ONCE].transpose(1, 0, 2).astype(np.float64)
                    for each in (left, states)
                )
            )
            for start in range(0, left.shape[1], PROBES_AT_ONCE)
        ]
        return np.concatenate(parts).transpose(1, 2, 0)

    nulls = {
        "permuted_probes": mean_over(
            lambda: table(right[:, generator.permutation(right.shape[1])]).mean(axis=2), ROUNDS
        ),
        "permuted_neurons": mean_over(
            lambda: table(right[:, :, derangement(generator, width)]).mean(axis=2), ROUNDS
        ),
    }
    return _mean_score(table(right), nulls)


def _distances(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances of all pairs, and the square roots of the products of their norms, `[n, l_a, l_b]`.

    As one product of matrices for each probe: of `x` `[n, l_a, d]` and `y` `[n, l_b, d]`, float64.
    Distances below 1e-7 of the norms are rounding errors, and 0.
    """
    own_x, own_y = (np.einsum("nld,nld->nl", each, each) for each in (x, y))
    sums = own_x[:, :, None] + own_y[:, None]
    squares = sums - 2 * np.matmul(x, y.transpose(0, 2, 1))
    squares[squares <= 1e-14 * sums] = 0
    return np.sqrt(squares), (own_x[:, :, None] * own_y[:, None]) ** 0.25


def norm_ratio(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """The smaller norm over the larger, mean over probes."""
    norms = [np.linalg.norm(states_of(atlas, width), axis=2) for atlas in (a, b)]
    generator = np.random.default_rng(0)

    def ratio(other: np.ndarray) -> np.ndarray:
        low, high = (
            np.minimum(norms[0][:, None], other[None]),
            np.maximum(norms[0][:, None], other[None]),
        )
        return np.divide(low, high, out=np.ones_like(low), where=high > 0)

    shuffled = mean_over(
        lambda: ratio(norms[1][:, generator.permutation(norms[1].shape[1])]).mean(axis=2), ROUNDS
    )
    return _mean_score(ratio(norms[1]), {"permuted_probes": shuffled})


def influence(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """One minus the influence of the blocks in between: `1 - |c_A(i) - c_B(j)|`.

    `c(i)` sums `1 - cos(x_(l-1), x_l)` over a donor's first `i` blocks: ShortGPT's block influence
    (arXiv:2403.03853).
    """
    passed = [_passed(states_of(atlas, atlas.width)) for atlas in (a, b)]
    resampled = [line @ resampling_weights(line.shape[1]).T for line in passed]
    means = [line.mean(axis=1) for line in passed]
    interval = interval_of(1 - np.abs(resampled[0][:, None] - resampled[1][None]))
    return _score(1 - np.abs(means[0][:, None] - means[1][None]), {}, interval)


def _passed(states: np.ndarray) -> np.ndarray:
    """Influence summed over the blocks so far, by probe, `[l+1, n]`."""
    directions = np.stack([_directions(state) for state in states])
    rotated = 1 - (directions[1:] * directions[:-1]).sum(axis=2)
    return np.concatenate([np.zeros_like(rotated[:1]), rotated.cumsum(axis=0)])


def distance(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """`-abs(i - j)`: the baseline that needs no model."""
    left, right = np.indices((a.blocks + 1, b.blocks + 1))
    return _certain(-np.abs(left - right))


def relative_depth(a: Atlas, b: Atlas, context: str, width: int) -> Score:
    """`1 - |i / l_a - j / l_b|`."""
    left, right = np.indices((a.blocks + 1, b.blocks + 1))
    return _certain(1 - np.abs(left / a.blocks - right / b.blocks))


def gram(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products `[l_a+l_b+2, l_a+l_b+2]`, float64, of all states, averaged over the probes.

    The states are A's `[l_a+1, n, d]`, then B's. Those of every probe are divided by their mean
    norm, so that all probes count alike: where a model has massive activations, a few tokens have
    states hundreds of times as long as all others.
    """
    total = np.zeros((len(a) + len(b),) * 2)
    for start in range(0, a.shape[1], PROBES_AT_ONCE):
        states = np.concatenate(
            [part[:, start : start + PROBES_AT_ONCE] for part in (a, b)]
        ).astype(np.float64)
        size = np.linalg.norm(states, axis=2).mean(axis=0)[:, None]
        flat = np.divide(states, size, out=np.zeros_like(states), where=size > 0).reshape(
            len(states), -1
        )
        total += flat @ flat.T
    return total / a.shape[1]


def states_of(atlas: Atlas, width: int, *, spread: bool = False) -> np.ndarray:
    """The probes' states `[l+1, n, d]`; with `spread`, at most `MOST_PROBES`, evenly spaced."""
    count = atlas.probes.shape[1]
    step = -(-count // MOST_PROBES) if spread else 1
    return np.stack([atlas.activations(block)[::step, :width] for block in range(atlas.blocks + 1)])


def _directions(states: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(states, axis=-1, keepdims=True)
    return np.divide(states, length, out=np.zeros_like(states), where=length > 0)


def _mean_score(detail: np.ndarray, nulls: dict[str, np.ndarray]) -> Score:
    resampled = detail.astype(np.float32) @ resampling_weights(detail.shape[2]).T
    return _score(detail.mean(axis=2), nulls, interval_of(resampled))


def _certain(matrix: np.ndarray) -> Score:
    return _score(matrix, {}, np.stack([matrix, matrix]))


def _score(matrix: np.ndarray, nulls: dict[str, np.ndarray], interval: np.ndarray) -> Score:
    """A score that has no value per neuron."""
    return Score(
        matrix.astype(np.float32),
        nulls,
        np.zeros((*matrix.shape, 0), dtype=np.float16),
        interval.astype(np.float32),
    )
