"""Models and recipes side by side: the same texts and windows; a recipe is its checkpoint."""

import gc
import hashlib
import json
import math
import shutil
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import write_donor, written

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation.documents import Text, read_text
from frankenmerge.evaluation.language import encode, measure
from frankenmerge.models.loading import load_model, load_tokenizer
from frankenmerge.workflows.evaluating import EvaluateOptions, evaluate

SPLICES = {
    "first untied, last tied": (["a", "b"], [(0, 0), (0, 1), (1, 1), (1, 2), (1, 3)]),
    "first tied, last untied": (["b", "a"], [(0, 0), (0, 1), (1, 1), (1, 3)]),
    "tied at both ends": (["b", "a"], [(0, 0), (1, 1), (1, 2), (0, 2), (0, 3)]),
    "from shards": (["deep", "a"], [(0, 0), (0, 3), (1, 1), (0, 5)]),
    "learned positions": (["g", "h"], [(0, 0), (0, 1), (1, 1), (1, 2), (1, 3)]),
    "blocks repeat": (["a", "a"], [(0, 0), (0, 1), (0, 1), (0, 1), (0, 2), (0, 3)]),
}


@pytest.fixture(params=SPLICES)
def spliced(request, donors, tmp_path) -> tuple[str, str]:
    """A recipe's file and the folder it was merged into."""
    names, blocks = SPLICES[request.param]
    recipe = recipe_of([Block(str(donors[names[donor]]), index) for donor, index in blocks])
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    written(recipe, tmp_path / "merged")
    return str(tmp_path / "recipe.yaml"), str(tmp_path / "merged")


def recipe_file(path: Path, donors, *names: str) -> str:
    blocks = [Block(str(donors[names[0]]), 0), *(Block(str(donors[name]), 1) for name in names)]
    path.write_text(recipe_of(blocks).dump())
    return str(path)


def test_a_recipe_is_measured_exactly_as_the_checkpoint_it_makes(spliced, text):
    recipe, merged = spliced
    results = evaluate([recipe, merged], [read_text(text)]).results
    assert [(result.name, result.role) for result in results[:2]] == [
        (recipe, "recipe"),
        (merged, "model"),
    ]
    assert (results[0].losses[str(text)].nats == results[1].losses[str(text)].nats).all()
    assert results[0].total.as_json() == results[1].total.as_json()


@pytest.mark.parametrize("spliced", ["first tied, last untied"], indirect=True)
def test_the_command_line_finds_them_equal_too(spliced, text, run):
    code, out, _ = run("evaluate", *spliced, "--text", text, "--json")
    virtual, merged = json.loads(out)["models"][:2]
    assert code == 0
    assert virtual.pop("name") != merged.pop("name")
    assert (virtual.pop("role"), merged.pop("role")) == ("recipe", "model")
    assert len(virtual.pop("key")) == 32 and "key" not in merged
    assert virtual == merged


def test_every_donor_of_a_recipe_follows_it_once(donors, text, tmp_path):
    names = [
        recipe_file(tmp_path / "one.yaml", donors, "a", "b"),
        recipe_file(tmp_path / "two.yaml", donors, "b", "deep"),
    ]
    results = evaluate(names, [read_text(text)]).results
    expected = [(name, "recipe") for name in names] + [
        (str(donors[name]), "donor") for name in ("a", "b", "deep")
    ]
    assert [(result.name, result.role) for result in results] == expected


def test_a_donor_that_was_named_itself_is_measured_once(donors, text, tmp_path):
    recipe = recipe_file(tmp_path / "one.yaml", donors, "a", "b")
    named = [str(donors["b"]), recipe, str(donors["b"])]
    results = evaluate(named, [read_text(text)]).results
    assert [(result.name, result.role) for result in results] == [
        (str(donors["b"]), "model"),
        (recipe, "recipe"),
        (str(donors["a"]), "donor"),
    ]


def test_each_model_is_measured_as_it_would_be_alone(donors, text, tmp_path):
    recipe = recipe_file(tmp_path / "one.yaml", donors, "a", "b")
    evaluated = evaluate([recipe], [read_text(text)])
    assert len(evaluated.results) == 3
    for result in evaluated.results[1:]:
        checkpoint = open_checkpoint(result.name)
        expected = measure(
            load_model(checkpoint),
            encode(load_tokenizer(checkpoint), text.read_text(), "text"),
            context=evaluated.record.context,
        )
        assert (result.total.nats == expected.nats).all()


