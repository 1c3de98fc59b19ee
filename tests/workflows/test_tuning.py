"""`tune`: true gradients, known best weights, nothing worse than before, and what is refused."""

import json
import sys
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import write_donor
from relatives import noisy, opened, text_from

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import Text
from frankenmerge.evaluation.domains import split, text_domain
from frankenmerge.evaluation.gains import losses_together, mean_loss
from frankenmerge.planning.numbers import Per, numbers_of, refined
from frankenmerge.progress import silent
from frankenmerge.splicing.resolve import resolve
from frankenmerge.workflows.gaining import domains_on, parts_of
from frankenmerge.workflows.tuning import TuneOptions, _Gradient, _Tuning, tune


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A donor, a damaged copy of it, another one, and a text that the first one generated."""
    root = tmp_path_factory.mktemp("planted")
    sound = write_donor(root / "sound", seed=1)
    return {
        "sound": sound,
        "damaged": noisy(sound, root / "damaged", 0.5, seed=1),
        "other": noisy(sound, root / "other", 0.1, seed=2),
        "text": text_from(sound, 64),
    }


def recipe(method: str, *models: dict[str, Any], **fields: Any) -> Recipe:
    return Recipe.model_validate({"merge_method": method, "models": list(models)} | fields)


def model(path: object, **parameters: Any) -> dict[str, Any]:
    return {"model": str(path)} | ({"parameters": parameters} if parameters else {})


def stack(path: object, *scales: tuple[int, int, float]) -> Recipe:
    slices = [
        {
            "sources": [
                {
                    "model": str(path),
                    "layer_range": [start, stop],
                    "parameters": {"scale": [{"filter": "o_proj", "value": scale}, {"value": 1}]},
                }
            ]
        }
        for start, stop, scale in scales
    ]
    return Recipe.model_validate({"merge_method": "passthrough", "slices": slices})


def smooth_recipes(planted) -> dict[str, Recipe]:
    sound, damaged, other = (planted[name] for name in ("sound", "damaged", "other"))
    return {
        "average": recipe("linear", model(sound, weight=0.6), model(damaged, weight=0.5)),
        "a donor left out": recipe("linear", model(sound, weight=1), model(damaged, weight=0)),
        "gradient": recipe(
            "linear",
            model(sound, weight=[{"filter": "mlp", "value": [0.2, 0.9]}, {"value": 0.5}]),
            model(damaged, weight=0.4),
        ),
        "task arithmetic": recipe(
            "task_arithmetic",
            model(damaged, weight=0.5),
            model(other, weight=0.3),
            base_model=str(sound),
            parameters={"lambda": 0.9},
        ),
        "slerp": recipe(
            "slerp",
            model(sound),
            model(damaged),
            base_model=str(sound),
            parameters={"t": [{"filter": "attn", "value": [0.3, 0.8]}, {"value": 0.5}]},
        ),
        "at the end of a range": recipe(
            "slerp",
            model(sound),
            model(damaged),
            base_model=str(sound),
            parameters={"t": [0.5, 1]},
        ),
        "damped stack": stack(sound, (0, 3, 1), (1, 4, 0.4)),
    }


CASES = [
    "average",
    "a donor left out",
    "gradient",
    "task arithmetic",
    "slerp",
    "at the end of a range",
    "damped stack",
]


def compare_gradient(given: Recipe, per: Per, ends: list[str]) -> None:
    """Compare the gradient on all of a text with differences of its loss."""
    donors = opened(*given.donors)
    start = refined(given, per, 4, parts_of(donors, None).maps, ends)
    numbers = numbers_of(start)
    letters = np.random.default_rng(0).integers(1, 48, 7 * 39)
    domains = [text_domain("t", letters, 0, 40)]  # all of it is one batch
    bench = Bench((), donors)
    tuning = _Tuning(bench, start, numbers, domains, domains, TuneOptions("sampled"), silent)
    gradient = _Gradient(tuning)
    assert gradient.complete
    values = np.array([number.value for number in numbers])
    found = gradient.at(values, 1)

    def loss(place: int, change: float) -> float:
        moved = values.copy()
        moved[place] += change
        splice = tuning.splice(moved, exact=True)
        return mean_loss(losses_together([splice], bench.assemble, domains).sums[0])

    # The ends, and a few others.
    generator = np.random.default_rng(1)
    outside = [place for place, number in enumerate(numbers) if number.path[-1] == "value"]
    places = {*outside[:4], *generator.permutation(len(values))[:4].tolist()}
    largest = np.abs(found).max()
    for place in places if per == "map" else range(len(values)):
        parameter, step = numbers[place].parameter, 1e-3
        # At the end of a range the difference is taken to one side.
        up = step if values[place] + step <= parameter.high else 0.0
        down = step if values[place] - step >= parameter.low else 0.0
        expected = (loss(place, up) - loss(place, -down)) / (up + down)
        assert found[place] == pytest.approx(expected, rel=0.05, abs=0.01 * largest + 2e-4), place


@pytest.mark.parametrize("per", ["setting", "map"])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_loss(planted, case, per):
    compare_gradient(smooth_recipes(planted)[case], per, ["embed_tokens", "lm_head"])


@pytest.mark.parametrize("pair, ends", [("gh", ["wte", "wpe"]), ("ba", ["embed_tokens"])])
def test_a_tied_heads_part_of_the_gradient_is_the_embeddings(donors, pair, ends):
    models = (
        model(donors[name], weight=weight) for name, weight in zip(pair, (0.6, 0.4), strict=True)
    )
    compare_gradient(recipe("linear", *models), "map", ends)


def stopping_losses(recipes, donors, text, seed=0) -> list[float]:
    """On the part of the text that says when to stop."""
    bench = Bench((), donors)
    domains = domains_on([text], bench, list(donors), seed, times=2)
    stopping = split(domains, 4)[1]
    splices = [resolve(each, donors) for each in recipes]
    return [mean_loss(each) for each in losses_together(splices, bench.assemble, stopping).sums]


@pytest.mark.parametrize("per", ["setting", "block"])
def test_the_weight_of_a_damaged_copy_falls(planted, per):
    given = recipe(
        "linear", model(planted["sound"], weight=0.5), model(planted["damaged"], weight=0.5)
    )
    donors, text = opened(*given.donors), Text("t", planted["text"])
    found = tune(given, TuneOptions([text], per, steps=30), opened=donors)
    assert found.gain.nats > 0.01 and found.gain.interval[0] > 0
    assert found.after < found.before
    assert found.best_donor == str(planted["sound"])
    assert found.over_donor.nats == pytest.approx(found.best_nats - found.after)
    assert found.gain.nats == pytest.approx(found.before - found.after)
    before, after = stopping_losses([given, found.recipe], donors, text)
    assert after < before
    assert found.recipe.models
    if per == "setting":
        sound, damaged = (whole.parameters["weight"] for whole in found.recipe.models)
        assert sound / (sound + damaged) > 0.7
        assert found.numbers == 2
    else:
        assert found.numbers == 2 * (2 + 4)


def test_where_nothing_is_better_the_recipe_stays(planted):
    # On its own text no other model is better than the donor: the others' weight is 0 already.
    given = recipe("linear", model(planted["sound"], weight=1), model(planted["damaged"], weight=0))
    donors, text = opened(*given.donors), Text("t", planted["text"])
    found = tune(given, TuneOptions([text], steps=10), opened=donors)
    before, after = stopping_losses([given, found.recipe], donors, text)
    assert after <= before
    assert found.after == pytest.approx(found.before, abs=0.02)


def ties(planted) -> Recipe:
    return recipe(
        "ties",
        model(planted["damaged"], weight=0.5, density=0.9),
        model(planted["other"], weight=0.5, density=0.5),
        base_model=str(planted["sound"]),
        parameters={"normalize": False},
    )


def test_densities_are_searched_and_one_seed_finds_the_same(planted):
    pytest.importorskip("cma", reason="the package cma is not installed")
    given, text = ties(planted), Text("t", planted["text"])
    donors = opened(*given.donors)
    one, again = (
        tune(given, TuneOptions([text], steps=3, seed=5), opened=donors) for _ in range(2)
    )
    assert one.recipe.dump() == again.recipe.dump() and one.gain == again.gain
    assert one.numbers == 4
    before, after = stopping_losses([given, one.recipe], donors, text, 5)
    assert after < before
    assert one.recipe.models
    for whole in one.recipe.models:
        assert whole.parameters and 0 <= whole.parameters["density"] <= 1


def test_without_cma_the_message_says_how_to_get_it(planted, monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(Exception, match=r"pip install 'frankenmerge\[tune\]'"):
        tune(ties(planted), TuneOptions([Text("t", planted["text"])], steps=1))


def written_files(planted, tmp_path, given: Recipe):
    path, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    path.write_text(given.dump())
    text.write_text(planted["text"])
    return path, text


def test_the_command_line(planted, run, tmp_path):
    given = recipe(
        "linear", model(planted["sound"], weight=0.5), model(planted["damaged"], weight=0.5)
    )
    path, text = written_files(planted, tmp_path, given)
    output = tmp_path / "tuned.yaml"
    options = ("--on", text, "--steps", 10, "-o", output)
    code, out, err = run("tune", path, *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found.keys() == {
        *("recipe", "before", "after", "gain", "interval", "steps", "numbers", "seconds"),
        *("best_donor", "gain_over_best_donor", "interval_over_best_donor"),
    }
    assert load_recipe(output).model_dump(exclude_none=True) == found["recipe"]
    first = output.read_bytes()
    assert found["gain"] == pytest.approx(found["before"]["nats"] - found["after"]["nats"])
    code, out, err = run("tune", path, *options)
    assert code == 0 and "best donor" in out, err
    assert output.read_bytes() == first


def test_one_number_that_changes_the_result_in_steps(planted, run, tmp_path):
    pytest.importorskip("cma", reason="the package cma is not installed")
    given = recipe(
        "nearswap",
        model(planted["damaged"]),
        base_model=str(planted["sound"]),
        parameters={"t": 0.01},
    )
    path, text = written_files(planted, tmp_path, given)
    options = ("--on", text, "--steps", 2, "-o", tmp_path / "tuned.yaml", "--json")
    code, out, err = run("tune", path, *options)
    assert code == 0, err
    assert json.loads(out)["numbers"] == 1


@pytest.mark.parametrize("case", ["no numbers", "a donor alone", "stages"])
def test_what_cannot_be_tuned_is_refused(planted, run, tmp_path, case):
    both = recipe("linear", model(planted["sound"]), model(planted["damaged"]))
    given = stack(planted["sound"], (0, 4, 0.5)) if case == "a donor alone" else both
    path, text = written_files(planted, tmp_path, given)
    if case == "stages":
        stage = {"name": "first"} | both.model_dump(exclude_none=True)
        second = {"name": "second"} | recipe(
            "linear", model("first", weight=1), model(planted["other"], weight=1)
        ).model_dump(exclude_none=True)
        path.write_text(yaml.safe_dump_all([stage, second]))
    on = "sampled" if case == "a donor alone" else text
    output = tmp_path / "tuned.yaml"
    code, out, err = run("tune", path, "--on", on, "-o", output)
    assert (code, out) == (2, "") and not output.exists()
    assert "Traceback" not in err
    assert all(word in err for word in ("expected:", "found:", "remedy:")), err
    said = {
        "no numbers": "numbers to tune",
        "a donor alone": "a single donor",
        "stages": "2 stages",
    }
    assert said[case] in " ".join(err.split())
