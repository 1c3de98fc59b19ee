"""`plan --objective gain`: planted gains are found and confirmed, others are not claimed."""

import json

import pytest
import torch
from conftest import changed, in_memory, write_donor
from relatives import aligned, noisy, text_from

import frankenmerge
from frankenmerge.artefacts import gain as artefact
from frankenmerge.artefacts.alignment import save_alignment
from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.documents import Text
from frankenmerge.models.loading import load_model
from frankenmerge.planning.candidates import uniform_average
from frankenmerge.planning.search import Constraints
from frankenmerge.workflows.gaining import GainOptions
from frankenmerge.workflows.tuning import TuneOptions

HALVES = (range(2), range(2, 4))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A parent, its copies with the second and the first half destroyed, and what is read."""
    root = tmp_path_factory.mktemp("planted")
    parent = write_donor(root / "parent", seed=1)
    first = noisy(parent, root / "first", 1.0, HALVES[1], seed=1)
    second = noisy(parent, root / "second", 1.0, HALVES[0], seed=2)
    alignment, text = root / "pair.alignment.safetensors", root / "text.txt"
    save_alignment(aligned(first, second), alignment)
    text.write_text(text_from(parent, 120))
    return {
        "parent": parent,
        "first": first,
        "second": second,
        "alignment": alignment,
        "text": text,
    }


def planned(run, alignment, output, *options):
    code, out, err = run("plan", alignment, "--objective", "gain", "-o", output, "--json", *options)
    assert code == 0, err
    return json.loads(out)


def loss_on(model, text: str) -> float:
    """The parent's letters are in rows of 63, which begin with the start token."""
    letters = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    ids = torch.tensor([letters.index(letter) + 1 for letter in text]).view(-1, 63)
    rows = torch.cat([torch.zeros(len(ids), 1, dtype=torch.long), ids], 1)
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def test_a_planted_exchange_is_the_plan_and_is_confirmed(planted, run, tmp_path):
    output = tmp_path / "recipe.yaml"
    found = planned(
        run, planted["alignment"], output, "--on", planted["text"], "--depth", 4, "--top", 2
    )
    blocks = [
        Block(str(planted[name]), index)
        for name, half in zip(("first", "second"), HALVES, strict=True)
        for index in half
    ]
    recipe = load_recipe(output)
    assert recipe == recipe_of(blocks)
    ids = torch.randint(48, (2, 30))
    parent = load_model(open_checkpoint(str(planted["parent"])))
    assert torch.equal(in_memory(recipe)(input_ids=ids).logits, parent(input_ids=ids).logits)
    best, other = found["plans"]
    assert best["recipe"] == recipe.model_dump(exclude_none=True)
    assert best["kind"] == "exchange" and found["confirmed"] is True
    low, high = best["interval"]
    assert 0 < low < best["gain"] < high and best["gain"] > other["gain"]
    assert load_recipe(tmp_path / "recipe.2.yaml").model_dump(exclude_none=True) == other["recipe"]
    # All as specified, and as transformers finds it, on one half of the text.
    controls = found["controls"]
    assert controls["best_donor"].keys() == {"name", "nats"}
    assert {"nats", "gain"} <= controls["average"].keys() & controls["ensemble"].keys()
    assert {"plans", "controls", "confirmed", "passes", "seconds"} <= found.keys()
    assert {"recipe", "kind", "gain", "interval", "captured_share"} <= best.keys()
    assert best["captured_share"] == pytest.approx(best["gain"] / controls["ensemble"]["gain"])
    text = planted["text"].read_text()
    rows = [text[start : start + 63] for start in range(0, len(text), 63)]
    half = "".join(
        "".join(rows[unit : unit + 2]) for unit in range(2, len(rows), 4)
    )  # units of two rows, every second one
    donors = {
        str(planted[name]): loss_on(load_model(open_checkpoint(str(planted[name]))), half)
        for name in ("first", "second")
    }
    nearest = min(donors, key=donors.__getitem__)
    assert controls["best_donor"]["name"] == nearest
    assert controls["best_donor"]["nats"] == pytest.approx(donors[nearest], rel=1e-4)
    assert best["gain"] == pytest.approx(donors[nearest] - loss_on(parent, half), abs=1e-4)
    assert found["tokens"] == len(half)


def test_the_plan_that_is_printed_says_what_is_won(planted, run, tmp_path):
    code, out, err = run(
        *("plan", planted["alignment"], "--objective", "gain", "-o", tmp_path / "recipe.yaml"),
        *("--on", planted["text"], "--depth", 4),
    )
    assert code == 0, err
    assert "is better than" in out and "No gain" not in out
    assert "ensemble" in out and "uniform average" in out