def test_the_window_is_the_shortest_that_any_was_made_for(donors, text, tmp_path):
    short = write_donor(tmp_path / "short", max_position_embeddings=32)
    both = evaluate([str(donors["a"]), str(short)], [read_text(text)])
    assert both.record.context == 32
    alone = evaluate([str(donors["a"])], [read_text(text)], EvaluateOptions(context=32))
    assert (both.results[0].total.nats == alone.results[0].total.nats).all()


def test_a_recipe_s_donors_count_for_the_window(donors, text, tmp_path):
    short = write_donor(tmp_path / "short", max_position_embeddings=32)
    recipe = recipe_file(tmp_path / "one.yaml", donors | {"short": short}, "a", "short")
    assert evaluate([recipe], [read_text(text)]).record.context == 32


def test_the_total_is_that_of_all_texts(donors):
    texts = [Text("one", "the quick brown fox"), Text("two", "jumps over the lazy dog")]
    (result,) = evaluate([str(donors["a"])], texts).results
    assert list(result.losses) == ["one", "two"]
    assert (
        result.total.nats == np.concatenate([result.losses["one"].nats, result.losses["two"].nats])
    ).all()
    assert result.total.bytes == 19 + 23
    assert result.total.tokens == 19 + 23  # a letter is a token; the first follows BOS
    assert result.total.bits_per_byte == pytest.approx(
        sum(loss.nats.sum() for loss in result.losses.values()) / math.log(2) / 42
    )


def metered(lines: dict[str, tuple]):
    """A progress that records by description: the units in total, their name, those done."""

    @contextmanager
    def progress(what, total, unit):
        done: list[int] = []
        yield done.append
        lines[what] = total, unit, sum(done)

    return progress


def test_progress_counts_every_token_of_every_model(donors, text):
    lines: dict[str, tuple] = {}
    evaluate([str(donors["a"]), str(donors["g"])], [read_text(text)], progress=metered(lines))
    tokens = len(text.read_text())
    assert lines == {
        "1 of 2: a on text": (tokens, "tokens", tokens),
        "2 of 2: g on text": (tokens, "tokens", tokens),
    }


