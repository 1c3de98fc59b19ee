"""Plans and their evidence, held against the alignments they were made from."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.artefacts.alignment import Alignment, Score, load_alignment, save_alignment
from frankenmerge.artefacts.recipe import Block
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.planning.gauges import rotated_where_needed
from frankenmerge.planning.plan import front, plan
from frankenmerge.planning.prediction import FLOOR, default_model, features, seam_damage
from frankenmerge.planning.search import Constraints
from frankenmerge.planning.states import states_of


@pytest.fixture(scope="module")
def alignments(donors) -> dict[str, Alignment]:
    atlases = {name: analyze(open_checkpoint(str(donors[name]))) for name in ("a", "b", "deep")}
    return {
        f"{a}-{b}": align(atlases[a], atlases[b])
        for a, b in (("a", "b"), ("a", "deep"), ("b", "deep"), ("a", "a"))
    }


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
    # Every block moves the stream by a little, the second donor's a little otherwise.
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
    raise AssertionError(f"a seam from {after} to {before}, which no alignment tells about")


def places(seam, given) -> tuple[Alignment, int, int]:
    """Of a seam: its alignment, blocks of the left donor before it, blocks of the entered donor left out."""
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
        expected = max(
            0,
            np.exp(model.intercept + sum(w * v for w, v in zip(model.weights, x, strict=True)))
            - FLOOR,
        )
        assert entry.predicted_damage == pytest.approx(expected)
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
            told = getattr(seam, which)
            for name in ("jaccard", "correlation"):
                assert [entry["scores"][name] for entry in told] == pytest.approx(
                    detail[name][neurons], abs=6e-5
                )
            for entry in told:
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
    told = json.loads(json.dumps(seam.as_json(), allow_nan=False))
    assert set(told["scores"]) == {"argmax", "correlation", "greedy", "jaccard"}
    for entry in told["agree"] + told["disagree"]:
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
        told = json.loads(json.dumps(entry.as_json(), allow_nan=False))
        assert told["depth"] == constraints.depth and told["summary"] == str(entry.recipe)
        assert told["predicted_damage"] == entry.predicted_damage and told["interval"] == list(
            entry.interval
        )


@pytest.fixture
def written(alignments, tmp_path) -> Path:
    save_alignment(alignments["a-deep"], tmp_path / "ad.alignment.safetensors")
    return tmp_path / "ad.alignment.safetensors"


def test_the_command_line_writes_recipes_that_pass_check(written, run, tmp_path):
    code, out, _ = run(
        "plan", written, "-o", tmp_path / "recipe.yaml", "--depth", 8, "--top", 3, "--json"
    )
    told = json.loads(out)
    paths = [tmp_path / name for name in ("recipe.yaml", "recipe.2.yaml", "recipe.3.yaml")]
    assert code == 0 and told["written"] == [str(path) for path in paths]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "ad.alignment.safetensors",
        "recipe.2.yaml",
        "recipe.3.yaml",
        "recipe.evidence.json",
        "recipe.yaml",
    ]
    expected = plan([load_alignment(written)], Constraints(8), top=3)
    for path, entry in zip(paths, expected, strict=True):
        assert load_recipe(path) == entry.recipe
        code, out, _ = run("check", path, "--json")
        assert code == 0 and json.loads(out)["depth"] == 8


def test_the_evidence_beside_the_recipes_is_what_was_printed(written, run, tmp_path):
    code, out, _ = run("plan", written, "-o", tmp_path / "recipe.yaml", "--top", 2, "--json")
    told, evidence = json.loads(out), json.loads((tmp_path / "recipe.evidence.json").read_text())
    assert code == 0
    assert {key: told[key] for key in evidence} == evidence
    assert evidence["plans"] == [
        entry.as_json() for entry in plan([load_alignment(written)], Constraints(9), top=2)
    ]
    assert evidence["constraints"] == {
        "depth": 9,
        "max_seams": 4,
        "min_slice": 2,
        "protect_first": 1,
        "protect_last": 1,
    }
    assert evidence["model"]["origin"]["donors"]


def test_planning_twice_writes_the_same_bytes(written, run, tmp_path):
    for folder in ("one", "two"):
        assert run("plan", written, "-o", tmp_path / folder / "recipe.yaml", "--top", 3)[0] == 0
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_the_command_line_shows_the_plan_and_its_evidence(written, run, tmp_path):
    code, out, _ = run("plan", written, "-o", tmp_path / "recipe.yaml", "--depth", 8)
    entry = plan([load_alignment(written)], Constraints(8))[0]
    assert code == 0 and f"{entry.predicted_damage:.3f}" in out
    for number, seam in enumerate(entry.seams, 1):
        after, before = (f"{Path(block.model).name} block {block.index}" for block in seam.seam)
        assert f"Seam {number}: {after} -> {before}" in out
        assert f"{seam.scores['jaccard']:.3f}" in out


def test_options_reach_the_planner(written, run, tmp_path):
    options = (
        "--depth",
        8,
        "--max-seams",
        1,
        "--min-slice",
        3,
        "--protect-first",
        0,
        "--protect-last",
        2,
    )
    assert run("plan", written, "-o", tmp_path / "recipe.yaml", *options)[0] == 0
    assert (
        load_recipe(tmp_path / "recipe.yaml")
        == plan([load_alignment(written)], Constraints(8, 1, 3, 0, 2))[0].recipe
    )


def test_a_plan_that_cannot_be_is_one_message_and_no_file(written, run, tmp_path):
    code, out, err = run("plan", written, "-o", tmp_path / "recipe.yaml", "--depth", 100)
    assert (code, out) == (1, "")
    assert "depth 100" in err and "Traceback" not in err
    assert not (tmp_path / "recipe.yaml").exists()


def test_three_donors_are_planned_from_three_alignments(alignments, run, tmp_path):
    paths = []
    for name in ("a-b", "a-deep", "b-deep"):
        paths.append(tmp_path / f"{name}.alignment.safetensors")
        save_alignment(alignments[name], paths[-1])
    assert run("plan", *paths, "-o", tmp_path / "recipe.yaml", "--depth", 9)[0] == 0
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert {Path(name).name for name in recipe.donors} == {"a", "b", "deep"}
    assert run("check", tmp_path / "recipe.yaml")[0] == 0


def test_verified_plans_are_ranked_by_what_was_measured(written, run, tmp_path, text):
    measured_on = ("--verify", text, "--calibrate", text)
    code, out, _ = run(
        "plan",
        written,
        "-o",
        tmp_path / "recipe.yaml",
        "--depth",
        8,
        "--top",
        4,
        *measured_on,
        "--json",
    )
    told = json.loads(out)
    assert code == 0 and told["model"]["origin"]["splices"] == 16
    measured = [entry["measured_damage"] for entry in told["plans"]]
    assert len(measured) == 4 and measured == sorted(measured)
    code, out, _ = run("evaluate", tmp_path / "recipe.yaml", "--text", text, "--json")
    (promise,) = json.loads(out)["predictions"]
    assert promise["measured"] == pytest.approx(measured[0], abs=1e-6)
    assert promise["predicted"] == told["plans"][0]["predicted_damage"]
    assert promise["held"] == (promise["low"] <= promise["measured"] <= promise["high"])


def test_plans_are_predicted_from_what_they_do_on_drawn_tokens(donors, run, tmp_path, text):
    from frankenmerge.evaluation.sampled_damage import damage_on_sampled
    from frankenmerge.models.loading import load_model

    alignment, recipe = tmp_path / "ad.alignment.safetensors", tmp_path / "recipe.yaml"
    code, out, _ = run(
        "align", donors["a"], donors["deep"], "-o", alignment, "--drawn", "--exchange", "--json"
    )
    exchanged = load_alignment(alignment).exchange
    assert code == 0 and load_alignment(alignment).provenance["predicted_from"] == "drawn tokens"
    assert [matrix.shape for pair in exchanged for matrix in pair] == [
        (4, 6),
        (6, 4),
        (4, 4),
        (6, 6),
    ]
    np.testing.assert_allclose(
        json.loads(out)["exchange"]["replacement"][0], exchanged.replacement[0]
    )
    code, out, _ = run(
        "plan",
        alignment,
        "-o",
        recipe,
        "--depth",
        8,
        "--top",
        4,
        "--verify",
        "drawn",
        "--damp",
        "drawn",
        "--json",
    )
    told = json.loads(out)
    assert code == 0 and [entry["basis"] for entry in told["plans"]] == ["drawn"] * 4
    damage = told["damping"]["damage"]
    best = min(damage, key=damage.__getitem__)
    assert told["damping"]["kept"] == (None if best == "none" else best)
    predicted = [entry["predicted_damage"] for entry in told["plans"]]
    assert predicted == sorted(predicted) and predicted[0] == pytest.approx(damage[best], rel=1e-4)
    opened = {str(donors[name]): open_checkpoint(str(donors[name])) for name in ("a", "deep")}
    found = damage_on_sampled(
        [load_recipe(recipe)], opened, {name: load_model(donor) for name, donor in opened.items()}
    )[0]
    assert found == pytest.approx(damage[best], rel=1e-4)
    code, out, _ = run("evaluate", recipe, "--text", text, "--json")
    assert [promise["predicted"] for promise in json.loads(out)["predictions"]] == [
        told["plans"][0]["predicted_damage"]
    ]


def test_calibrated_on_drawn_tokens_the_model_says_so(written, run, tmp_path):
    code, out, _ = run(
        "plan",
        written,
        "-o",
        tmp_path / "recipe.yaml",
        "--depth",
        8,
        "--calibrate",
        "drawn",
        "--json",
    )
    assert code == 0 and json.loads(out)["model"]["origin"]["texts"] == ["drawn"]


def test_a_parameter_budget_is_kept_to_and_used(written, donors, run, tmp_path):
    from frankenmerge.donors.checkpoint import open_checkpoint as opened

    recipe, budget = tmp_path / "recipe.yaml", 20_000
    block = sum(
        np.prod(tensor.shape)
        for name, tensor in opened(str(donors["a"])).tensors.items()
        if ".layers.0." in name
    )
    assert run("plan", written, "-o", recipe, "--parameters", "20K")[0] == 0
    code, out, _ = run("check", recipe, "--json")
    assert code == 0 and budget - block < json.loads(out)["parameters"] <= budget


@pytest.mark.parametrize(
    "options, told",
    [
        (("--parameters", "2K"), "at least"),
        (("--parameters", "20K", "--depth", 8), "either --depth or --parameters"),
        (("--parameters", "many"), "11B"),
        (("--verify", "drawn", "--verify", "other.txt"), "stands alone"),
    ],
)
def test_budgets_and_texts_that_cannot_be_are_refused(written, run, tmp_path, options, told):
    code, out, err = run("plan", written, "-o", tmp_path / "recipe.yaml", *options)
    assert code != 0 and out == "" and told in err and "Traceback" not in err
    assert not (tmp_path / "recipe.yaml").exists()


def test_damping_on_a_text_is_kept_where_it_loses_less_and_moves_the_prediction(
    written, run, tmp_path, text
):
    options = ("plan", written, "-o", tmp_path / "recipe.yaml", "--depth", 8, "--json")
    plain = json.loads(run(*options)[1])["plans"][0]
    code, out, _ = run(*options, "--damp", text)
    told = json.loads(out)
    (entry,), damage = told["plans"], told["damping"]["damage"]
    best = min(damage, key=damage.__getitem__)
    assert code == 0 and set(damage) == {"none", "1/n", "1/sqrt(n)", "norms"}
    assert entry["measured_damage"] == damage[best] and told["damping"]["kept"] == (
        None if best == "none" else best
    )
    assert entry["predicted_damage"] == pytest.approx(
        max(0, plain["predicted_damage"] + damage[best] - damage["none"])
    )
    code, out, _ = run("evaluate", tmp_path / "recipe.yaml", "--text", text, "--json")
    (promise,) = json.loads(out)["predictions"]
    assert promise["measured"] == pytest.approx(damage[best], abs=1e-5)
