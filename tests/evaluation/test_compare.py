"""Models and recipes side by side: same texts, same windows, and a recipe is the checkpoint it would make."""

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
from conftest import write_donor

from frankenmerge.analysis.complete import complete_search
from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation.compare import (
    LONGEST_CONTEXT,
    Text,
    compare,
    read_text,
    shared_context,
)
from frankenmerge.evaluation.language import encode, measure
from frankenmerge.evaluation.record import Looks
from frankenmerge.merging.writer import merge
from frankenmerge.models.loading import load_model, load_tokenizer
from frankenmerge.splicing.opening import open_donors

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
    merge(recipe, open_donors(recipe), tmp_path / "merged")
    return str(tmp_path / "recipe.yaml"), str(tmp_path / "merged")


def recipe_file(path: Path, donors, *names: str) -> str:
    blocks = [Block(str(donors[names[0]]), 0), *(Block(str(donors[name]), 1) for name in names)]
    path.write_text(recipe_of(blocks).dump())
    return str(path)


def test_a_recipe_is_measured_exactly_as_the_checkpoint_it_makes(spliced, text):
    recipe, merged = spliced
    results, _ = compare([recipe, merged], [read_text(text)])
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
    assert virtual.pop("name") != merged.pop("name") and (
        virtual.pop("role"),
        merged.pop("role"),
    ) == ("recipe", "model")
    assert virtual == merged


def test_every_donor_of_a_recipe_follows_it_once(donors, text, tmp_path):
    names = [
        recipe_file(tmp_path / "one.yaml", donors, "a", "b"),
        recipe_file(tmp_path / "two.yaml", donors, "b", "deep"),
    ]
    results, _ = compare(names, [read_text(text)])
    expected = [(name, "recipe") for name in names] + [
        (str(donors[name]), "donor") for name in ("a", "b", "deep")
    ]
    assert [(result.name, result.role) for result in results] == expected


def test_a_donor_that_was_named_itself_is_not_told_twice(donors, text, tmp_path):
    recipe = recipe_file(tmp_path / "one.yaml", donors, "a", "b")
    results, _ = compare([str(donors["b"]), recipe, str(donors["b"])], [read_text(text)])
    assert [(result.name, result.role) for result in results] == [
        (str(donors["b"]), "model"),
        (recipe, "recipe"),
        (str(donors["a"]), "donor"),
    ]


def test_each_model_is_measured_as_it_would_be_alone(donors, text, tmp_path):
    recipe = recipe_file(tmp_path / "one.yaml", donors, "a", "b")
    results, bench = compare([recipe], [read_text(text)])
    for result in results[1:]:
        checkpoint = open_checkpoint(result.name)
        expected = measure(
            load_model(checkpoint),
            encode(load_tokenizer(checkpoint), text.read_text(), "text"),
            context=bench.context,
        )
        assert (result.total.nats == expected.nats).all()


def test_the_window_is_the_shortest_that_any_was_made_for(donors, text, tmp_path):
    short = write_donor(tmp_path / "short", max_position_embeddings=32)
    assert (
        shared_context([open_checkpoint(str(path)) for path in (donors["a"], short, donors["g"])])
        == 32
    )
    assert shared_context([open_checkpoint(str(donors["a"]))]) == 64
    results, bench = compare([str(donors["a"]), str(short)], [read_text(text)])
    assert bench.context == 32
    alone = compare([str(donors["a"])], [read_text(text)], context=32)[0]
    assert (results[0].total.nats == alone[0].total.nats).all()


def test_a_recipe_s_donors_count_for_the_window(donors, text, tmp_path):
    short = write_donor(tmp_path / "short", max_position_embeddings=32)
    recipe = recipe_file(tmp_path / "one.yaml", donors | {"short": short}, "a", "short")
    assert compare([recipe], [read_text(text)])[1].context == 32


def test_the_window_is_never_longer_than_2048_unasked(donors, tmp_path):
    long = write_donor(tmp_path / "long", max_position_embeddings=8192)
    assert shared_context([open_checkpoint(str(long))]) == LONGEST_CONTEXT == 2048
    assert shared_context([]) == 2048


def test_the_total_is_that_of_all_texts(donors):
    texts = [Text("one", "the quick brown fox"), Text("two", "jumps over the lazy dog")]
    ((result,), _) = compare([str(donors["a"])], texts)
    assert list(result.losses) == ["one", "two"]
    assert (
        result.total.nats == np.concatenate([result.losses["one"].nats, result.losses["two"].nats])
    ).all()
    assert result.total.bytes == 19 + 23
    assert result.total.tokens == 19 + 23  # a letter, a token; the first behind BOS
    assert result.total.bits_per_byte == pytest.approx(
        sum(loss.nats.sum() for loss in result.losses.values()) / math.log(2) / 42
    )


def metered(lines: dict[str, tuple]):
    """A progress that writes down what it was told: (how many units there are, of what, how many were done)."""

    @contextmanager
    def progress(what, total, unit):
        done: list[int] = []
        yield done.append
        lines[what] = total, unit, sum(done)

    return progress


def test_progress_tells_every_token_of_every_model(donors, text):
    lines: dict[str, tuple] = {}
    compare([str(donors["a"]), str(donors["g"])], [read_text(text)], progress=metered(lines))
    tokens = len(text.read_text())
    assert lines == {
        "1 of 2: a on text": (tokens, "tokens", tokens),
        "2 of 2: g on text": (tokens, "tokens", tokens),
    }


