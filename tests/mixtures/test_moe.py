"""`frankenmerge moe`: what it writes computes what a mixture of the donors computes."""

import json

import pytest
import torch
from mixture_cases import (
    CASES,
    PROMPTS,
    RUNNABLE,
    config_of,
    defined,
    loaded,
    mixture,
    tensors_of,
    write_config,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

IDS = torch.tensor([[0, 5, 9, 3, 17, 22, 4, 8], [0, 1, 30, 31, 2, 7, 7, 12]])


def close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.fixture
def write(tmp_path, run):
    """Write a mixture with the command; returns its folder."""

    def call(data, *options, name="out"):
        config = write_config(tmp_path / f"{name}.yaml", data)
        code, _, err = run("moe", config, tmp_path / name, *options)
        assert code == 0, err
        return tmp_path / name

    return call


@pytest.mark.parametrize("case", RUNNABLE)
@torch.no_grad()
def test_a_mixture_computes_what_it_is_defined_as(case, experts, write):
    data = mixture(case, experts[CASES[case][0]])
    folder = write(data)
    assert config_of(folder)["model_type"] == case.split()[0]
    close(loaded(folder)(IDS).logits, defined(data, folder)(IDS).logits)


@pytest.mark.parametrize("case", RUNNABLE)
@torch.no_grad()
def test_a_mixture_of_equal_experts_is_the_dense_model(case, experts, write):
    base = experts[CASES[case][0]][0]
    data = mixture(case, [base] * 4)
    for shared in data.get("shared_experts", []):
        shared["residual_scale"] = 0.0
    dense = AutoModelForCausalLM.from_pretrained(base).eval()
    close(loaded(write(data))(IDS).logits, dense(IDS).logits)


def test_deepseek_has_the_donors_tensors_under_its_names(experts, write):
    donors = experts["llama"]
    made = tensors_of(write(mixture("deepseek", donors)))
    stored = [tensors_of(donor) for donor in donors]
    for index in range(2):
        prefix = f"model.layers.{index}."
        for name in ("gate_proj", "up_proj", "down_proj"):
            dense = f"{prefix}mlp.{name}.weight"
            for number, donor in enumerate(stored[1:]):
                own = made.pop(f"{prefix}mlp.experts.{number}.{name}.weight")
                assert torch.equal(own, donor[dense])
            scale = 0.25 if name == "down_proj" else 1
            shared = made.pop(f"{prefix}mlp.shared_experts.{name}.weight")
            assert torch.equal(shared, scale * stored[0][dense])
        assert made.pop(f"{prefix}mlp.gate.weight").shape == (3, 16)
    assert made.keys() == {name for name in stored[0] if ".mlp." not in name}
    assert all(torch.equal(tensor, stored[0][name]) for name, tensor in made.items())


def test_deepseek_has_the_config_of_its_first_version(experts, write):
    config = config_of(write(mixture("deepseek", experts["llama"])))
    expected = {
        "model_type": "deepseek",
        "n_routed_experts": 3,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "rope_theta": 10000.0,
    }
    assert {key: config[key] for key in expected} == expected


@torch.no_grad()
def last_states(donor, prompts: list[str]) -> torch.Tensor:
    """The mean over prompts of what enters each block at the last token `[l, d]`."""
    tokenizer = AutoTokenizer.from_pretrained(donor)
    model = AutoModelForCausalLM.from_pretrained(donor).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer("<s>" + prompt, add_special_tokens=False)["input_ids"]])
        states = model(ids, output_hidden_states=True).hidden_states[:-1]
        found.append(torch.stack([each[0, -1] for each in states]))
    return torch.stack(found).mean(0)


def gates_of(folder) -> list[torch.Tensor]:
    made = tensors_of(folder)
    names = [f"model.layers.{index}.block_sparse_moe.gate.weight" for index in range(2)]
    return [made[name] for name in names]


def test_hidden_gates_are_the_states_of_prompts(experts, write):
    base, *_ = experts["llama"]
    data = mixture("mixtral", experts["llama"])
    data["experts"][0]["negative_prompts"] = ["a mat", "Sat"]
    expected = [last_states(base, prompts) for prompts in PROMPTS]
    expected[0] = expected[0] - last_states(base, ["a mat", "Sat"])
    unit = torch.stack([each / each.norm(dim=-1, keepdim=True) for each in expected], 1)
    for gate, rows in zip(gates_of(write(data)), unit, strict=True):
        close(gate, rows)


def test_embedding_gates_are_sums_of_embeddings(experts, write):
    base, *_ = experts["llama"]
    data = mixture("mixtral", experts["llama"], gate_mode="cheap_embed")
    data["experts"][1]["negative_prompts"] = ["fox"]
    embedding = tensors_of(base)["model.embed_tokens.weight"]
    tokenizer = AutoTokenizer.from_pretrained(base)

    def unit(prompts):
        ids = [tokenizer("<s>" + each, add_special_tokens=False)["input_ids"] for each in prompts]
        total = embedding[torch.tensor(sum(ids, []))].sum(0)
        return total / total.norm()

    rows = [unit(prompts) for prompts in PROMPTS]
    rows[1] = rows[1] - unit(["fox"])
    rows[1] = rows[1] / rows[1].norm()
    for gate in gates_of(write(data)):
        close(gate, torch.stack(rows))


