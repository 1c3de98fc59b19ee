"""`heal`: what each scope changes, recovery, resuming, the control, LoRA, and what is refused."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import write_donor
from killed import tree
from relatives import noisy, text_from
from safetensors.numpy import load_file

from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.evaluation.documents import Text
from frankenmerge.healing import tokens
from frankenmerge.workflows.healing import HealOptions, heal
from frankenmerge.workflows.patients import patient_of

ROWS = (48, 16, 16)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    for name, rows in zip(("FITTING", "STOPPING", "CONFIRMING"), ROWS, strict=True):
        monkeypatch.setattr(tokens, name, rows)
    monkeypatch.setattr(tokens, "USES", 99)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A donor, a relative of it, and recipes of both."""
    root = tmp_path_factory.mktemp("pair")
    one = write_donor(root / "one", seed=1)
    return {"root": root, "one": one, "other": noisy(one, root / "other", 0.1, seed=2)}


def stack(folder: Path, *parts: tuple[Path, int, int]) -> Path:
    slices = [
        {"sources": [{"model": str(model), "layer_range": [start, stop]}]}
        for model, start, stop in parts
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    return path


@pytest.fixture
def taller(pair, tmp_path):
    return stack(tmp_path, (pair["one"], 0, 3), (pair["other"], 1, 4))


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def changed_names(folder: Path, other: Path) -> set[str]:
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not np.array_equal(ours[name], theirs[name])}


SCOPES = {
    "seams": lambda name: ".layers.2." in name or ".layers.3." in name,
    "norms": lambda name: "norm" in name,
    "lora": lambda name: "_proj" in name,
    "all": lambda name: True,
}


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_changes_its_tensors_and_no_others(run, taller, tmp_path, scope):
    assert run("merge", taller, tmp_path / "merged")[0] == 0
    status, printed, _ = run(
        *("heal", taller, tmp_path / "out", "--scope", scope, "--steps", 25, "--json")
    )
    found = json.loads(printed)
    assert status == 0 and found["scope"] == scope and found["control"] is None
    assert found["after"]["nats"] < found["before"]["nats"]
    expected = {name for name in weights(tmp_path / "out") if SCOPES[scope](name)}
    assert changed_names(tmp_path / "out", tmp_path / "merged") == expected
    assert not (tmp_path / "out.heal").exists()
    status, printed, _ = run("check", tmp_path / "out", "--json")
    compared = json.loads(printed)
    assert status == 0 and compared["compared"] == len(weights(tmp_path / "out")) - len(expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No control was run" in card and "has not been trained" not in card


@pytest.mark.parametrize("kind", ["llama", "mixtral"])  # whose experts are packed in memory
def test_the_figures_are_those_of_the_checkpoint_that_is_written(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    one, other = (write_donor(tmp_path / str(seed), kind, seed=seed) for seed in (1, 2))
    taller = stack(tmp_path, (one, 0, 3), (other, 1, 4))
    text = Text("t", text_from(one, 32, seed=5))
    found = heal(taller, tmp_path / "out", HealOptions(steps=25, text=[text], scope="seams"))
    assert found is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    letters = [0 if letter == "\0" else LETTERS.index(letter) + 1 for letter in text.content]
    nats, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(letters), 63):
            ids = torch.tensor([[0, *letters[start : start + 63]]])
            loss = model(input_ids=ids, labels=ids).loss
            nats, count = nats + float(loss) * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert found.record.after == pytest.approx(nats / count, abs=1e-4)


LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def test_swapped_blocks_are_healed(pair, tmp_path):
    one = pair["one"]
    recipe = stack(tmp_path, (one, 0, 1), (one, 2, 3), (one, 1, 2), (one, 3, 4))
    found = heal(recipe, tmp_path / "out", HealOptions(steps=100))
    assert found is not None
    record = found.record
    assert record.before - record.best_donor.nats > 0.02
    lost, left = record.before - record.best_donor.nats, record.after - record.best_donor.nats
    assert left < 0.5 * lost


KILLED = """
import os, signal, sys
from pathlib import Path
from frankenmerge.healing import tokens, training
from frankenmerge.workflows.healing import HealOptions, heal
tokens.FITTING, tokens.STOPPING, tokens.CONFIRMING = 48, 16, 16
left = int(sys.argv[3])
real = training._Descent.step
def counted(self, *arguments):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return real(self, *arguments)
training._Descent.step = counted
heal(Path(sys.argv[1]), Path(sys.argv[2]), HealOptions(steps=60, control=True, scope=sys.argv[4]))
"""


def killed(recipe: Path, output: Path, after: int, scope: str) -> int:
    command = [sys.executable, "-c", KILLED, str(recipe), str(output), str(after), scope]
    return subprocess.run(command, capture_output=True).returncode


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["seams", "lora"])
def test_killed_at_any_step_and_resumed_gives_the_same_bytes(taller, tmp_path, scope):
    assert killed(taller, tmp_path / "whole", -1, scope) == 0
    output = tmp_path / "whole"
    expected = tree(output)
    (tmp_path / "again").mkdir()
    resumed = tmp_path / "again" / "whole"
    for after in random.Random(0).sample(range(90), 3):
        assert killed(taller, resumed, after, scope) == -signal.SIGKILL
        assert not resumed.exists()
        assert (tmp_path / "again" / "whole.heal").is_dir()
    assert killed(taller, resumed, -1, scope) == 0
    assert tree(resumed) == expected
    assert os.listdir(tmp_path / "again") == ["whole"]


