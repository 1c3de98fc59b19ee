"""Plans and their evidence, compared with the alignments that they are computed from."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from frankenmerge.artefacts.alignment import Alignment, Score
from frankenmerge.artefacts.recipe import Block
from frankenmerge.errors import FrankenmergeError
from frankenmerge.planning.gauges import rotated_where_needed
from frankenmerge.planning.plan import front, plan
from frankenmerge.planning.prediction import FLOOR, MOST, default_model, features, seam_damage
from frankenmerge.planning.search import Constraints
from frankenmerge.planning.states import states_of


def invented(names=("x", "y"), blocks=(5, 5), seed=0, **changed: np.ndarray) -> Alignment:
    """An alignment of random scores; `changed` gives the matrix of a score."""
    generator = np.random.default_rng(seed)
    shape = blocks[0] + 1, blocks[1] + 1

    def score(name):
        matrix = changed.get(name, generator.random(shape)).astype(np.float32)
        nulls = {
            null: generator.random(shape, dtype=np.float32) / 10
            for null in ("permuted_probes", "permuted_neurons")
        }
        return Score(matrix, nulls, generator.random((*shape, 16)).astype(np.float16))

    scores = {name: score(name) for name in ("argmax", "correlation", "jaccard")}
    tokens = tuple(
        generator.integers(0, 48, (count + 1, 16, 10), dtype=np.int32) for count in blocks
    )
    # Every block moves the stream a little; the second donor's blocks in another direction.
    walks = [generator.standard_normal((count + 1, 64)).cumsum(axis=0) for count in blocks]
    states = np.concatenate([walks[0], walks[1] * 0.2 + walks[0][:1]])
    prints = tuple(f"print of {name}" for name in names)
    return Alignment(
        names, prints, (16, 16), scores, tokens, [f"t{n}" for n in range(48)], {}, states @ states.T
    )


def directed(given: list[Alignment], after: str, before: str) -> Alignment:
    """The alignment of a seam, A left and B entered."""
    for alignment in given:
        if alignment.donors == (after, before):
            return alignment
        if alignment.donors == (before, after):
            return alignment.transposed
    raise AssertionError(f"no alignment for a seam from {after} to {before}")


def places(seam, given) -> tuple[Alignment, int, int]:
    """The alignment of a seam, the blocks before it and the index of the first block after it."""
    return (
        directed(given, seam.seam.after.model, seam.seam.before.model),
        seam.seam.after.index + 1,
        seam.seam.before.index,
    )


GIVEN = {
    "two donors": (["a-b"], Constraints(7, min_slice=1)),
    "the other way round": (["a-deep"], Constraints(9)),
    "with itself": (["a-b", "a-a"], Constraints(8)),
    "one donor": (["a-a"], Constraints(7, min_slice=1)),
    "three donors": (["a-b", "a-deep", "b-deep"], Constraints(9)),
}


@pytest.fixture(params=GIVEN)
def case(request, alignments):
    names, constraints = GIVEN[request.param]
    return [alignments[name] for name in names], constraints


def test_predicted_damage_is_the_model_s_of_the_whole_recipe(case):
    given, constraints = case
    model, states = default_model(), states_of(rotated_where_needed(given)[0])
    plans = plan(given, constraints, top=5)
    assert len(plans) == 5
    for entry in plans:
        assert [seam.seam for seam in entry.seams] == entry.recipe.seams
        x = features([entry.recipe.blocks], states)[0]
        free = max(
            0,
            np.exp(model.intercept + sum(w * v for w, v in zip(model.weights, x, strict=True)))
            - FLOOR,
        )
        assert entry.predicted_damage == pytest.approx(1 / (1 / free + 1 / MOST))
        low, high = entry.interval
        assert 0 <= low <= entry.predicted_damage <= high
        for seam in entry.seams:
            alignment, i, j = places(seam, given)
            a, b = (list(states.first).index(block.model) for block in seam.seam)
            names = list(states.first)
            assert seam.cost == pytest.approx(seam_damage(model, states, names[a], names[b])[i, j])


def test_the_cheapest_come_first_and_none_twice(case):
    given, constraints = case
    plans = plan(given, constraints, top=8)
    damages = [entry.predicted_damage for entry in plans]
    assert damages == sorted(damages)
    assert len({str(entry.recipe) for entry in plans}) == len(plans) == 8
    assert plan(given, constraints)[0].recipe == plans[0].recipe


def test_plans_keep_to_their_constraints_and_use_every_donor(case):
    given, constraints = case
    blocks = {
        name: count
        for alignment in given
        for name, count in zip(alignment.donors, alignment.blocks, strict=True)
    }
    for entry in plan(given, constraints, top=5):
        assert len(entry.recipe.blocks) == constraints.depth
        assert len(entry.recipe.seams) <= constraints.max_seams
        assert all(
            stop - start >= constraints.min_slice
            for start, stop in (source.layer_range for source in entry.recipe.sources)
        )
        assert set(entry.recipe.donors) == set(blocks)
        assert entry.recipe.blocks[0].index == 0
        assert entry.recipe.blocks[-1].index == blocks[entry.recipe.blocks[-1].model] - 1
        inner = [
            *(seam.before for seam in entry.recipe.seams),
            *(seam.after for seam in entry.recipe.seams),
        ]
        for block in inner:
            at_its_end = block == entry.recipe.blocks[-1] or block == entry.recipe.blocks[0]
            assert at_its_end or 0 < block.index < blocks[block.model] - 1


def test_the_evidence_is_what_the_alignment_says_at_the_seam(case):
    given, constraints = case
    for seam in (seam for entry in plan(given, constraints, top=5) for seam in entry.seams):
        alignment, i, j = places(seam, given)
        assert seam.skipped == j - i
        assert set(seam.scores) == set(seam.nulls) == set(alignment.scores)
        for name, score in alignment.scores.items():
            assert seam.scores[name] == pytest.approx(score.matrix[i, j], abs=6e-5)
            assert seam.nulls[name] == pytest.approx(
                {null: matrix[i, j] for null, matrix in score.nulls.items()}, abs=6e-5
            )


def test_the_neurons_shown_are_those_that_agree_most_and_least(case):
    given, constraints = case
    for seam in plan(given, constraints)[0].seams:
        alignment, i, j = places(seam, given)
        detail = {
            name: score.detail[i, j].astype(float) for name, score in alignment.scores.items()
        }
        ranked = sorted(
            range(16), key=lambda neuron: (detail["jaccard"][neuron], detail["correlation"][neuron])
        )
        shown = {"agree": ranked[::-1][:5], "disagree": ranked[:5]}
        for which, neurons in shown.items():
            record = getattr(seam, which)
            for name in ("jaccard", "correlation"):
                assert [entry["scores"][name] for entry in record] == pytest.approx(
                    detail[name][neurons], abs=6e-5
                )
            for entry in record:
                rows = (
                    alignment.tokens[0][i, entry["neuron"]],
                    alignment.tokens[1][j, entry["neuron"]],
                )
                assert entry["tokens"] == [
                    [alignment.vocabulary[token] for token in row[:4]] for row in rows
                ]


def test_a_plan_is_the_best_of_all_single_seams():
    alignment = invented(blocks=(6, 6))
    entry = plan([alignment], Constraints(8, max_seams=1))[0]
    model, states = default_model(), states_of([alignment])
    possible = {}
    for i in range(2, 6):
        j = i - 2  # 8 blocks: the first i of one, those after j of the other
        if j >= 1:
            for a, b in (("x", "y"), ("y", "x")):
                blocks = [Block(a, index) for index in range(i)] + [
                    Block(b, index) for index in range(j, 6)
                ]
                possible[a, i] = model.damage(features([blocks], states))[0]
    first = min(possible, key=possible.__getitem__)
    assert entry.predicted_damage == pytest.approx(possible[first])
    assert (entry.recipe.sources[0].model, entry.recipe.sources[0].layer_range[1]) == first


def test_an_alignment_of_an_earlier_version_is_refused():
    with pytest.raises(FrankenmergeError, match="align the donors again"):
        plan([replace(invented(), gram=None)], Constraints(6))


def test_plans_that_must_differ_do():
    plans = plan([invented(blocks=(8, 8))], Constraints(12), top=4, differ=3)
    blocks = [Counter(entry.recipe.blocks) for entry in plans]
    assert len(plans) == 4
    assert all((one - other).total() >= 3 for k, one in enumerate(blocks) for other in blocks[:k])


def test_required_avoided_and_shared_blocks_are_kept_to():
    constraints = Constraints(
        10,
        required=frozenset({("x", 3)}),
        avoided=frozenset({("y", 2)}),
        shares={"x": (0.5, 0.6)},
        max_back=4,
    )
    plans = plan([invented(blocks=(6, 6))], constraints, top=8)
    assert plans
    for entry in plans:
        blocks = entry.recipe.blocks
        assert Block("x", 3) in blocks and Block("y", 2) not in blocks
        assert 5 <= sum(block.model == "x" for block in blocks) <= 6
        assert all(seam.after.index + 1 - seam.before.index <= 4 for seam in entry.recipe.seams)


@pytest.mark.parametrize(
    "wrong",
    [
        {"required": frozenset({("z", 1)})},
        {"avoided": frozenset({("x", 9)})},
        {"shares": {"z": (0, 1)}},
    ],
)
def test_constraints_on_what_is_not_there_are_refused(wrong):
    with pytest.raises(FrankenmergeError, match="z|9"):
        plan([invented()], Constraints(6, **wrong))


def test_the_front_holds_the_best_of_every_depth():
    alignment = invented(blocks=(4, 4))
    entries = front([alignment], Constraints(6, 1))
    assert [len(entry.recipe.blocks) for entry in entries] == [
        4,
        5,
        6,
    ]  # one block less would put the seam among protected ones
    for entry in entries:
        assert (
            entry.seams[0].cost
            == plan([alignment], Constraints(len(entry.recipe.blocks), 1))[0].seams[0].cost
        )


def test_neurons_that_a_search_left_out_have_no_score_by_it():
    alignment = invented()
    detail = np.full((6, 6, 16), np.nan, np.float16)
    detail[:, :, [2, 9]] = 0.5
    alignment.scores["greedy"] = alignment.scores["argmax"]._replace(detail=detail)
    (seam,) = plan([alignment], Constraints(6, 1))[0].seams
    record = json.loads(json.dumps(seam.as_json(), allow_nan=False))
    assert set(record["scores"]) == {"argmax", "correlation", "greedy", "jaccard"}
    for entry in record["agree"] + record["disagree"]:
        assert entry["scores"].get("greedy") == (0.5 if entry["neuron"] in (2, 9) else None)
    plain = plan([invented()], Constraints(6, 1))[0].seams[0]
    assert [entry["neuron"] for entry in seam.agree] == [entry["neuron"] for entry in plain.agree]


@pytest.mark.parametrize(
    "jaccard, null, by_chance", [(0.1, 0.06, True), (0.5, 0.06, False), (0.0, 0.0, True)]
)
def test_a_seam_that_agrees_no_better_than_unrelated_neurons_says_so(jaccard, null, by_chance):
    alignment = invented(jaccard=np.full((6, 6), jaccard))
    alignment.scores["jaccard"].nulls["permuted_neurons"][:] = null
    assert [seam.by_chance for seam in plan([alignment], Constraints(6, 1))[0].seams] == [by_chance]


def test_an_alignment_may_be_given_either_way_round():
    alignment = invented(blocks=(5, 6))
    there, back = (
        plan([given], Constraints(8), top=20) for given in (alignment, alignment.transposed)
    )
    assert {str(entry.recipe): entry.predicted_damage for entry in there} == pytest.approx(
        {str(entry.recipe): entry.predicted_damage for entry in back}
    )


def test_the_same_pair_twice_is_refused_or_judged_by_one_of_the_two():
    one, two = invented(seed=1), invented(seed=2)
    constraints = Constraints(9, 3)
    try:
        both = plan([one, two], constraints, top=10)
    except FrankenmergeError:
        return
    damages = [entry.predicted_damage for entry in both]
    alone = [
        [entry.predicted_damage for entry in plan([given], constraints, top=10)]
        for given in (one, two)
    ]
    assert damages in alone


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(100),
        Constraints(3),
        Constraints(6, 0),
        Constraints(6, 4, 4),
        Constraints(6, 4, 2, 3, 3),
    ],
)
def test_what_no_recipe_can_keep_to_is_refused(alignments, constraints):
    with pytest.raises(FrankenmergeError) as refused:
        plan([alignments["a-b"]], constraints)
    (fault,) = refused.value.faults
    assert f"depth {constraints.depth}" in fault.expected and "4 blocks" in fault.found


def test_donors_that_no_alignment_connects_are_refused():
    with pytest.raises(FrankenmergeError):
        plan([invented(("x", "y")), invented(("v", "w"))], Constraints(12))


def test_one_name_for_two_checkpoints_is_refused(alignments):
    other = replace(
        alignments["a-deep"], fingerprints=("another", alignments["a-deep"].fingerprints[1])
    )
    with pytest.raises(FrankenmergeError) as refused:
        plan([alignments["a-b"], other], Constraints(6))
    assert [fault.place for fault in refused.value.faults] == [alignments["a-b"].donors[0]]


def test_no_more_plans_are_given_than_there_are():
    plans = plan([invented(blocks=(3, 3))], Constraints(4, 1), top=50)
    assert sorted(str(entry.recipe) for entry in plans) == ["x[0:2] y[1:3]", "y[0:2] x[1:3]"]


def test_a_plan_as_json_is_json(case):
    given, constraints = case
    for entry in plan(given, constraints):
        record = json.loads(json.dumps(entry.as_json(), allow_nan=False))
        assert record["depth"] == constraints.depth and record["summary"] == str(entry.recipe)
        assert record["predicted_damage"] == entry.predicted_damage and record["interval"] == list(
            entry.interval
        )