def test_random_gates_depend_on_the_seed_alone(experts, write):
    data = mixture("mixtral", experts["llama"], gate_mode="random")
    for expert in data["experts"]:
        del expert["positive_prompts"]
    one, same, other = (
        gates_of(write(data, "--seed", seed, name=name))
        for name, seed in (("one", 3), ("same", 3), ("other", 4))
    )
    assert all(map(torch.equal, one, same)) and not any(map(torch.equal, one, other))
    assert not torch.equal(one[0], one[1])
    uniform = gates_of(write(data | {"gate_mode": "uniform_random"}, name="uniform"))
    assert 0.2 < max(gate.abs().max() for gate in uniform) <= 0.25  # 1 / sqrt(16)
    assert torch.cat(one).std() == pytest.approx(1, abs=0.25)


def test_noise_and_scale_change_an_expert(experts, write):
    data = mixture("mixtral", experts["llama"])
    data["experts"][0] |= {"noise_scale": 0.5, "residual_scale": 0.1}
    first, again = tensors_of(write(data)), tensors_of(write(data, name="again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    donor = tensors_of(experts["llama"][1])
    prefix = "model.layers.0."
    for name, renamed, scale in (("gate_proj", "w1", 1), ("down_proj", "w2", 0.1)):
        made = first[f"{prefix}block_sparse_moe.experts.0.{renamed}.weight"]
        noise = made / scale - donor[f"{prefix}mlp.{name}.weight"]
        assert noise.std() == pytest.approx(0.5, rel=0.2) and noise.mean().abs() < 0.1


def test_a_type_of_its_own_is_rounded_once(experts, write):
    made = tensors_of(write(mixture("mixtral", experts["llama"], dtype="bfloat16")))
    donor = tensors_of(experts["llama"][1])
    expert = made["model.layers.1.block_sparse_moe.experts.0.w3.weight"]
    assert torch.equal(expert, donor["model.layers.1.mlp.up_proj.weight"].bfloat16())
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}


@torch.no_grad()
def test_shards_load_as_one_file_does(experts, write):
    data = mixture("qwen3_moe", experts["qwen3"])
    whole, parts = write(data), write(data, "--shard-size", "10KB", name="parts")
    assert len(list(parts.glob("*.safetensors"))) > 2
    assert torch.equal(loaded(whole)(IDS).logits, loaded(parts)(IDS).logits)


def test_json_names_what_was_written(experts, tmp_path, run):
    config = write_config(tmp_path / "m.yaml", mixture("mixtral", experts["llama"]))
    code, text, _ = run("moe", config, tmp_path / "out", "--dry-run", "--json")
    dry = json.loads(text)
    assert (code, dry["experts"], dry["depth"]) == (0, 3, 2)
    assert not (tmp_path / "out").exists()
    code, text, _ = run("moe", config, tmp_path / "out", "--json")
    found = json.loads(text)
    assert found["experts"] == 3 and found["output"] == str(tmp_path / "out")
    assert found["bytes"] == dry["bytes"] and found["tensors"] == len(tensors_of(tmp_path / "out"))


def test_check_says_what_a_mixture_becomes(experts, tmp_path, run):
    config = write_config(tmp_path / "m.yaml", mixture("qwen2_moe", experts["qwen2"]))
    code, out, _ = run("check", config)
    assert code == 0 and "3, 2 a token (qwen2_moe)" in out
    code, out, _ = run("check", config, "--json")
    assert json.loads(out)["experts"] == 3


def test_the_written_recipe_makes_the_same_again(experts, write, tmp_path, run):
    folder = write(mixture("qwen2_moe", experts["qwen2"]))
    code, out, err = run("check", folder)
    assert code == 0, err
    code, _, err = run("merge", folder / "recipe.yaml", tmp_path / "again")
    assert code == 0, err
    first, again = tensors_of(folder), tensors_of(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_changed_expert_is_found(experts, write, run):
    from safetensors.torch import save_file

    folder = write(mixture("mixtral", experts["llama"]))
    made = tensors_of(folder)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    made[name] = made[name] + 1
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    code, _, err = run("check", folder)
    assert code == 2 and "model.safetensors" in err


def test_a_stage_can_be_an_expert(experts, tmp_path, run):
    donors = experts["llama"]
    average = {
        "name": "average",
        "merge_method": "linear",
        "models": [{"model": str(donor), "parameters": {"weight": 0.5}} for donor in donors[1:3]],
    }
    data = mixture("mixtral", donors)
    data["experts"][2]["source_model"] = "average"
    config = tmp_path / "m.yaml"
    write_config(config, [average, data])
    code, _, err = run("moe", config, tmp_path / "out")
    assert code == 0, err
    name = "model.layers.1.mlp.up_proj.weight"
    one, other = (tensors_of(donor)[name] for donor in donors[1:3])
    made = tensors_of(tmp_path / "out")["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    close(made, (one + other) / 2)


def test_a_recipe_without_experts_is_refused(donors, tmp_path, run):
    recipe = {"merge_method": "passthrough", "models": [{"model": str(donors["a"])}]}
    config = write_config(tmp_path / "r.yaml", recipe)
    code, _, err = run("moe", config, tmp_path / "out")
    assert code == 2 and "r.yaml: experts" in err and "frankenmerge merge" in err