@pytest.mark.slow
def test_one_seed_writes_the_same_bytes(planted, run, tmp_path):
    options = ("--on", planted["text"], "--depth", 4, "--seed", 3)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        planned(run, planted["alignment"], tmp_path / name / "recipe.yaml", *options)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["recipe.gain.json", "recipe.yaml"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    made = artefact.load(tmp_path / "one" / "recipe.gain.json")
    assert made.seed == 3 and made.on == [str(planted["text"])]
    assert made.versions["frankenmerge"] == frankenmerge.__version__


@pytest.fixture
def equal_donors(donors, tmp_path):
    copy = changed(donors["a"], tmp_path / "copy")
    path = tmp_path / "equal.alignment.safetensors"
    save_alignment(aligned(donors["a"], copy), path)
    return path


def test_two_equal_donors_gain_nothing(equal_donors, donors, run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(text_from(donors["a"], 60))
    options = ("--on", text, "--depth", 4)
    found = planned(run, equal_donors, tmp_path / "recipe.yaml", *options)
    assert found["confirmed"] is False
    assert found["plans"][0]["gain"] == pytest.approx(0, abs=1e-6)
    assert found["controls"]["ensemble"]["gain"] == pytest.approx(0, abs=1e-5)
    code, out, _ = run(
        "plan", equal_donors, "--objective", "gain", "-o", tmp_path / "again.yaml", *options
    )
    assert code == 0 and "No gain shown" in out


def test_tokens_that_donors_generate_and_every_depth(equal_donors, run, tmp_path, monkeypatch):
    monkeypatch.setattr("frankenmerge.workflows.gaining.ROWS", 8)
    found = planned(run, equal_donors, tmp_path / "recipe.yaml")
    assert len(found["on"]) == 2 and found["tokens"] == 2 * 4 * 63
    assert found["plans"][0]["domains"].keys() == set(found["on"])
    assert not found["confirmed"]
    for gain in found["plans"][0]["domains"].values():
        assert gain <= 1e-6  # each donor is best on its own tokens


def test_a_base_gives_task_arithmetic_and_is_a_donor_to_be_beaten(run, tmp_path):
    base = write_donor(tmp_path / "base", seed=1)
    pair = [noisy(base, tmp_path / name, 0.2, seed=seed) for seed, name in ((1, "x"), (2, "y"))]
    path, text = tmp_path / "xy.alignment.safetensors", tmp_path / "text.txt"
    save_alignment(aligned(*pair), path)
    text.write_text(text_from(base, 40))
    found = planned(run, path, tmp_path / "recipe.yaml", "--on", text, "--base", base, "--depth", 4)
    # The text is the base's own: nothing is better on it.
    assert found["controls"]["best_donor"]["name"] == str(base)
    assert found["confirmed"] is False and found["plans"][0]["gain"] < 0


def test_candidates_that_the_donors_do_not_allow_are_counted_with_the_reason(run, tmp_path):
    wide = write_donor(tmp_path / "wide", seed=1, hidden_size=48)
    pair = [write_donor(tmp_path / name, seed=seed) for seed, name in ((2, "x"), (2, "y"))]
    path, text = tmp_path / "xy.alignment.safetensors", tmp_path / "text.txt"
    save_alignment(aligned(*pair), path)
    text.write_text(text_from(pair[0], 40))
    options = ("--on", text, "--base", wide, "--depth", 4)
    found = planned(run, path, tmp_path / "recipe.yaml", *options)
    # Four scales of task arithmetic, with two densities each of TIES.
    kinds = {reason.split(":")[0]: count for reason, count in found["refused"].items()}
    assert kinds == {"task arithmetic": 4, "ties": 8}
    assert all("found" in reason for reason in found["refused"])
    assert found["candidates"] > 0
    args = ("plan", path, "-o", tmp_path / "recipe.yaml", "--objective", "gain", *options)
    assert "Not possible with these donors: 8 of ties" in run(*args)[1]


@pytest.mark.parametrize(
    "case", ["a donor alone", "other tokens", "a short text", "options of damage", "no objective"]
)
def test_what_cannot_be_measured_is_refused(case, donors, run, tmp_path):
    path, output, text = tmp_path / "x.alignment.safetensors", tmp_path / "r.yaml", tmp_path / "t"
    options = ["--objective", "gain"]
    other = donors["a"]
    if case == "other tokens":
        other = write_donor(tmp_path / "other", seed=9)
    elif case == "a short text":
        text.write_text("a short text")
        options += ["--on", text]
    elif case == "options of damage":
        options += ["--verify", "sampled", "--front"]
    elif case == "no objective":
        options = ["--on", "sampled"]
    save_alignment(aligned(donors["a"], other), path)
    if case == "other tokens":  # since they were aligned
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        words = tokenizer["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, out, err = run("plan", path, "-o", output, *options)
    assert (code, out) == (2, "") and "Traceback" not in err
    assert all(word in err for word in ("expected:", "found:", "remedy:"))
    assert not output.exists()
    said = {
        "a donor alone": "a single donor",
        "other tokens": "tokenizer",
        "a short text": "tokens",
        "options of damage": "--verify, --front",
        "no objective": "--objective gain",
    }
    assert said[case] in " ".join(err.split())


@pytest.mark.slow
def test_python_plans_and_tunes_as_the_command_line_does(planted, run, tmp_path):
    text = [Text("text", planted["text"].read_text())]
    alignment = frankenmerge.load_alignment(planted["alignment"])
    gains = frankenmerge.plan_gains(alignment, GainOptions(text, Constraints(4)))
    names = planted["alignment"], tmp_path / "recipe.yaml", "--on", planted["text"], "--depth", 4
    found = planned(run, *names)
    (plan,) = gains.plans
    assert plan.candidate.recipe == load_recipe(tmp_path / "recipe.yaml")
    assert plan.gain.nats == found["plans"][0]["gain"] and gains.confirmed
    average = uniform_average([str(planted["first"]), str(planted["second"])])
    tuned = frankenmerge.tune(average, TuneOptions(text, steps=2))
    assert tuned.recipe.models and tuned.after <= tuned.before + 1e-3
