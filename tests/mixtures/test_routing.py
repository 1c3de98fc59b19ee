"""Mixtures in memory, and where held-out prompts are routed, compared with transformers' router."""

import json

import pytest
import torch
from conftest import meter, resolved
from mixture_cases import (
    CASES,
    PROMPTS,
    RUNNABLE,
    loaded,
    mixture,
    tensors_of,
    write_config,
)
from transformers import AutoTokenizer

import frankenmerge as fm
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.evaluation.routing import measured_routing
from frankenmerge.merging.write_plan import MergeOptions
from frankenmerge.merging.writer import merge
from frankenmerge.models.loading import load_model
from frankenmerge.splicing.assemble import assemble
from frankenmerge.splicing.gates import with_gates

IDS = torch.tensor([[0, 5, 9, 3, 17, 22, 4, 8]])


@pytest.mark.parametrize("case", RUNNABLE)
@torch.no_grad()
def test_a_mixture_in_memory_is_the_written_one(case, experts, tmp_path, run):
    config = write_config(tmp_path / "m.yaml", mixture(case, experts[CASES[case][0]]))
    assert run("moe", config, tmp_path / "out")[0] == 0
    splice = with_gates(resolved(load_recipe(config)))
    models = {name: load_model(splice.donors[name]) for name in splice.copied_donors}
    assert torch.equal(assemble(splice, models)(IDS).logits, loaded(tmp_path / "out")(IDS).logits)


def test_evaluate_measures_a_mixture_next_to_its_donors(experts, tmp_path, text, run):
    config = write_config(tmp_path / "m.yaml", mixture("mixtral", experts["llama"]))
    out = tmp_path / "out"
    assert run("moe", config, out)[0] == 0
    code, found, err = run("evaluate", config, out, "--text", text, "--json")
    assert code == 0, err
    models = {each["name"]: each for each in json.loads(found)["models"]}
    assert models.keys() == {str(config), str(out), *map(str, experts["llama"])}
    bits = [models[str(each)]["bits_per_byte"] for each in (config, out)]
    assert bits[0] == bits[1]
    code, found, err = run("evaluate", out, "--text", text, "--compare", "10", "--json")
    assert code == 0, err
    assert len(json.loads(found)["models"]) == 5


def choices(folder, prompts: list[str]) -> list[torch.Tensor]:
    """The first expert of every token of every prompt in every block, `[l, s]`, without BOS."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), loaded(folder)
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer("<s>" + prompt, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            scores = model(ids, output_router_logits=True).router_logits
        found.append(torch.stack([each.argmax(-1) for each in scores])[:, 1:])
    return found


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "qwen2_moe of llama"])
def test_routing_is_that_of_mixtures_made_without_the_prompts(case, experts, tmp_path, run):
    data = mixture(case, experts[CASES[case][0]])
    prompts = [["the quick", "brown", "a fox", "lion"], ["jumps over", "lazy"], ["Sat on", "a mat"]]
    for expert, own in zip(data["experts"], prompts, strict=True):
        expert["positive_prompts"] = own
    data["experts"][0] |= {"noise_scale": 0.1, "negative_prompts": ["lazy", "dogs"]}
    hits: list[list[torch.Tensor]] = [[] for _ in prompts]
    rights = [0] * 3
    for fold in range(2):
        held = [own[fold::2] for own in prompts]
        part = json.loads(json.dumps(data))
        for expert, own in zip(part["experts"], prompts, strict=True):
            expert["positive_prompts"] = own[1 - fold :: 2]
        kept = [each for each in ("lazy", "dogs") if each not in sum(held, [])]
        part["experts"][0]["negative_prompts"] = kept
        config = write_config(tmp_path / f"{fold}.yaml", part)
        assert run("moe", config, tmp_path / f"fold{fold}")[0] == 0
        for number, own in enumerate(held):
            for chosen in choices(tmp_path / f"fold{fold}", own):
                hits[number].append((chosen == number).flatten())
                rights[number] += int(torch.bincount(chosen.flatten()).argmax()) == number
    config = write_config(tmp_path / "m.yaml", data)
    found = measured_routing(resolved(load_recipe(config)))
    assert [each.right for each in found.experts] == rights
    assert [each.prompts for each in found.experts] == [4, 2, 2]
    expected = [float(torch.cat(each).double().mean()) for each in hits]
    assert [each.tokens for each in found.experts] == pytest.approx(expected)
    assert found.chance == pytest.approx(1 / 3)


def test_routing_is_measured_from_python(experts, tmp_path):
    config = write_config(tmp_path / "m.yaml", mixture("qwen3_moe", experts["qwen3"]))
    found = fm.routing(config)
    assert found.total.prompts == sum(map(len, PROMPTS)) and len(found.blocks) == 2


def test_an_interrupted_mixture_is_finished(experts, tmp_path):
    config = write_config(tmp_path / "m.yaml", mixture("mixtral", experts["llama"]))
    options = MergeOptions(resume=True, shard_size=4000)
    done = []

    def interrupt(count: int) -> None:
        done.append(count)
        if sum(done) > 20_000:
            raise KeyboardInterrupt

    def splice():
        return with_gates(resolved(load_recipe(config)))

    with pytest.raises(KeyboardInterrupt):
        merge(splice(), tmp_path / "out", options, progress=meter(interrupt))
    assert not (tmp_path / "out").exists()
    assert merge(splice(), tmp_path / "out", options).kept > 0
    merge(splice(), tmp_path / "whole")
    ours, whole = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in ours)


def test_measure_reports_intervals_and_writes_nothing_in_a_dry_run(experts, tmp_path, run):
    config = write_config(tmp_path / "m.yaml", mixture("mixtral", experts["llama"]))
    code, out, err = run("moe", config, tmp_path / "out", "--measure", "--dry-run", "--json")
    assert code == 0, err
    routing = json.loads(out)["routing"]
    assert len(routing["experts"]) == 3 and len(routing["blocks"]) == 2
    assert routing["prompts"] == sum(map(len, PROMPTS))
    low, high = routing["interval"]
    assert 0 <= low < routing["accuracy"] < high <= 1 or routing["accuracy"] in (0, 1)
    assert not (tmp_path / "out").exists()
    code, out, _ = run("moe", config, tmp_path / "out", "--measure")
    assert code == 0 and "Chance: 33%" in out and (tmp_path / "out" / "config.json").exists()


def test_a_single_prompt_cannot_be_held_out(experts, tmp_path, run):
    data = mixture("mixtral", experts["llama"])
    data["experts"][1]["positive_prompts"] = ["alone"]
    config = write_config(tmp_path / "m.yaml", data)
    code, _, err = run("moe", config, tmp_path / "out", "--measure")
    assert code == 2 and "experts[1].positive_prompts" in err and "omit --measure" in err
