"""Self-merges as adapters over the unrepeated base: what peft makes of them is the oracle."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_donor
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.healing import tokens
from frankenmerge.workflows.subjects import opened_subjects

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses deprecated names

RANGES = [(0, 3), (1, 3), (2, 4)]
IDS = torch.arange(1, 41)[None]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch, tmp_path):
    for name, rows in (("FITTING", 48), ("STOPPING", 16), ("CONFIRMING", 16)):
        monkeypatch.setattr(tokens, name, rows)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    return write_donor(tmp_path_factory.mktemp("base") / "one", seed=1)


def recipe_of(folder: Path, donor: Path | str, ranges=RANGES, **more) -> Path:
    slices = [
        {"sources": [{"model": str(donor), "layer_range": list(part)} | more]} for part in ranges
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    return path


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model(input_ids=IDS, use_cache=False).logits


def config(adapter: Path) -> dict:
    return json.loads((adapter / "adapter_config.json").read_text())


def losses(run, *models) -> dict[str, dict]:
    """What `evaluate` reports, by model."""
    text = Path(models[0]).parent / "text.txt"
    text.write_text("the cat sat on a mat and sang of other cats " * 20)
    status, printed, error = run("evaluate", *models, "--text", text, "--json")
    assert status == 0, error
    return {entry["name"]: entry for entry in json.loads(printed)["models"]}


SELF_MERGES = {
    "repeated": RANGES,
    "left out": [(0, 1), (3, 4)],
    "reordered": [(0, 1), (2, 3), (1, 2), (3, 4)],
}


@pytest.mark.parametrize("ranges", SELF_MERGES.values(), ids=SELF_MERGES)
def test_peft_makes_the_merged_model_of_an_adapter_of_zeros(run, donor, tmp_path, ranges):
    recipe = recipe_of(tmp_path, donor, ranges)
    assert run("merge", recipe, tmp_path / "merged")[0] == 0
    assert run("merge", recipe, tmp_path / "adapter", "--adapter")[0] == 0
    written = config(tmp_path / "adapter")
    assert written["base_model_name_or_path"] == str(donor)
    assert written["layer_replication"] == [list(each) for each in ranges]
    assert torch.equal(logits(donor, tmp_path / "adapter"), logits(tmp_path / "merged"))
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir()) < 10_000
    found = losses(run, tmp_path / "adapter", tmp_path / "merged")
    ours, theirs = (found[str(tmp_path / name)] for name in ("adapter", "merged"))
    assert ours["nats_per_token"] == theirs["nats_per_token"]
    assert str(donor) in found


def test_a_healed_adapter_is_the_folded_checkpoint(run, donor, tmp_path):
    recipe = recipe_of(tmp_path, donor)
    options = ("--scope", "lora", "--steps", 25)
    assert run("heal", recipe, tmp_path / "adapter", "--adapter", *options)[0] == 0
    assert run("heal", recipe, tmp_path / "folded", *options)[0] == 0
    assert run("merge", recipe, tmp_path / "merged")[0] == 0
    assert config(tmp_path / "adapter")["layer_replication"] == [list(each) for each in RANGES]
    alone, folded = logits(donor, tmp_path / "adapter"), logits(tmp_path / "folded")
    assert torch.allclose(alone, folded, atol=1e-4)
    assert not torch.allclose(folded, logits(tmp_path / "merged"), atol=1e-2)
    named = f"{donor}+{tmp_path / 'adapter'}"
    found = losses(run, tmp_path / "adapter", tmp_path / "folded", named)
    nats = [found[str(tmp_path / name)]["nats_per_token"] for name in ("adapter", "folded")]
    assert nats[0] == pytest.approx(nats[1], abs=1e-5)
    assert found[named]["nats_per_token"] == nats[0]
    assert "key" not in found[str(tmp_path / "adapter")]


def test_a_copy_without_replication_fits_the_merged_model(run, donor, tmp_path):
    """The remedy that is offered where such a LoRA is refused."""
    recipe = recipe_of(tmp_path, donor)
    adapter, copy = tmp_path / "adapter", tmp_path / "copy"
    options = ("--scope", "lora", "--steps", 25, "--adapter")
    assert run("heal", recipe, adapter, *options)[0] == 0
    assert run("merge", recipe, tmp_path / "merged")[0] == 0
    shutil.copytree(adapter, copy)
    (copy / "adapter_config.json").write_text(
        json.dumps(config(adapter) | {"layer_replication": None})
    )
    named = f"{tmp_path / 'merged'}+{copy}"
    found = losses(run, adapter, named)
    expected = found[str(adapter)]["nats_per_token"]
    assert found[named]["nats_per_token"] == pytest.approx(expected, abs=1e-5)


def test_repeated_blocks_take_no_memory(run, donor, tmp_path):
    recipe = recipe_of(tmp_path, donor, [(0, 4)] * 10)
    assert run("merge", recipe, tmp_path / "adapter", "--adapter")[0] == 0
    with opened_subjects([tmp_path / "adapter"]) as subjects:
        (name,) = subjects.names
        bench = Bench((), {str(donor): open_checkpoint(str(donor))})
        sizes = []

        def visit(subject) -> None:
            base = bench.load(str(donor)).model
            for models in ([base], [base, subject.model]):
                parts = {
                    each.data_ptr(): each.nbytes
                    for model in models
                    for each in model.state_dict().values()
                }
                sizes.append(sum(parts.values()))
            assert len(subject.model.model.layers) == 40

        bench.splice(name, subjects.splices[name], adapter=subjects.adapters[name], visit=visit)
    assert sizes[1] < 1.05 * sizes[0]


@pytest.mark.slow
def test_a_lora_alone_is_evaluated_on_its_base(run, donor, tmp_path):
    recipe = recipe_of(tmp_path, donor)
    assert run("merge", recipe, tmp_path / "merged")[0] == 0
    options = ("--scope", "lora", "--steps", 25)
    assert run("heal", tmp_path / "merged", tmp_path / "adapter", "--adapter", *options)[0] == 0
    assert config(tmp_path / "adapter")["layer_replication"] is None
    assert run("heal", tmp_path / "merged", tmp_path / "folded", *options)[0] == 0
    found = losses(run, tmp_path / "adapter", tmp_path / "folded")
    name = f"{tmp_path / 'merged'}+{tmp_path / 'adapter'}"
    folded = found[str(tmp_path / "folded")]["nats_per_token"]
    assert found[name]["nats_per_token"] == pytest.approx(folded, abs=1e-6)


def refused(run, *arguments) -> str:
    status, _, error = run(*arguments)
    assert status == 2 and "Traceback" not in error
    return error


def test_what_no_adapter_expresses_is_refused(run, donor, tmp_path):
    out = tmp_path / "out"
    damped = {"parameters": {"scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]}}
    recipe = recipe_of(tmp_path, donor, **damped)
    assert "o_proj" in refused(run, "merge", recipe, out, "--adapter")
    error = refused(run, "heal", recipe, out, "--adapter", "--scope", "lora")
    assert "o_proj" in error and "merge the recipe" in error
    whole = recipe_of(tmp_path, donor, [(0, 4)])
    assert "use the donor" in refused(run, "merge", whole, out, "--adapter")
    recipe = recipe_of(tmp_path, donor)
    error = refused(run, "merge", recipe, out, "--adapter", "--resume", "--shard-size", "1MB")
    assert "--shard-size, --resume" in error and "leave them out" in error
    assert not out.exists()


@pytest.mark.parametrize(("family", "found"), [("gpt2", "Could not locate"), ("qwen3", "layer_t")])
def test_families_that_peft_does_not_repeat_are_refused(run, tmp_path, family, found):
    donor = write_donor(tmp_path / "donor", family)
    error = refused(run, "merge", recipe_of(tmp_path, donor), tmp_path / "out", "--adapter")
    assert found in error


def test_elsewhere_a_lora_of_repeated_blocks_is_refused(run, donor, tmp_path):
    recipe = recipe_of(tmp_path, donor, [(0, 1), (2, 3), (1, 2), (3, 4)])
    adapter = tmp_path / "adapter"
    assert run("merge", recipe, adapter, "--adapter")[0] == 0
    other = recipe_of(tmp_path, f"{donor}+{adapter}", [(0, 4)])
    for command in (("merge", other, tmp_path / "out"), ("check", other)):
        error = refused(run, *command)
        assert "layer_replication" in error and "as slices" in error


@pytest.mark.parametrize("ranges", [[[0, 9]], [[2, 1]], [[0, "x"]], 3, [[-1, 2]]])
def test_ranges_that_the_base_does_not_have_are_refused(run, donor, tmp_path, ranges):
    adapter = tmp_path / "adapter"
    assert run("merge", recipe_of(tmp_path, donor), adapter, "--adapter")[0] == 0
    settings = config(adapter) | {"layer_replication": ranges}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat")
    assert "layer_replication" in refused(run, "evaluate", adapter, "--text", text)


def test_an_adapter_that_does_not_fit_or_has_no_base_is_refused(run, donor, tmp_path):
    adapter = tmp_path / "adapter"
    assert run("merge", recipe_of(tmp_path, donor), adapter, "--adapter")[0] == 0
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat")
    file = adapter / "adapter_model.safetensors"
    made = {name.replace("layers.0", "layers.9"): each for name, each in load_file(file).items()}
    whole = file.read_bytes()
    save_file(made, file)
    assert "without a place" in refused(run, "evaluate", adapter, "--text", text)
    file.write_bytes(whole)
    settings = config(adapter) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert "BASE+" in refused(run, "evaluate", adapter, "--text", text)
    assert run("evaluate", f"{donor}+{adapter}", "--text", text)[0] == 0
