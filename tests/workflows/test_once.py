"""In one command a recipe is resolved once, a donor opened once, each of its files read once."""

import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import write_donor

from frankenmerge.donors import checkpoint, tokens
from frankenmerge.splicing import resolve as resolving
from frankenmerge.storage import safetensors_header

TOKENIZER = "tokenizer.json"


@pytest.fixture
def counts(monkeypatch):
    """Calls of functions, by function and what they were about, wherever they were imported."""
    found: Counter = Counter()

    def count(original, about):
        def counted(*arguments, **options):
            found[original.__name__, about(*arguments)] += 1
            return original(*arguments, **options)

        for module in [each for name, each in sys.modules.items() if "frankenmerge" in name]:
            for name, value in list(vars(module).items()):
                if value is original:
                    monkeypatch.setattr(module, name, counted)

    # Modules are imported by the commands: all of them now, so that all are counted.
    import frankenmerge.api
    import frankenmerge.cli
    import frankenmerge.merging.verify
    import frankenmerge.workflows.evaluating
    import frankenmerge.workflows.measuring
    import frankenmerge.workflows.merging
    import frankenmerge.workflows.planning  # noqa: F401

    count(resolving.resolve, lambda recipe, *_: recipe.key)
    count(checkpoint.open_checkpoint, str)
    count(safetensors_header.read_json, lambda path, _: str(path))
    count(safetensors_header.read_header, str)
    count(tokens.tokens_of, lambda _, path: str(path))
    return found


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    """Two donors whose tokens are the same under other ids, so that vocabularies are read."""
    folders = [write_donor(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    file = folders[1] / TOKENIZER
    file.write_text(file.read_text().replace('"a": 1', '"a": 2').replace('"b": 2,', '"b": 1,'))
    assert file.read_text() != (folders[0] / TOKENIZER).read_text()
    return folders


@pytest.fixture
def recipe(pair, tmp_path) -> Path:
    a, b = pair
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
merge_method: linear
slices:
- sources:
  - {{model: {a}, layer_range: [0, 2], parameters: {{weight: 0.5}}}}
  - {{model: {b}, layer_range: [0, 2], parameters: {{weight: 0.5}}}}
- sources: [{{model: {b}, layer_range: [1, 4], parameters: {{weight: 1.0}}}}]
tokenizer_source: union
"""
    )
    return path


def once(counts: Counter, donors: list[Path], *, resolved: int = 1) -> None:
    by_function: dict[str, Counter] = {}
    for (function, about), count in counts.items():
        by_function.setdefault(function, Counter())[about] += count
    assert by_function["resolve"].total() == resolved
    assert set(by_function["resolve"].values()) == {1}
    for donor in donors:
        assert by_function["open_checkpoint"][str(donor)] == 1, donor
        assert by_function["read_header"][str(donor / "model.safetensors")] == 1
        assert by_function["read_json"][str(donor / "config.json")] == 1
    again = {about: count for about, count in by_function["read_json"].items() if count > 1}
    assert not again
    assert max(by_function.get("tokens_of", {"none": 0}).values()) <= 1


@pytest.mark.parametrize("command", ["check", "merge", "merge --dry-run"])
def test_check_and_merge(counts, pair, recipe, run, tmp_path, command):
    name, *flags = command.split()
    output = [] if name == "check" else [tmp_path / "out"]
    code, _, err = run(name, recipe, *output, *flags)
    assert code == 0, err
    once(counts, pair)
    assert counts["tokens_of", str(pair[1] / TOKENIZER)] == 1


def test_evaluate(counts, pair, recipe, run, text):
    code, _, err = run("evaluate", recipe, "--text", text, "--seams", "--samples", 1)
    assert code == 2 and "other tokens" in err  # its donors read other tokens than it
    counts.clear()
    code, _, err = run("evaluate", recipe, "--text", text, "--samples", 1)
    assert code == 0, err
    once(counts, pair)


def test_two_recipes_of_the_same_donors(counts, pair, recipe, run, text, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("0.5", "0.25"))
    code, _, err = run("evaluate", recipe, other, pair[0], "--text", text)
    assert code == 0, err
    counts_of_resolve = [count for (name, _), count in counts.items() if name == "resolve"]
    assert sum(counts_of_resolve) == 2
    for donor in pair:
        assert counts["open_checkpoint", str(donor)] == 1


@pytest.mark.parametrize("on", [pytest.param("sampled", marks=pytest.mark.slow), "text"])
def test_plan_verify(counts, donors, run, text, tmp_path, on):
    a, deep = donors["a"], donors["deep"]
    code, _, err = run("align", a, deep, "-o", tmp_path / "x.alignment.safetensors")
    assert code == 0, err
    counts.clear()
    told = text if on == "text" else "sampled"
    options = ["--depth", 8, "--top", 4, "--verify", told, "--damp", told, "--calibrate", told]
    output = tmp_path / "planned.yaml"
    code, _, err = run("plan", tmp_path / "x.alignment.safetensors", "-o", output, *options)
    assert code == 0, err
    resolved = {about: count for (name, about), count in counts.items() if name == "resolve"}
    assert len(resolved) > 20 and set(resolved.values()) == {1}
    for donor in (a, deep):
        assert counts["open_checkpoint", str(donor)] == 1
        assert counts["read_json", str(donor / "config.json")] == 1
