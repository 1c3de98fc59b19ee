"""Superposition compared with a simulation, and the ridge regression with its closed form."""

import numpy as np
import pytest

from frankenmerge.artefacts.recipe import Block
from frankenmerge.planning.prediction import (
    FEATURES,
    FLOOR,
    MOST,
    RIDGE,
    DamageModel,
    States,
    default_model,
    drift,
    features,
    fitted,
    new_family,
    refined,
    seam_damage,
)


@pytest.fixture(scope="module")
def walks() -> dict[str, np.ndarray]:
    """Two donors' states `[l+1, d]`: one probe, so that inner products are plain."""
    generator = np.random.default_rng(0)
    first = generator.standard_normal((6, 32)).cumsum(axis=0)
    return {"x": first, "y": first[:5] + 0.3 * generator.standard_normal((5, 32)).cumsum(axis=0)}


@pytest.fixture(scope="module")
def states(walks) -> States:
    together = np.concatenate([walks["x"], walks["y"]])
    return States({"x": 0, "y": 6}, {"x": 5, "y": 4}, together @ together.T)


def stack(text: str) -> list[Block]:
    return [Block(part[0], int(part[1])) for part in text.split()]


STACKS = [
    "x0 x1 x2 x3 x4",
    "x0 x1 y2 y3",
    "y0 y1 y2 x1 x2 x3 x4",
    "x0 x3 x4",
    "x0 x1 x2 x1 x2 x1 x2 x3 x4",
    "y0 x0 y1 x4",
]


def cosine(x, y) -> float:
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def at_home(blocks, walks, states):
    """The blocks' inputs in their donors, weights of the donors' last states, and their mean."""
    given = np.array([[states.first[block.model] + block.index for block in blocks]])
    ends, home = np.zeros((1, len(states.gram))), 0
    for name, _ in blocks:
        ends[0, states.first[name] + states.blocks[name]] += 1 / len(blocks)
        home = home + walks[name][-1] / len(blocks)
    return given, ends, home


@pytest.mark.parametrize("text", STACKS)
def test_plain_superposition_adds_what_blocks_added_at_home(walks, states, text):
    blocks, roots = stack(text), 0.0
    stream = walks[blocks[0].model][0]
    for name, index in blocks:
        roots += np.sqrt(max(0.0, 1 - cosine(stream, walks[name][index])))
        stream = stream + walks[name][index + 1] - walks[name][index]
    given, ends, home = at_home(blocks, walks, states)
    found = drift(states.gram, given[:, 0], given, ends, lossy=False)
    assert found.roots[0] == pytest.approx(roots, abs=1e-5)
    assert found.final[0] == pytest.approx(max(0, 1 - cosine(stream, home)), abs=1e-9)


@pytest.mark.parametrize("text", STACKS)
def test_lossy_superposition_turns_what_is_lost_into_noise(walks, states, text):
    """Noise is a vector of its own dimension for every block: orthogonal to all else."""
    blocks = stack(text)
    wide = {name: np.pad(walk, ((0, 0), (0, len(blocks)))) for name, walk in walks.items()}
    stream = wide[blocks[0].model][0].copy()
    for step, (name, index) in enumerate(blocks):
        kept = max(0.0, cosine(stream, wide[name][index]))
        added = wide[name][index + 1] - wide[name][index]
        stream = stream + kept * added
        stream[32 + step] += np.sqrt(1 - min(1, kept) ** 2) * np.linalg.norm(added)
    given, ends, home = at_home(blocks, wide, states)
    found = drift(states.gram, given[:, 0], given, ends, lossy=True)
    assert found.final[0] == pytest.approx(max(0, 1 - cosine(stream, home)), abs=1e-7)


def test_a_whole_donor_is_at_home(states):
    np.testing.assert_allclose(
        features([stack("x0 x1 x2 x3 x4"), stack("y0 y1 y2 y3")], states), 0, atol=1e-6
    )


def test_stacks_together_are_as_each_alone(states):
    together = features([stack(text) for text in STACKS], states)
    for row, text in zip(together, STACKS, strict=True):
        np.testing.assert_allclose(row, features([stack(text)], states)[0], atol=1e-12)


def test_influence_that_is_skipped_is_counted(walks, states):
    repeated, skipping = features([stack("x0 x1 x2 x1 x2 x3 x4"), stack("x0 x3 x4")], states)[
        :, FEATURES.index("skipped")
    ]
    assert repeated == 0
    assert skipping == pytest.approx(
        sum(1 - cosine(walks["x"][k], walks["x"][k + 1]) for k in (1, 2))
    )


