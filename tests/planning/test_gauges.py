"""Plans of donors without a common basis: the proposed gauges rotate twins into one basis."""

import json

import pytest
from conftest import resolved, rotated_donor, write_donor

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import read_text
from frankenmerge.planning.gauges import needs_gauge, rotated_where_needed, with_gauges
from frankenmerge.planning.plan import plan
from frankenmerge.planning.search import Constraints
from frankenmerge.splicing.rotation import random_rotation


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A donor, and the same one in another basis."""
    folder = tmp_path_factory.mktemp("twins")
    first = write_donor(folder / "first", seed=3)
    return str(first), str(rotated_donor(first, folder / "second", random_rotation(16, 1)))


@pytest.fixture(scope="module")
def atlases(twins):
    return [analyze(open_checkpoint(name)) for name in twins]


def test_twins_in_two_bases_need_a_gauge_and_relatives_in_one_do_not(atlases):
    across, within = align(*atlases), align(atlases[0], atlases[0])
    assert needs_gauge(across) and needs_gauge(across.transposed) and not needs_gauge(within)
    given, gauged = rotated_where_needed([across, within])
    assert gauged == {frozenset(across.donors)}
    assert given[0].gram is across.rotated_gram and given[1] is within


def test_a_plan_of_twins_rotates_one_into_the_other_s_basis(atlases, twins, text):
    best = plan([align(*atlases)], Constraints(4, 1, 1, 0, 0, None))[0]
    assert [part.gauge and part.gauge.to for part in best.recipe.parts] == [None, "previous"]
    assert best.seams[0].gauged and best.seams[0].by_chance
    assert best.seams[0].scores["gauge"] > 0.99 > best.seams[0].nulls["gauge"]["permuted_probes"]
    bench = Bench([read_text(text)], {name: open_checkpoint(name) for name in twins})
    alone = bench.checkpoint(twins[0]).total.nats_per_token
    bare = recipe_of(best.recipe.blocks)
    measured: list[int] = []
    rotated, raw = (
        result.total.nats_per_token
        for result in bench.splices(
            [resolved(best.recipe), resolved(bare)], advance=measured.append
        )
    )
    assert sum(measured) == 2  # each recipe once on the one text: fitting a gauge is costly
    assert best.predicted_damage < 0.05
    assert rotated == pytest.approx(alone, abs=1e-3)
    # Untrained donors predict little either way; rotated, the loss is fifty times smaller.
    assert abs(raw - alone) > 0.05


def test_every_slice_in_another_basis_is_rotated_and_no_other():
    recipe = recipe_of(
        [
            Block("a", 0),
            Block("b", 1),
            Block("c", 2),
            Block("a", 3),
            Block("b", 2),
            Block("d", 3),
            Block("b", 3),
        ]
    )
    pairs = [frozenset(pair) for pair in (("a", "b"), ("a", "c"), ("b", "d"))]
    gauges = [part.gauge and part.gauge.to for part in with_gauges(recipe, pairs).parts]
    assert gauges == [None, "previous", "base", None, "previous", None, "previous"]


def test_the_command_writes_the_gauge_and_measures_with_it(run, twins, text, tmp_path):
    assert run("align", *twins, "-o", tmp_path / "ab.alignment.safetensors")[0] == 0
    asked = (
        "--depth",
        4,
        "--max-seams",
        1,
        "--min-slice",
        1,
        "--protect-first",
        0,
        "--protect-last",
        0,
        "--verify",
        text,
        "--json",
    )
    code, out, _ = run(
        "plan", tmp_path / "ab.alignment.safetensors", "-o", tmp_path / "recipe.yaml", *asked
    )
    entry = json.loads(out)["plans"][0]
    assert code == 0 and abs(entry["measured_damage"]) < 1e-3
    assert load_recipe(tmp_path / "recipe.yaml").parts[1].gauge
    assert [(seam["gauged"], seam["by_chance"]) for seam in entry["seams"]] == [(True, True)]