def test_progress_counts_samples_seams_and_features_too(donors, text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines: dict[str, tuple] = {}
    options = EvaluateOptions(prompts=("the", "a"), seams=True, retention=True)
    recipe = recipe_file(tmp_path / "one.yaml", donors, "a", "b")
    evaluate([recipe], [read_text(text)], options, progress=metered(lines))
    assert all(total == done > 0 for total, _, done in lines.values())
    kinds = {what.rsplit(": ", 1)[-1]: unit for what, (_, unit, _) in lines.items()}
    assert kinds == {
        "one.yaml on text": "tokens",
        "samples": "prompts",
        "seams": "windows",
        "features": "inputs x blocks",
        "a on text": "tokens",
        "b on text": "tokens",
        "analyzing a": "inputs x blocks",
        "analyzing b": "inputs x blocks",
    }


def test_what_keeps_a_later_model_from_being_measured_is_reported_before_the_first_is(
    donors, text, tmp_path, monkeypatch
):
    def loaded(*_args, **_options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("frankenmerge.evaluation.bench.load_model", loaded)
    mute = shutil.copytree(donors["a"], tmp_path / "mute")
    for path in mute.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FrankenmergeError, match="a tokenizer"):
        evaluate([str(donors["a"]), str(mute)], [read_text(text)])
    recipe = Path(recipe_file(tmp_path / "one.yaml", donors, "a", "b"))
    recipe.write_text(recipe.read_text().replace("passthrough", "linear"))
    with pytest.raises(FrankenmergeError):
        evaluate([str(donors["a"]), str(recipe)], [read_text(text)])


def test_the_command_line_prints_what_was_measured(donors, text, run):
    code, out, _ = run("evaluate", donors["a"], "--text", text, "--context", 16, "--json")
    record = json.loads(out)
    (result,) = evaluate([str(donors["a"])], [read_text(text)], EvaluateOptions(context=16)).results
    content = text.read_bytes()
    assert code == 0 and record["context"] == 16
    assert record["texts"] == [
        {
            "path": str(text),
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "documents": 1,
        }
    ]
    (model,) = record["models"]
    assert (model["name"], model["role"]) == (str(donors["a"]), "model")
    figures = result.total.as_json()
    assert (
        {key: model[key] for key in figures}
        == {key: model["texts"][str(text)][key] for key in figures}
        == figures
    )
    code, out, _ = run("evaluate", donors["a"], "--text", text, "--context", 16)
    assert (
        code == 0
        and f"{result.total.bits_per_byte:.3f}" in out
        and f"{result.total.nats_per_token:.3f}" in out
    )


def test_models_are_in_memory_one_after_another(donors, text, tmp_path, monkeypatch):
    """Each is gone before the next is loaded, but for donors of recipes that are still to come."""
    alive: dict[str, weakref.ref] = {}
    seen = []

    def watched(checkpoint, *placement, **options):
        gc.collect()
        model = load_model(checkpoint, *placement, **options)
        seen.append(
            (checkpoint.name, {name for name, found in alive.items() if found() is not None})
        )
        alive[checkpoint.name] = weakref.ref(model)
        return model

    monkeypatch.setattr("frankenmerge.evaluation.bench.load_model", watched)
    a, b, deep, g, h = (str(donors[name]) for name in ("a", "b", "deep", "g", "h"))
    recipe = recipe_file(tmp_path / "one.yaml", donors, "a", "b")
    evaluate([a, deep, g, recipe, h], [read_text(text)])
    assert seen == [(a, set()), (deep, {a}), (g, {a}), (b, {a}), (h, {b})]


@pytest.mark.parametrize(
    ("options", "kept"),
    [(EvaluateOptions(compare=10.0), set()), (EvaluateOptions(seams=True), {"a"})],
)
def test_donors_of_a_checkpoint_stay_in_memory_where_they_are_needed(
    donors, text, tmp_path, monkeypatch, options, kept
):
    recipe = recipe_of([Block(str(donors["a"]), 0), Block(str(donors["b"]), 1)])
    written(recipe, tmp_path / "merged")
    alive: dict[str, weakref.ref] = {}
    at_merged = []

    def watched(checkpoint, *placement, **options):
        gc.collect()
        model = load_model(checkpoint, *placement, **options)
        if checkpoint.path.name == "merged":
            at_merged.extend(name for name, found in alive.items() if found() is not None)
        alive[checkpoint.path.name] = weakref.ref(model)
        return model

    monkeypatch.setattr("frankenmerge.evaluation.bench.load_model", watched)
    named = [str(donors["a"]), str(tmp_path / "merged")]
    results = evaluate(named, [read_text(text)], options).results
    assert set(at_merged) == kept
    assert [result.name for result in results] == [
        str(donors["a"]),
        str(tmp_path / "merged"),
        str(donors["b"]),
    ]


def missing(path):
    path.unlink()


def empty(path):
    path.write_text("")


def latin_1(path):
    path.write_bytes(b"caf\xe9 au lait")


@pytest.mark.parametrize("spoil", [missing, empty, latin_1])
def test_the_command_line_reports_such_a_text_in_one_message(donors, text, run, spoil):
    spoil(text)
    code, out, err = run("evaluate", donors["a"], "--text", text)
    assert (code, out) == (2, "") and str(text) in err and "Traceback" not in err


def test_a_window_longer_than_learned_positions_is_refused(donors, text, run):
    code, _, err = run("evaluate", donors["g"], "--text", text, "--context", 65)
    assert code == 2 and "64" in err and "Traceback" not in err


def test_models_and_recipes_that_are_not_there_are_refused(donors, text, run, tmp_path):
    for name in (tmp_path / "none", tmp_path / "none.yaml"):
        code, _, err = run("evaluate", name, "--text", text)
        assert code == 2 and str(name) in err and "Traceback" not in err


def test_donors_that_do_not_fit_are_refused_before_anything_is_measured(
    donors, text, run, tmp_path
):
    recipe = recipe_file(tmp_path / "bad.yaml", donors, "a", "wide")
    code, out, err = run("evaluate", recipe, "--text", text)
    assert (code, out) == (2, "") and "hidden_size" in err


def test_the_tokenizer_is_the_one_the_recipe_names(donors, text, tmp_path):
    other = write_donor(tmp_path / "other", seed=9)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "e"}, "content": ""}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    blocks = [Block(str(donors["a"]), 0), Block(str(other), 1)]
    counts = []
    for number, source in enumerate((None, str(other))):
        path = tmp_path / f"{number}.yaml"
        path.write_text(
            recipe_of(blocks, **({"tokenizer_source": source} if source else {})).dump()
        )
        counts.append(evaluate([str(path)], [read_text(text)]).results[0].total.tokens)
    assert counts[0] == len(text.read_text()) and counts[1] < counts[0]
