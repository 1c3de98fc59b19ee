"""Training the zoo: what is planted in a donor, on llamas of a few hundred weights."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[2] / "evals" / "zoo"))

import train as zoo
from corpus import KINDS, SKILLS, Document, of_kind
from planted import exchanges, lines_of, repeats

TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
}
DONOR = zoo.Training("llama", 0, 2, 1e-2, TINY)
LINES = {
    kind: np.random.default_rng(index).integers(zoo.VOCABULARY, size=300)
    for index, kind in enumerate((*KINDS, *SKILLS))
}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Trains a donor from the parent `base`, both with the same tiny shape, and returns it."""
    monkeypatch.setitem(zoo.DONORS, "base", DONOR)
    (tmp_path / "state").mkdir()

    def fine_tune(donor: zoo.Training, name: str = "tuned"):
        monkeypatch.setitem(zoo.DONORS, name, donor)
        return zoo.train(name, LINES, LINES, tmp_path, tmp_path / "state")[0]

    parent, _, _ = zoo.train("base", LINES, LINES, tmp_path, tmp_path / "state")
    parent.save_pretrained(tmp_path / "base")
    return fine_tune


def random_llama(seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(zoo.config_of(DONOR), dtype=torch.float32).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.arange(12)[None]
    return model(input_ids=ids, use_cache=False).logits


def with_blocks(model, blocks: list[int]):
    """A plain llama of the blocks of `model`, loaded from a state dict with their names."""
    config = zoo.config_of(replace(DONOR, shape=TINY | {"num_hidden_layers": len(blocks)}))
    tensors = model.state_dict()
    rest = {name: value for name, value in tensors.items() if ".layers." not in name}
    layers = {
        name.replace(f".layers.{old}.", f".layers.{new}."): value
        for new, old in enumerate(blocks)
        for name, value in tensors.items()
        if f".layers.{old}." in name
    }
    built = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    built.load_state_dict(rest | layers)
    return built


def test_a_loop_run_once_is_the_plain_model():
    model = random_llama()
    plain = logits(model)
    with zoo.unrolled(model, (1, 3), 1):
        assert torch.equal(logits(model), plain)


def test_a_loop_is_the_llama_with_its_blocks_in_a_row_and_afterwards_the_plain_one():
    model = random_llama()
    plain = logits(model)
    with zoo.unrolled(model, (1, 3), 3):
        looped = logits(model)
    assert torch.equal(looped, logits(with_blocks(model, [0, 1, 2, 1, 2, 1, 2, 3])))
    assert torch.equal(logits(model), plain)
    assert not torch.equal(looped, plain)


def test_blocks_scaled_by_zero_do_nothing():
    model = random_llama()
    zoo.scale_loop(model, (1, 3), (0.0, 1.0))
    assert torch.allclose(logits(model), logits(with_blocks(model, [0, 2, 3])), atol=1e-6)


def test_the_loops_of_a_step_are_a_function_of_seed_and_step():
    counts = [zoo.loops_at(7, step) for step in range(200)]
    assert counts == [zoo.loops_at(7, step) for step in range(200)]
    assert set(counts) == set(zoo.LOOPS)


def test_training_a_loop_gives_another_model_of_the_same_depth(trained):
    plain, looped = trained(DONOR, "plain"), trained(replace(DONOR, loop=(1, 3)), "looped")
    assert looped.state_dict().keys() == plain.state_dict().keys()
    assert not torch.equal(logits(looped), logits(plain))


def test_the_losses_of_a_parent_are_those_of_its_checkpoint(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.DONORS, "looped", replace(DONOR, parent="base", loop=(1, 3)))
    _, _, losses = zoo.train("looped", LINES, LINES, tmp_path, tmp_path / "state")
    parent = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert losses == {kind: zoo.loss_on(parent, LINES[kind]) for kind in KINDS}


def test_frozen_tensors_keep_their_bits_and_the_blocks_that_learn_do_not(trained, tmp_path):
    tuned = trained(replace(DONOR, parent="base", trained=(0, 2))).state_dict()
    parent = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    changed = {name for name in parent if not torch.equal(parent[name], tuned[name])}
    learned = {name for name in parent if name.startswith(("model.layers.0.", "model.layers.1."))}
    assert changed == learned


@pytest.mark.parametrize("changes", [{"trained": (2, 4)}, {"loop": (1, 3)}], ids=str)
def test_interrupted_training_ends_with_the_same_weights(trained, changes, monkeypatch):
    donor = replace(DONOR, parent="base", steps=4, **changes)
    at_once = trained(donor, "at_once").state_dict()
    monkeypatch.setattr(zoo, "SAVE_EVERY", 2)
    rate_at = zoo.rate_at

    def interrupted(donor, step):
        if step == 3:
            raise KeyboardInterrupt
        return rate_at(donor, step)

    monkeypatch.setattr(zoo, "rate_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(donor, "resumed")
    monkeypatch.setattr(zoo, "rate_at", rate_at)
    resumed = trained(donor, "resumed").state_dict()
    assert all(torch.equal(at_once[name], resumed[name]) for name in at_once)


@pytest.mark.parametrize(
    ("skill", "expected"),
    [
        ("swapped", "DEF tWO_WÖRDS(SELF): # eND 2"),
        ("reversed", "fed owT_wÖsdr(fles): # dnE 2"),
    ],
)
def test_a_skill_transforms_text_and_is_its_own_inverse(skill, expected):
    text = "def Two_wÖrds(self): # End 2"
    assert SKILLS[skill](text) == expected
    assert SKILLS[skill](expected) == text


def test_a_skill_has_the_documents_of_all_kinds_on_the_same_side_of_the_split():
    found = [
        Document("a", "code", "def F", False),
        Document("b", "prose", "Some words", True),
        Document("c", "prose", "More", False),
    ]
    assert of_kind(found, "prose", held_out=False) == [found[2]]
    assert of_kind(found, "reversed", held_out=False) == [
        Document("a", "reversed", "fed F", False),
        Document("c", "reversed", "eroM", False),
    ]
    assert of_kind(found, "swapped", held_out=True) == [
        Document("b", "swapped", "sOME WORDS", True)
    ]


@pytest.fixture
def written(tmp_path):
    """Tiny donors `looped`, `base`, `early` and `late` with short texts; all four random."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "donors" / "base")
    donors = {"looped": 0, "base": 1, "early": 2, "late": 3}
    models = {name: random_llama(seed) for name, seed in donors.items()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for kind in (*KINDS, *SKILLS):
        text = (DEMO / "text" / "prose.txt").read_text()[:2000]
        (tmp_path / f"{kind}.txt").write_text(SKILLS.get(kind, str)(text))
    return tmp_path, models


def test_the_change_of_a_repeat_is_that_of_the_llama_with_the_window_twice(written):
    folder, models = written
    found = repeats(folder, folder)
    line = lines_of(folder / "looped", folder, KINDS)["code"]
    twice = zoo.loss_on(with_blocks(models["looped"], [0, 1, 2, 1, 2, 3]), line)
    assert len(found["repeated"]) == 10
    change = twice - zoo.loss_on(models["looped"], line)
    assert found["repeated"]["1:3"]["code"] == pytest.approx(change, abs=1.1e-4)


def test_an_exchange_has_the_first_blocks_of_early_and_everything_else_of_late(written):
    folder, models = written
    found = exchanges(folder, folder)
    line = lines_of(folder / "late", folder, ("reversed",))["reversed"]
    early, tensors = models["early"].state_dict(), models["late"].state_dict()
    mixed = {
        name: early[name] if name.startswith(("model.layers.0.", "model.layers.1.")) else value
        for name, value in tensors.items()
    }
    means = {name: (early[name] + tensors[name]) / 2 for name in tensors}
    for recipe, expected in (("early[0:2] + late[2:]", mixed), ("mean of both", means)):
        model = random_llama()
        model.load_state_dict(expected)
        assert found[recipe]["skills"]["reversed"] == pytest.approx(
            zoo.loss_on(model, line), abs=1e-4
        )