def test_a_jump_back_over_what_was_skipped_is_counted_once(states):
    once, twice = features([stack("x0 x3 x4"), stack("x0 x3 x0 x3 x4")], states)[
        :, FEATURES.index("skipped")
    ]
    assert once == pytest.approx(twice)


def test_the_table_of_seams_is_what_whole_recipes_are_predicted(states):
    model = default_model()
    table = seam_damage(model, states, "x", "y")
    assert table.shape == (6, 5)
    for i, j in ((1, 0), (2, 2), (5, 3), (1, 3)):
        blocks = [Block("x", index) for index in range(i)] + [
            Block("y", index) for index in range(j, 4)
        ]
        assert table[i, j] == pytest.approx(model.damage(features([blocks], states))[0])


def test_the_ridge_regression_minimises_its_objective():
    generator = np.random.default_rng(1)
    found, share = generator.random((60, len(FEATURES))), generator.random(60)
    damage = np.exp(found @ np.arange(1, len(FEATURES) + 1) - 3) + 0.1 * generator.random(60)
    weights = fitted(found, damage, share)
    share = share / share.sum()
    size, free = np.sqrt(share @ found**2), damage / (1 - damage / MOST)

    def objective(slopes):
        return (
            share @ (np.log(1 + free / FLOOR) - found @ slopes) ** 2
            + RIDGE * ((slopes * size) ** 2).sum()
        )

    least = objective(weights)
    for _ in range(50):
        assert objective(weights + 0.01 * generator.standard_normal(len(FEATURES))) >= least


def test_calibration_finds_a_scale_and_keeps_the_order():
    model = DamageModel(-3.0, (1.0, 0.5, 1.0), (-1.0, 1.0), (-0.2, 0.2))
    found = np.random.default_rng(2).random((16, len(FEATURES)))
    free = 3 * np.exp(-3 + found @ [1.0, 0.5, 1.0]) - FLOOR  # three times as much everywhere
    damage = free / (1 + free / MOST)
    new = refined(model, found, damage, {"texts": ["t"]})
    np.testing.assert_allclose(new.damage(found), damage, rtol=1e-6)
    assert new.spread == pytest.approx((0, 0), abs=1e-6) and new.origin == {"texts": ["t"]}
    assert (np.argsort(new.damage(found)) == np.argsort(model.damage(found))).all()


def test_predictions_of_what_is_lost_approach_a_bound():
    model = DamageModel(np.log(FLOOR), (5.0, 5.0, 2.0), (-1.0, 1.0), (-0.2, 0.2))
    damage = model.damage(np.array([[x, x, x] for x in (0, 0.1, 0.5, 1, 1.4)]))
    assert damage[0] == 0 and (np.diff(damage) > 0).all() and damage[-1] < MOST
    assert damage[1] == pytest.approx(FLOOR * np.expm1(1.2), rel=0.01)


def test_a_whole_donor_is_predicted_no_damage(states):
    whole = features([stack("x0 x1 x2 x3 x4")], states)
    assert default_model().damage(np.round(whole, 6))[0] == pytest.approx(0, abs=1e-9)


def test_the_default_model_names_its_origin():
    origin = default_model().origin
    assert (
        origin["donors"]
        and origin["text"]["sha256"]
        and origin["versions"]["torch"]
        and origin["fingerprints"]
    )
    for low, high in (default_model().spread, default_model().sampled_spread):
        assert low < 0 < high


def test_intervals_hold_what_they_are_around_and_widen_with_it():
    model = default_model()
    for sampled in (False, True):
        damages = [0.0, 0.01, 0.1, 1.0, 5.0]
        ends = [model.interval(damage, sampled=sampled) for damage in damages]
        assert all(low <= damage < high for (low, high), damage in zip(ends, damages, strict=True))
        assert np.all(np.diff([high - low for low, high in ends]) > 0)
    low, high = model.interval(-0.1, sampled=True)
    assert low < -0.1 < high


def test_the_interval_for_a_new_family_holds_nine_of_ten():
    """Families with different means, three of them known: the interval holds for a fourth."""
    generator, held = np.random.default_rng(3), []
    for _ in range(400):
        means = 0.4 * generator.standard_normal(4)
        *seen, new = (mean + 0.2 * generator.standard_normal(50) for mean in means)
        low, high = new_family(seen)
        held.append(np.mean((new >= low) & (new <= high)))
    assert 0.88 < np.mean(held) < 0.98
