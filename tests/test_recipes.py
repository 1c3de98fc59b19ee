"""Every shipped recipe is valid, has its published size, and makes what transformers loads.

Its donors are stand-ins of the real ones' shapes: headers over holes, which take no disk.
"""

from pathlib import Path

import pytest
import torch
from conftest import write_stand_in
from transformers import AutoConfig, AutoModelForCausalLM

from frankenmerge.artefacts.recipe_file import load_recipes
from frankenmerge.splicing.stages import resolve_stages
from frankenmerge.splicing.summary import summary

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PATHS = sorted(RECIPES.rglob("*.yaml"))

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
LLAMA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
OF_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN_72B = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
MISTRAL = ("mistral", OF_8B | {"vocab_size": 32000})

DONORS = {
    "Xwin-LM/Xwin-LM-70B-V0.1": ("llama", LLAMA_70B | {"vocab_size": 32000}),
    "Sao10K/Euryale-1.3-L2-70B": ("llama", LLAMA_70B | {"vocab_size": 32000}),
    "cognitivecomputations/dolphin-2.2-70b": ("llama", LLAMA_70B | {"vocab_size": 32000}),
    "152334H/miqu-1-70b-sf": ("llama", LLAMA_70B | {"vocab_size": 32000}),
    "lizpreciatior/lzlv_70b_fp16_hf": ("llama", LLAMA_70B | {"vocab_size": 32000}),
    "meta-llama/Meta-Llama-3-70B-Instruct": ("llama", LLAMA_70B | {"vocab_size": 128256}),
    "meta-llama/Meta-Llama-3-8B-Instruct": ("llama", OF_8B | {"vocab_size": 128256}),
    "microsoft/Orca-2-13b": ("llama", LLAMA_13B | {"vocab_size": 32000}),
    "KoboldAI/LLaMA2-13B-Psyfighter2": ("llama", LLAMA_13B | {"vocab_size": 32000}),
    "MaziyarPanahi/calme-2.1-qwen2-72b": ("qwen2", QWEN_72B | {"vocab_size": 152064}),
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL,
    "rishiraj/CatPPT-base": MISTRAL,
    "OpenPipe/mistral-ft-optimized-1218": MISTRAL,
    "mlabonne/NeuralHermes-2.5-Mistral-7B": MISTRAL,
    "teknium/OpenHermes-2.5-Mistral-7B": ("mistral", OF_8B | {"vocab_size": 32002}),
}
CHAT_TOKENS = {"<|im_end|>": 32000, "<|im_start|>": 32001}

PUBLISHED = {
    "goliath-120b": (137, 118e9),
    "meta-llama-3-120b-instruct": (140, 122e9),
    "megadolphin-120b": (140, 120e9),
    "miqu-1-120b": (140, 120e9),
    "venus-120b-v1.2": (140, 120e9),
    "solar-10.7b": (48, 10.7e9),
    "mistral-11b": (48, 10.7e9),
    "longcat-10.7b": (48, 10.7e9),
    "psyonic-cetacean-20b": (62, 20e9),
    "llama-3-13b": (55, 13e9),
    "neural-pipe-9b": (40, 9e9),
    "rys-xlarge": (87, 78e9),
    "pruneme-mistral-24": (24, 5.5e9),
}
"""Blocks, and parameters as far as the models' names and cards give them."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A folder with a stand-in for every donor of the recipes, under its hub id."""
    root, made = tmp_path_factory.mktemp("shelf"), {}
    for name, (family, sizes) in DONORS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (form := str(sizes)) in made:
            (root / name).symlink_to(made[form])
            continue
        added = CHAT_TOKENS if sizes["vocab_size"] == 32002 else {}
        folder = made[form] = write_stand_in(
            root / name, family, tokens=sizes["vocab_size"] - len(added), **sizes
        )
        if added:
            text = (folder / "tokenizer.json").read_text()
            entries = ", ".join(
                f'{{"id": {index}, "content": "{token}", "special": true}}'
                for token, index in added.items()
            )
            (folder / "tokenizer.json").write_text(
                text.replace('"added_tokens": []', f'"added_tokens": [{entries}]')
            )
    return root


@pytest.fixture
def stages(shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(shelf)
    return lambda path: resolve_stages(load_recipes(path), tmp_path, place=path.stem).all


def test_every_published_recipe_is_there():
    assert set(PUBLISHED) == {path.stem for path in RECIPES.glob("*.yaml")}


def stored_shapes(state):
    """Shapes as checkpoints have them: Mixtral's experts one by one, and not packed."""
    for name, tensor in state.items():
        inside, _, packed = name.partition(".mlp.experts.")
        maps = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}.get(packed, ())
        count, *shape = tensor.shape
        for each in (f"{number}.{one}" for number in range(count) for one in maps):
            rows = shape[0] // len(maps)
            yield f"{inside}.block_sparse_moe.experts.{each}.weight", (rows, *shape[1:])
        if not maps:
            yield name.replace(".mlp.gate.", ".block_sparse_moe.gate."), tuple(tensor.shape)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_shipped_recipe_makes_the_tensors_of_its_config(path, stages):
    for splice in stages(path):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**splice.config))
        wanted = dict(stored_shapes(model.state_dict()))
        assert {operation.name: tuple(operation.shape) for operation in splice.operations} == wanted
        assert {operation.dtype for operation in splice.operations} == {"BF16"}
        assert AutoConfig.for_model(**splice.config).dtype == torch.bfloat16


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_known_frankenmerge_has_its_published_size(name, stages):
    (stage,) = stages(RECIPES / f"{name}.yaml")
    found = summary(stage)
    depth, parameters = PUBLISHED[name]
    assert found.depth == depth
    assert found.parameters == pytest.approx(parameters, rel=0.02)
    assert found.computed == 0 and found.bytes == 2 * found.parameters


def test_the_figures_of_check_are_those_of_the_model(stages):
    (stage,) = stages(RECIPES / "goliath-120b.yaml")
    found = summary(stage)
    width, inner, keys = 8192, 28672, 8 * 128
    block = 2 * width * width + 2 * width * keys + 3 * width * inner + 2 * width
    assert found.parameters == 137 * block + 2 * 32000 * width + width
    assert found.kv_cache_per_token == 137 * 2 * keys * 2
    assert found.memory == {"bfloat16": 2 * found.parameters, "float32": 4 * found.parameters}
    assert (found.seams, found.tensors) == (8, 137 * 9 + 3)