def test_what_it_is_judged_by_decides_nothing(pair, taller, tmp_path):
    texts = [Text(str(seed), text_from(pair["other"], 32, seed=seed)) for seed in (7, 8)]
    records = []
    for text in texts:
        found = heal(taller, tmp_path / text.name, HealOptions(steps=50, text=[text]))
        assert found is not None
        records.append(found.record)
    assert records[0].curve == records[1].curve
    assert records[0].after != records[1].after
    assert changed_names(tmp_path / "7", tmp_path / "8") == set()
    parts = [
        {tuple(row) for row in domain.ids.tolist()}
        for part in _sampled(pair, tmp_path)
        for domain in part
    ]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 2 * sum(ROWS)


def _sampled(pair, tmp_path):
    from frankenmerge.donors.checkpoint import open_checkpoint
    from frankenmerge.models.loading import load_model

    opened = {name: open_checkpoint(str(pair[name])) for name in ("one", "other")}
    models = {name: load_model(each) for name, each in opened.items()}
    prints = {name: each.fingerprint for name, each in opened.items()}
    return tokens.sampled_tokens(models, prints, ROWS[0], 0, tmp_path / "kept.safetensors")


def test_early_stopping_keeps_the_best_check(taller, tmp_path, monkeypatch):
    monkeypatch.setattr("frankenmerge.healing.training.RATES", (3.0,))
    found = heal(taller, tmp_path / "out", HealOptions(steps=400))
    assert found is not None
    curve = [(each.step, each.nats) for each in found.record.curve]
    assert found.record.steps == min(curve, key=lambda each: each[1])[0]
    assert curve[-1][0] < 400


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses deprecated names
def test_a_lora_alone_is_the_same_as_folded_in(run, taller, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merged, options = tmp_path / "merged", ("--scope", "lora", "--steps", 25)
    assert run("merge", taller, merged)[0] == 0
    assert run("heal", merged, tmp_path / "adapter", "--adapter", *options)[0] == 0
    assert run("heal", merged, tmp_path / "folded", *options)[0] == 0
    base = AutoModelForCausalLM.from_pretrained(merged)
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        alone = PeftModel.from_pretrained(base, tmp_path / "adapter")(input_ids=ids).logits
        folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")(input_ids=ids).logits
    assert torch.allclose(alone, folded, atol=1e-4)
    assert not torch.allclose(before, folded, atol=1e-2)
    written = json.loads((tmp_path / "adapter" / "healing.json").read_text())
    assert written["scope"] == "lora"


def test_a_merged_checkpoint_finds_its_donors_and_seams(run, taller, tmp_path):
    assert run("merge", taller, tmp_path / "merged")[0] == 0
    assert run("heal", taller, tmp_path / "one", "--steps", 25)[0] == 0
    assert run("heal", tmp_path / "merged", tmp_path / "two", "--steps", 25)[0] == 0
    assert changed_names(tmp_path / "one", tmp_path / "two") == set()
    assert run("check", tmp_path / "two")[0] == 0


def test_the_control_is_healed_alike_and_reported(run, pair, taller, tmp_path):
    status, printed, _ = run(
        *("heal", taller, tmp_path / "out", "--steps", 25, "--control", "--json")
    )
    found = json.loads(printed)
    control, best = found["control"], found["best_donor"]
    assert status == 0 and control["name"] == best["name"]
    assert control["nats"] < best["nats"]
    assert control["difference"] == pytest.approx(found["after"]["nats"] - control["nats"])
    assert control["interval"][0] < control["difference"] < control["interval"][1]
    assert "healed alike" in (tmp_path / "out" / "README.md").read_text()


def test_the_report_shows_figures_and_curve(run, taller, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    assert run("merge", taller, folder / "plain")[0] == 0
    status, printed, _ = run(*("heal", taller, folder / "healed", "--steps", 50, "--json"))
    found = json.loads(printed)
    assert status == 0
    assert run("report", folder, "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "Healing: healed" in page and "No control was run" in page
    assert "by step" in page and "at step 50" in page
    assert f"{found['after']['nats']:.3f}" in page
    records = [json.loads((folder / name / "frankenmerge.json").read_text()) for name in KINDS]
    assert records[0]["key"] != records[1]["key"]
    assert records[0]["recipe_sha256"] == records[1]["recipe_sha256"]


KINDS = "plain", "healed"


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_evaluate_shows_before_and_after(run, pair, tmp_path, adapter):
    text = tmp_path / "text.txt"
    text.write_text(text_from(pair["one"], 64))
    recipe = stack(tmp_path, (pair["one"], 0, 3), (pair["one"], 1, 4))
    options = ["--scope", "lora", "--adapter"] if adapter else []
    status, printed, _ = run(
        *("heal", recipe, tmp_path / "out", "--steps", 25, "--text", text, "--json", *options)
    )
    healed = json.loads(printed)
    assert status == 0
    status, printed, _ = run("evaluate", tmp_path / "out", recipe, "--text", text, "--json")
    found = json.loads(printed)
    (check,) = found["healings"]
    assert status == 0 and check["model"] == str(tmp_path / "out")
    assert check["before"] == healed["before"]["nats"] > healed["after"]["nats"] == check["after"]
    assert check["on"] == [str(text)]
    losses = {entry["name"]: entry["nats_per_token"] for entry in found["models"]}
    assert check["measured"] == losses[str(tmp_path / "out")] < losses[str(recipe)]
    status, printed, _ = run("evaluate", tmp_path / "out", "--text", text)
    assert f"out: healed from {check['before']:.3f} to {check['after']:.3f}" in printed


def test_fewer_blocks_take_more_steps(pair, tmp_path):
    plain, few = HealOptions(), HealOptions(steps=7)
    shorter = stack(tmp_path, (pair["one"], 0, 1), (pair["one"], 3, 4))
    patients = {"shorter": patient_of(shorter, plain)}
    taller = stack(tmp_path, (pair["one"], 0, 3), (pair["other"], 1, 4))
    patients["taller"] = patient_of(taller, plain)
    assert {name: each.steps(plain) for name, each in patients.items()} == {
        "shorter": 1000,
        "taller": 300,
    }
    assert all(each.steps(few) == 7 for each in patients.values())


def test_blocks_left_out_and_averages(run, pair, tmp_path):
    one, other = pair["one"], pair["other"]
    shorter = stack(tmp_path, (one, 0, 1), (one, 3, 4))
    status, printed, _ = run("heal", shorter, tmp_path / "short", "--steps", 50, "--json")
    found = json.loads(printed)
    assert status == 0 and found["after"]["nats"] < found["before"]["nats"]
    average = tmp_path / "average.yaml"
    models = [{"model": str(each), "parameters": {"weight": 0.5}} for each in (one, other)]
    average.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    status, printed, _ = run("heal", average, tmp_path / "average", "--steps", 25, "--json")
    assert status == 0 and json.loads(printed)["scope"] == "norms"
    assert run("check", tmp_path / "average")[0] == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("scope", ["seams", "norms", "lora", "all"])
def test_transposed_maps_tied_heads_and_learned_positions(run, donors, tmp_path, scope):
    recipe = stack(tmp_path, (donors["g"], 0, 3), (donors["h"], 1, 4))
    status, printed, error = run(
        *("heal", recipe, tmp_path / "out", "--scope", scope, "--steps", 10, "--json")
    )
    assert status == 0, error
    found = json.loads(printed)
    assert found["after"]["nats"] <= found["before"]["nats"]
    assert run("check", tmp_path / "out")[0] == 0


def test_experts_that_are_packed_in_memory_are_healed(run, tmp_path):
    paths = [write_donor(tmp_path / str(seed), "mixtral", seed=seed) for seed in (1, 2)]
    recipe = stack(tmp_path, (paths[0], 0, 3), (paths[1], 1, 4))
    assert run("merge", recipe, tmp_path / "merged")[0] == 0
    status, printed, error = run("heal", recipe, tmp_path / "out", "--steps", 25, "--json")
    assert status == 0, error
    found = json.loads(printed)
    assert found["after"]["nats"] < found["before"]["nats"]
    changed = changed_names(tmp_path / "out", tmp_path / "merged")
    assert any("experts.0." in name for name in changed)
    assert all(".layers.2." in name or ".layers.3." in name for name in changed)
    assert run("check", tmp_path / "out")[0] == 0


def test_a_slice_in_another_basis_is_healed(run, pair, tmp_path):
    recipe = stack(tmp_path, (pair["one"], 0, 2), (pair["other"], 2, 4))
    written = yaml.safe_load(recipe.read_text())
    written["slices"][1]["gauge"] = {"to": "previous"}
    recipe.write_text(yaml.safe_dump(written))
    assert run("merge", recipe, tmp_path / "merged")[0] == 0
    status, _, error = run("heal", recipe, tmp_path / "out", "--steps", 10)
    assert status == 0, error
    changed = changed_names(tmp_path / "out", tmp_path / "merged")
    assert changed and all(".layers.1." in name or ".layers.2." in name for name in changed)
    assert run("check", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("teacher", ["donor", "best-per-domain", "none"])
def test_teachers_and_texts(run, pair, taller, tmp_path, teacher):
    text = tmp_path / "text.txt"
    text.write_text(text_from(pair["one"], 64))
    arguments = ("heal", taller, tmp_path / "out", "--on", text, "--teacher", teacher)
    status, printed, error = run(*arguments, "--steps", 25, "--json")
    assert status == 0, error
    found = json.loads(printed)
    assert found["after"]["nats"] < found["before"]["nats"]
    record = json.loads((tmp_path / "out" / "frankenmerge.json").read_text())["healing"]
    assert record["teacher"] == teacher and record["on"] == [str(text)]
    assert len(record["teachers"]) == (0 if teacher == "none" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--micro-batch", 3), ("--checkpointing",)])
def test_what_saves_memory_changes_nothing_but_rounding(run, taller, tmp_path, more):
    arguments = ("heal", taller, tmp_path / "one", "--steps", 10)
    assert run(*arguments)[0] == 0
    assert run("heal", taller, tmp_path / "two", "--steps", 10, *more)[0] == 0
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(np.allclose(ours[name], theirs[name], atol=2e-3) for name in ours)


def test_an_optimiser_of_its_own_memory_gives_the_same_bytes(run, taller, tmp_path):
    for name, more in (("one", ()), ("two", ("--offload",))):
        assert run("heal", taller, tmp_path / name, "--steps", 30, *more)[0] == 0
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_model_spread_over_devices_gives_the_same_bytes(run, taller, tmp_path, monkeypatch):
    # Without accelerators, accelerate spreads a model over the CPU alone.
    arguments = ("heal", taller, tmp_path / "one", "--steps", 25)
    assert run(*arguments)[0] == 0
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    arguments = ("heal", taller, tmp_path / "two", "--steps", 25, "--device", "auto")
    status, printed, error = run(*arguments)
    assert status == 0, error
    assert "Memory of each of 2 devices" in printed
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_bfloat16(run, taller, tmp_path):
    arguments = ("heal", taller, tmp_path / "out", "--steps", 25, "--dtype", "bfloat16", "--json")
    status, printed, error = run(*arguments)
    assert status == 0, error
    found = json.loads(printed)
    assert found["after"]["nats"] < found["before"]["nats"]


def refused(run, *arguments) -> str:
    status, _, error = run("heal", *arguments)
    assert status == 2 and "Traceback" not in error
    return error


def test_what_is_refused(run, pair, taller, tmp_path, donors):
    out = tmp_path / "out"
    assert "--donor" in refused(run, pair["one"], out)
    whole = stack(tmp_path / "..", (pair["one"], 0, 4))
    assert "with seams" in refused(run, whole, out, "--scope", "seams")
    taller = stack(tmp_path, (pair["one"], 0, 3), (pair["other"], 1, 4))
    assert "--scope lora" in refused(run, taller, out, "--adapter")
    assert "merge the recipe" in refused(run, taller, out, "--adapter", "--scope", "lora")
    error = refused(run, taller, out, "--memory", "1MB", "--scope", "all")
    assert "--scope all" in error and "0.0 GiB available" in error
    text = tmp_path / "text.txt"
    text.write_text(text_from(pair["one"], 64))
    assert "not trained on" in refused(run, taller, out, "--on", text, "--text", text)
    assert "omit --mix" in refused(run, taller, out, "--teacher", "none", "--mix", "0.5")
    out.mkdir()
    (out / "file").touch()
    assert "something is there" in refused(run, taller, out)
    assert not (tmp_path / "out.heal").exists()
    (tmp_path / "new.heal").touch()
    assert "for the state" in refused(run, taller, tmp_path / "new")


@pytest.mark.slow
def test_other_options_do_not_continue_a_state(taller, tmp_path):
    output = tmp_path / "out"
    assert killed(taller, output, 80, "seams") == -signal.SIGKILL
    found = heal(taller, output, HealOptions(steps=30))
    fresh = heal(taller, tmp_path / "fresh", HealOptions(steps=30))
    assert found is not None and fresh is not None
    assert changed_names(output, tmp_path / "fresh") == set()
    assert load_recipe(output / "recipe.yaml").key == load_recipe(taller).key


TOGETHER = """
import sys
from pathlib import Path
from frankenmerge.workflows.healing import HealOptions, heal
found = heal(Path(sys.argv[1]), Path(sys.argv[2]), HealOptions(steps=10, scope="seams"))
print(found is not None)
"""


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(taller, tmp_path):
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
        script = tmp_path / "together.py"
        script.write_text(TOGETHER)
        command += [str(script), str(taller), str(tmp_path / str(count))]
        folder = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": folder}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert ran.returncode == 0, ran.stderr
        assert sorted(ran.stdout.split()) == ["False", "True"][2 - count :]
    ours, theirs = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert all(np.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