def test_progress_is_told_of_samples_seams_and_features_too(donors, text, tmp_path):
    lines: dict[str, tuple] = {}
    progress = metered(lines)
    looks = Looks(
        ["the", "a"],
        with_seams=True,
        search=lambda model, advance: complete_search(model, k=1, advance=advance),
        progress=progress,
    )
    compare(
        [recipe_file(tmp_path / "one.yaml", donors, "a", "b")],
        [read_text(text)],
        hold=True,
        progress=progress,
        visit=looks.visit,
    )
    assert all(total == done > 0 for total, _, done in lines.values())
    kinds = {what.rsplit(": ", 1)[-1]: unit for what, (_, unit, _) in lines.items()}
    assert kinds == {
        "one.yaml on text": "tokens",
        "samples": "prompts",
        "seams": "windows",
        "features": "inputs x blocks",
        "a on text": "tokens",
        "b on text": "tokens",
    }


def test_what_keeps_a_later_model_from_being_measured_is_told_before_the_first_is(
    donors, text, tmp_path, monkeypatch
):
    def loaded(*_args, **_options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("frankenmerge.evaluation.compare.load_model", loaded)
    mute = shutil.copytree(donors["a"], tmp_path / "mute")
    for path in mute.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FrankenmergeError, match="a tokenizer"):
        compare([str(donors["a"]), str(mute)], [read_text(text)])
    recipe = Path(recipe_file(tmp_path / "one.yaml", donors, "a", "b"))
    recipe.write_text(recipe.read_text().replace("passthrough", "linear"))
    with pytest.raises(FrankenmergeError):
        compare([str(donors["a"]), str(recipe)], [read_text(text)])


def test_the_command_line_prints_what_was_measured(donors, text, run):
    code, out, _ = run("evaluate", donors["a"], "--text", text, "--context", 16, "--json")
    told = json.loads(out)
    ((result,), _) = compare([str(donors["a"])], [read_text(text)], context=16)
    content = text.read_bytes()
    assert code == 0 and told["context"] == 16
    assert told["texts"] == [
        {"path": str(text), "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    ]
    (model,) = told["models"]
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

    def watched(checkpoint, **options):
        gc.collect()
        model = load_model(checkpoint, **options)
        seen.append(
            (checkpoint.name, {name for name, found in alive.items() if found() is not None})
        )
        alive[checkpoint.name] = weakref.ref(model)
        return model

    monkeypatch.setattr("frankenmerge.evaluation.compare.load_model", watched)
    a, b, deep, g, h = (str(donors[name]) for name in ("a", "b", "deep", "g", "h"))
    recipe = recipe_file(tmp_path / "one.yaml", donors, "a", "b")
    compare([a, deep, g, recipe, h], [read_text(text)])
    assert seen == [(a, set()), (deep, {a}), (g, {a}), (b, {a}), (h, {b})]


@pytest.mark.parametrize(("hold", "first"), [(False, set()), (True, {"a"})])
def test_donors_of_a_checkpoint_are_held_for_those_who_need_them(
    donors, text, tmp_path, monkeypatch, hold, first
):
    recipe = recipe_of([Block(str(donors["a"]), 0), Block(str(donors["b"]), 1)])
    merge(recipe, open_donors(recipe), tmp_path / "merged")
    alive: dict[str, weakref.ref] = {}
    at_merged = []

    def watched(checkpoint, **options):
        gc.collect()
        model = load_model(checkpoint, **options)
        if checkpoint.path.name == "merged":
            at_merged.extend(name for name, found in alive.items() if found() is not None)
        alive[checkpoint.path.name] = weakref.ref(model)
        return model

    monkeypatch.setattr("frankenmerge.evaluation.compare.load_model", watched)
    results, _ = compare(
        [str(donors["a"]), str(tmp_path / "merged")], [read_text(text)], beside=True, hold=hold
    )
    assert set(at_merged) == first
    assert [result.name for result in results] == [
        str(donors["a"]),
        str(tmp_path / "merged"),
        str(donors["b"]),
    ]


def test_line_ends_are_measured_as_they_are(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\n")
    assert read_text(tmp_path / "dos.txt").content == "one\r\ntwo\r\n"


def missing(path):
    path.unlink()


def empty(path):
    path.write_text("")


def latin_1(path):
    path.write_bytes(b"caf\xe9 au lait")


@pytest.mark.parametrize("spoil", [missing, empty, latin_1])
def test_a_text_that_cannot_be_read_is_refused(text, spoil):
    spoil(text)
    with pytest.raises(FrankenmergeError) as refused:
        read_text(text)
    assert [fault.place for fault in refused.value.faults] == [str(text)]


@pytest.mark.parametrize("spoil", [missing, empty, latin_1])
def test_the_command_line_tells_of_such_a_text_in_one_message(donors, text, run, spoil):
    spoil(text)
    code, out, err = run("evaluate", donors["a"], "--text", text)
    assert (code, out) == (1, "") and str(text) in err and "Traceback" not in err


def test_a_window_longer_than_learned_positions_is_refused(donors, text, run):
    code, _, err = run("evaluate", donors["g"], "--text", text, "--context", 65)
    assert code == 1 and "64" in err and "Traceback" not in err


def test_models_and_recipes_that_are_not_there_are_refused(donors, text, run, tmp_path):
    for name in (tmp_path / "none", tmp_path / "none.yaml"):
        code, _, err = run("evaluate", name, "--text", text)
        assert code == 1 and str(name) in err and "Traceback" not in err


def test_donors_that_do_not_fit_are_refused_before_anything_is_measured(
    donors, text, run, tmp_path
):
    recipe = recipe_file(tmp_path / "bad.yaml", donors, "a", "wide")
    code, out, err = run("evaluate", recipe, "--text", text)
    assert (code, out) == (1, "") and "hidden_size" in err


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
        counts.append(compare([str(path)], [read_text(text)])[0][0].total.tokens)
    assert counts[0] == len(text.read_text()) and counts[1] < counts[0]
