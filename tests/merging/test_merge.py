"""Checkpoints on disk: every tensor the right donor's, every refusal without a trace."""

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import changed, in_memory, meter, resolved, write_donor, written
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.donors.families import FAMILIES
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.opening import open_donors
from frankenmerge.storage.safetensors_header import read_header

EMBEDDINGS = {
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "gpt_neox.embed_in.weight",
}
IDS = torch.tensor([[0, 7, 30, 7, 12, 41, 3, 3], [5, 5, 2, 47, 19, 1, 8, 0]])


def arrays_of(folder) -> dict[str, np.ndarray]:
    """All tensors of a folder, as the safetensors library reads them."""
    return {
        name: array
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name, array in load_file(file).items()
    }


def recipe_for(order, **fields) -> Recipe:
    """The recipe of blocks given as (folder, index)."""
    return recipe_of([Block(str(folder), index) for folder, index in order], **fields)


def merged(order, output, *, fields=(), **options):
    return written(recipe_for(order, **dict(fields)), output, **options)


def block_of(name: str) -> tuple[int | None, str]:
    """A tensor's block, and its name with the block left open."""
    found = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (
        (int(found[0]), name[: found.start()] + "{}" + name[found.end() :])
        if found
        else (None, name)
    )


def expected(order, head: str | None) -> dict[str, np.ndarray]:
    """The tensors of the model of `order`; `head` names the tensor of the last donor that becomes the head, if one is written."""
    donors = {folder: arrays_of(folder) for folder, _ in order}
    first, last = donors[order[0][0]], donors[order[-1][0]]
    result = {name: array for name, array in first.items() if name in EMBEDDINGS}
    for position, (folder, index) in enumerate(order):
        for name, array in donors[folder].items():
            if block_of(name)[0] == index:
                result[block_of(name)[1].format(position)] = array
    heads = ("lm_head.weight", "embed_out.weight")
    result |= {
        name: array
        for name, array in last.items()
        if block_of(name)[0] is None and name not in EMBEDDINGS and name not in heads
    }
    return result | (
        {"embed_out.weight" if head == "embed_out.weight" else "lm_head.weight": last[head]}
        if head
        else {}
    )


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    assert [
        name
        for name in wanted
        if found[name].dtype != wanted[name].dtype or not np.array_equal(found[name], wanted[name])
    ] == []


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, by path; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def load(folder) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert {kind: names for kind, names in info.items() if names} == {}
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def virtual(order) -> torch.nn.Module:
    return in_memory(recipe_for(order))


# Donors whose tensors say whose they are


def encoded(source: Path, folder: Path, number: int, shards: int = 1) -> Path:
    """Copy a donor, every tensor filled with 10,000 times `number`, 100 times its block (90: none) and its own number."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    arrays = arrays_of(source)
    kinds = sorted({block_of(name)[1] for name in arrays})
    filled = {}
    for name, array in arrays.items():
        block, kind = block_of(name)
        filled[name] = np.full_like(
            array, number * 10_000 + (90 if block is None else block) * 100 + kinds.index(kind)
        )
    names = sorted(filled)
    files = {
        f"model-{shard + 1:05d}-of-{shards:05d}.safetensors": names[shard::shards]
        for shard in range(shards)
    }
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        weight_map = {name: file for file, held in files.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    for file, held in files.items():
        save_file({name: filled[name] for name in held}, folder / file, {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def coded(donors, tmp_path_factory) -> dict[str, Path]:
    """Encoded donors: `a`, `c` untied, `b`, `t` tied, `deep` of 6 blocks in 3 shards, all Llamas; `g`, `h` GPT-2s."""
    root = tmp_path_factory.mktemp("coded")
    sources = {"a": "a", "b": "b", "c": "a", "t": "b", "deep": "deep", "g": "g", "h": "h"}
    return {
        name: encoded(donors[source], root / name, number, 3 if name == "deep" else 1)
        for number, (name, source) in enumerate(sources.items(), 1)
    }


def test_no_two_tensors_of_the_encoded_donors_are_equal(coded):
    values = [array.flat[0] for folder in coded.values() for array in arrays_of(folder).values()]
    assert len(set(values)) == len(values) and all(
        (array == array.flat[0]).all() for array in arrays_of(coded["a"]).values()
    )


def blocks(text: str) -> list[tuple[str, int]]:
    """`a0:3 c1` as (donor, index) pairs."""
    pairs = []
    for donor, start, stop in re.findall(r"([a-z]+)(\d+)(?::(\d+))?", text):
        pairs += [(donor, index) for index in range(int(start), int(stop or int(start) + 1))]
    return pairs


@pytest.mark.parametrize(
    "order, head",
    [
        pytest.param("a0:4", "lm_head.weight", id="one donor whole"),
        pytest.param("a0:3 c1:4", "lm_head.weight", id="more blocks"),
        pytest.param("a0:1 c3:4", "lm_head.weight", id="fewer blocks"),
        pytest.param("c2", "lm_head.weight", id="one block"),
        pytest.param("a0 c1 a2 c3 a1 c0", "lm_head.weight", id="interleaved"),
        pytest.param("a0:2 a1 a1 a2:4", "lm_head.weight", id="one block thrice"),
        pytest.param("a0:3 a1:4", "lm_head.weight", id="with itself"),
        pytest.param("a3 a2 a1 a0", "lm_head.weight", id="backwards"),
        pytest.param("a0:2 deep2:6", "lm_head.weight", id="ends in a deeper donor"),
        pytest.param("deep0:5 c3", "lm_head.weight", id="begins in a deeper donor"),
        pytest.param("a0 c1 deep5 b0 a3", "lm_head.weight", id="four donors"),
        pytest.param("a0:2 b2:4", "model.embed_tokens.weight", id="untied then tied"),
        pytest.param("b0:2 a2:4", "lm_head.weight", id="tied then untied"),
        pytest.param("b0:2 t2:4", "model.embed_tokens.weight", id="tied then tied"),
        pytest.param("b0:2 b1:4", None, id="tied with itself"),
        pytest.param("b0 a1 b2", None, id="an untied one inside a tied one"),
        pytest.param("a0 b1 a2", "lm_head.weight", id="a tied one inside an untied one"),
        pytest.param("g0:3 h1:4", "transformer.wte.weight", id="gpt2"),
        pytest.param("h0:3 h1:4", None, id="gpt2 with itself"),
    ],
)
def test_every_tensor_is_the_right_donors(coded, tmp_path, order, head):
    order = [(coded[name], index) for name, index in blocks(order)]
    result = merged(order, tmp_path / "out")
    found = arrays_of(tmp_path / "out")
    assert_equal(found, expected(order, head))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        config.get("num_hidden_layers") or config.get("n_layer"),
        config["tie_word_embeddings"],
    ) == (len(order), head is None)
    assert (result.tensors, result.bytes) == (
        len(found),
        sum(array.nbytes for array in found.values()),
    )


def test_the_base_gives_the_config_and_no_tensor(coded, donors, tmp_path):
    base = changed(
        coded["deep"],
        tmp_path / "base",
        config=lambda config: config | {"rms_norm_eps": 1e-5, "vocab_size": 48, "mark": "base"},
    )
    order = [(coded["a"], 0), (coded["c"], 1)]
    merged(order, tmp_path / "out", fields={"base_model": str(base)})
    assert_equal(arrays_of(tmp_path / "out"), expected(order, "lm_head.weight"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mark"], config["rms_norm_eps"], config["num_hidden_layers"]) == (
        "base",
        1e-5,
        2,
    )


def test_the_vocabulary_is_that_of_the_embedding_and_not_of_the_base(donors, tmp_path):
    base = write_donor(tmp_path / "base", seed=9, vocab_size=60)
    merged(
        [(donors["a"], 0), (donors["a"], 3)],
        tmp_path / "out",
        fields={"base_model": str(base), "tokenizer_source": str(donors["a"])},
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 48
    load(tmp_path / "out")


def test_a_tied_donor_that_stores_a_head_gives_its_embedding(coded, tmp_path):
    stored = changed(
        coded["b"],
        tmp_path / "stored",
        lambda all: all | {"lm_head.weight": np.full((48, 16), -1, np.float32)},
    )
    order = [(coded["a"], 0), (stored, 1)]
    merged(order, tmp_path / "out")
    assert_equal(arrays_of(tmp_path / "out"), expected(order, "model.embed_tokens.weight"))


def test_a_gpt2_config_that_does_not_speak_of_tying_is_tied(coded, tmp_path):
    silent = changed(
        coded["g"],
        tmp_path / "silent",
        config=lambda config: {key: config[key] for key in config if key != "tie_word_embeddings"},
    )
    merged([(silent, 0), (silent, 1)], tmp_path / "out")
    assert "lm_head.weight" not in arrays_of(tmp_path / "out")


def test_two_names_of_one_donor_make_the_same_tensors(coded, tmp_path):
    again = coded["b"].parent / "." / ".." / coded["b"].parent.name / "b"
    order = [(coded["b"], 0), (again, 1)]
    merged(order, tmp_path / "out")
    found = arrays_of(tmp_path / "out")
    assert_equal(
        {name: array for name, array in found.items() if name != "lm_head.weight"},
        expected(order, None),
    )


# Every family


def bare(folder: Path, target: Path) -> Path:
    """An old GPT-2 checkpoint: names without their prefix, and the buffers of its time."""

    def old(arrays):
        masks = {
            f"h.{block}.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.float32))
            for block in range(4)
        }
        return {name.removeprefix("transformer."): array for name, array in arrays.items()} | masks

    return changed(folder, target, old)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_result_of_every_family_is_what_the_splice_in_memory_computes(tmp_path, family):
    pair = [write_donor(tmp_path / str(seed), family, seed=seed) for seed in (1, 2)]
    order = [
        (pair[number], index) for number, index in ((0, 0), (0, 1), (1, 1), (1, 1), (0, 3), (1, 3))
    ]
    merged(order, tmp_path / "out")
    heads = (
        "lm_head.weight",
        "embed_out.weight",
        "model.embed_tokens.weight",
        "transformer.wte.weight",
    )
    head = next(name for name in heads if name in arrays_of(pair[1]))
    assert_equal(arrays_of(tmp_path / "out"), expected(order, head))
    model = load(tmp_path / "out")
    assert torch.equal(logits(model), logits(virtual(order)))
    assert (
        len({tuple(logits(load(path))[0, -1, :3].tolist()) for path in (*pair, tmp_path / "out")})
        == 3
    )


@pytest.mark.parametrize("first, last", [("a", "b"), ("b", "a"), ("b", "b"), ("a", "deep")])
def test_a_result_of_tied_and_untied_donors_is_what_the_splice_in_memory_computes(
    donors, tmp_path, first, last
):
    order = [(donors[first], 0), (donors[first], 1), (donors[last], 1), (donors[last], 3)]
    merged(order, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(virtual(order)))


@pytest.mark.parametrize("old_first", [True, False])
def test_old_names_of_gpt2_are_merged_with_new_ones(donors, tmp_path, old_first):
    new = [(donors["g"], 0), (donors["g"], 2), (donors["h"], 1), (donors["h"], 3)]
    replaced = donors["g" if old_first else "h"]
    old = bare(replaced, tmp_path / "old")
    order = [(old if folder == replaced else folder, index) for folder, index in new]
    merged(order, tmp_path / "out")
    assert_equal(arrays_of(tmp_path / "out"), expected(new, "transformer.wte.weight"))
    assert torch.equal(logits(load(tmp_path / "out")), logits(virtual(new)))
    assert torch.equal(logits(virtual(order)), logits(virtual(new)))


def test_kinds_of_attention_move_with_their_blocks(tmp_path):
    kinds = {
        "x": ["full_attention", "sliding_attention"] * 2,
        "y": ["sliding_attention"] * 2 + ["full_attention"] * 2,
    }
    pair = {
        name: write_donor(
            tmp_path / name,
            "qwen2",
            seed=seed,
            use_sliding_window=True,
            sliding_window=2,
            layer_types=kinds[name],
        )
        for seed, name in enumerate(kinds)
    }
    order = [(pair[name], index) for name, index in blocks("x0:2 y1:4")]
    merged(order, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "full_attention",
    ]
    assert torch.equal(logits(load(tmp_path / "out")), logits(virtual(order)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_copied_as_they_are(tmp_path, dtype):
    donor = write_donor(tmp_path / "donor", seed=1, dtype=dtype)
    merged([(donor, 0), (donor, 3), (donor, 2)], tmp_path / "out", fields={"dtype": dtype})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype
    theirs, ours = (
        read_header(folder / "model.safetensors") for folder in (donor, tmp_path / "out")
    )
    content = {
        folder: (folder / "model.safetensors").read_bytes() for folder in (donor, tmp_path / "out")
    }
    for position, index in enumerate((0, 3, 2)):
        for name in (name for name in theirs if f"layers.{index}." in name):
            a, b = theirs[name], ours[name.replace(f"layers.{index}.", f"layers.{position}.")]
            assert (a.dtype, a.shape, content[donor][a.start : a.stop]) == (
                b.dtype,
                b.shape,
                content[tmp_path / "out"][b.start : b.stop],
            )
    assert {parameter.dtype for parameter in load(tmp_path / "out").parameters()} == {
        getattr(torch, dtype)
    }


# Files of the result


@pytest.fixture
def order(coded):
    return [
        (coded["a"], 0),
        (coded["a"], 1),
        (coded["deep"], 1),
        (coded["deep"], 5),
        (coded["c"], 3),
    ]


def rank(name: str) -> int:
    block = block_of(name)[0]
    return (
        block if block is not None else -1 if name in EMBEDDINGS else 100 if "norm" in name else 101
    )


@pytest.mark.parametrize("shard_size", [10**9, 6000])
def test_tensors_lie_in_layer_order(order, tmp_path, shard_size):
    merged(order, tmp_path / "out", shard_size=shard_size)
    names = []
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        names += [
            name for name, _ in sorted(read_header(file).items(), key=lambda item: item[1].start)
        ]
    assert [rank(name) for name in names] == sorted(map(rank, names))
    assert len(names) == 5 * 9 + 3


@pytest.mark.parametrize("shard_size", [6000, 3500, 1000, 1])
def test_shards_keep_to_their_limit_and_the_index_is_right(order, tmp_path, shard_size):
    merged(order, tmp_path / "whole")
    merged(order, tmp_path / "out", shard_size=shard_size)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    sizes = [[array.nbytes for array in load_file(file).values()] for file in files]
    assert all(sum(held) <= shard_size or len(held) == 1 for held in sizes)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert_equal(arrays_of(tmp_path / "out"), arrays_of(tmp_path / "whole"))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_sharded_result_computes_the_same(donors, tmp_path):
    order = [(donors["a"], 0), (donors["deep"], 3), (donors["b"], 2)]
    merged(order, tmp_path / "whole")
    merged(order, tmp_path / "out", shard_size=4000)
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(tmp_path / "whole")))
    assert (
        open_checkpoint(str(tmp_path / "out")).fingerprint
        == open_checkpoint(str(tmp_path / "whole")).fingerprint
    )


def test_a_result_of_one_file_has_no_index(order, tmp_path):
    merged(order, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "frankenmerge.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.yaml",
        "splice.svg",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("shard_size", [10**9, 6000])
def test_the_same_inputs_give_the_same_bytes(order, tmp_path, shard_size):
    for name in ("one", "two"):
        merged(order, tmp_path / name, shard_size=shard_size)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_the_data_of_a_file_begins_at_a_multiple_of_eight(order, tmp_path):
    merged(order, tmp_path / "out", shard_size=6000)
    assert {
        int.from_bytes(file.read_bytes()[:8], "little") % 8
        for file in (tmp_path / "out").glob("*.safetensors")
    } == {0}
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "np") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_a_result_is_a_donor_again(order, tmp_path):
    merged(order, tmp_path / "out")
    second = [(tmp_path / "out", 4), (tmp_path / "out", 0)]
    merged(second, tmp_path / "again")
    assert_equal(arrays_of(tmp_path / "again"), expected(second, "lm_head.weight"))


def test_the_recipe_of_the_result_parses_to_the_recipe(order, tmp_path):
    recipe = recipe_for(
        order, base_model=str(order[0][0]), tokenizer_source="base", dtype="float32"
    )
    written(recipe, tmp_path / "out")
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == recipe


def test_the_provenance_names_every_tensors_donor(order, tmp_path):
    merged(order, tmp_path / "out", shard_size=6000)
    record = json.loads((tmp_path / "out" / "frankenmerge.json").read_text())
    found = arrays_of(tmp_path / "out")
    assert record["tensors"].keys() == found.keys()
    donors = {str(folder): arrays_of(folder) for folder, _ in order}
    for name, origin in record["tensors"].items():
        assert np.array_equal(found[name], donors[origin["donor"]][origin["tensor"]])
        assert origin["method"] == "copy"
    assert record["donors"] == {
        name: {"fingerprint": open_checkpoint(name).fingerprint} for name in donors
    }
    assert (
        record["recipe_sha256"]
        == hashlib.sha256((tmp_path / "out" / "recipe.yaml").read_bytes()).hexdigest()
    )


def test_the_card_says_what_was_stacked(order, tmp_path):
    merged(order, tmp_path / "out")
    a, deep, c = (str(folder) for folder in dict.fromkeys(folder for folder, _ in order))
    _, front, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "frankenmerge"],
    }
    assert "# A frankenmodel of 5 blocks" in body
    rows = [
        f"| 0-1 | {a} | 0-1 |",
        f"| 2-2 | {deep} | 1-1 |",
        f"| 3-3 | {deep} | 5-5 |",
        f"| 4-4 | {c} | 3-3 |",
    ]
    assert re.findall(r"^\| \d.*$", body, re.M) == rows
    assert f"Embedding: {a}. Final norm: {c}. Head: {c}. Tokenizer: {a}." in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]) == recipe_for(
        order
    ).model_dump(exclude_none=True)


def test_tokenizer_and_generation_config_are_those_of_the_donors_named(coded, tmp_path):
    named = {name: Path(shutil.copytree(coded[name], tmp_path / name)) for name in "abc"}
    for name, folder in named.items():
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (folder / file).write_text((folder / file).read_text() + "\n" * (ord(name) - 90))
    fields = {"base_model": str(named["b"]), "tokenizer_source": str(named["c"])}
    merged([(named["a"], 0)], tmp_path / "out", fields=fields)
    for file, source in (
        ("tokenizer.json", "c"),
        ("tokenizer_config.json", "c"),
        ("generation_config.json", "b"),
    ):
        assert (tmp_path / "out" / file).read_bytes() == (named[source] / file).read_bytes()


def test_progress_counts_every_byte(order, tmp_path):
    moved = []
    result = merged(order, tmp_path / "out", progress=meter(moved.append))
    assert sum(moved) == result.bytes and all(count > 0 for count in moved)


def test_an_empty_folder_becomes_the_output(order, tmp_path):
    (tmp_path / "out").mkdir()
    merged(order, tmp_path / "out")
    assert_equal(arrays_of(tmp_path / "out"), expected(order, "lm_head.weight"))


def test_an_output_in_folders_that_are_not_there_is_made(order, tmp_path):
    merged(order, tmp_path / "new" / "deeper" / "out")
    assert sorted(path.name for path in (tmp_path / "new" / "deeper").iterdir()) == ["out"]


def test_donors_are_left_as_they_were(coded, tmp_path):
    folder = Path(shutil.copytree(coded["a"], tmp_path / "donor"))
    before = tree(folder)
    merged([(folder, 0), (folder, 2)], tmp_path / "out")
    assert tree(folder) == before


# Refusals


def refused(recipe: Recipe, output: Path, room: Path, donors=None) -> tuple:
    """The faults of a merge that is refused, and leaves the folder `room` as it was."""
    before = tree(room)
    with pytest.raises(FrankenmergeError) as caught:
        written(recipe, output, donors=donors)
    assert tree(room) == before
    for fault in caught.value.faults:
        assert all(isinstance(part, str) and part.strip() for part in fault), fault
    return caught.value.faults


@pytest.fixture
def room(tmp_path) -> Path:
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


@pytest.mark.parametrize("content", ["x.txt", ".hidden"])
def test_an_output_that_holds_something_is_refused(order, room, content):
    (room / "out").mkdir()
    (room / "out" / content).write_text("mine")
    (fault,) = refused(recipe_for(order), room / "out", room)
    assert (fault.place, fault.found) == (str(room / "out"), "something is there")


def test_a_file_as_output_is_refused(order, room):
    (room / "out").write_text("mine")
    (fault,) = refused(recipe_for(order), room / "out", room)
    assert fault.place == str(room / "out")


def test_an_output_below_a_file_is_refused(order, room):
    (room / "file").write_text("mine")
    (fault,) = refused(recipe_for(order), room / "file" / "out", room)
    assert fault.place == str(room / "file" / "out")


@pytest.mark.parametrize("target", ["empty", "nowhere"])
def test_a_link_as_output_is_refused(order, room, target):
    (room / "empty").mkdir()
    (room / "out").symlink_to(room / target)
    (fault,) = refused(recipe_for(order), room / "out", room)
    assert fault.place == str(room / "out") and (room / "out").is_symlink()


@pytest.mark.parametrize("spelling", [".", "{}", "../out"])
def test_the_working_directory_as_output_is_refused(order, room, monkeypatch, spelling):
    (room / "out").mkdir()
    monkeypatch.chdir(room / "out")
    (fault,) = refused(recipe_for(order), Path(spelling.format(room / "out")), room)
    assert fault.found == "the working directory"


def test_a_mount_point_as_output_is_refused(order, room, monkeypatch):
    (room / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == room / "out")
    (fault,) = refused(recipe_for(order), room / "out", room)
    assert fault.found == "a mount point" and str(room / "out" / "merged") in fault.remedy


@pytest.mark.parametrize("inside", ["out", "deep/er/out"])
def test_an_output_inside_a_donor_is_refused(coded, room, inside):
    donor = Path(shutil.copytree(coded["a"], room / "donor"))
    (fault,) = refused(recipe_for([(donor, 0)]), donor / inside, room)
    assert fault.place == str(donor / inside) and str(donor) in fault.found


def test_an_output_inside_a_donor_through_a_link_is_refused(coded, room):
    donor = Path(shutil.copytree(coded["a"], room / "donor"))
    (room / "link").symlink_to(donor)
    (fault,) = refused(recipe_for([(donor, 0)]), room / "link" / "out", room)
    assert fault.place == str(room / "link" / "out")


def test_a_donor_as_output_is_refused(coded, room):
    donor = Path(shutil.copytree(coded["a"], room / "donor"))
    refused(recipe_for([(donor, 0)]), donor, room)


def test_an_output_around_a_donor_is_refused(coded, room):
    donor = Path(shutil.copytree(coded["a"], room / "out" / "donor"))
    refused(recipe_for([(donor, 0)]), room / "out", room)


def test_a_disk_that_is_too_small_is_refused(order, room, monkeypatch):
    usage = shutil.disk_usage(room)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 << 20))
    (fault,) = refused(recipe_for(order), room / "out", room)
    assert fault.place == str(room / "out") and fault.found == f"{64 << 20:,}"


def test_an_output_of_a_name_too_long_for_the_disk_is_refused(order, room):
    refused(recipe_for(order), room / ("x" * 300), room)


def test_an_output_of_the_longest_name_that_the_disk_takes_is_written(order, tmp_path):
    merged(order, tmp_path / ("x" * 255))
    assert_equal(arrays_of(tmp_path / ("x" * 255)), expected(order, "lm_head.weight"))


def test_a_range_past_the_end_is_refused(coded, room):
    recipe = recipe_for([(coded["a"], index) for index in (0, 1, 2, 3, 4)])
    (fault,) = refused(recipe, room / "out", room)
    assert (
        fault.place.endswith("slices[0].sources[0].layer_range")
        and "[0, 4]" in fault.expected
        and fault.found == "[0, 5]"
    )


@pytest.mark.parametrize(
    "other, reason", [("wide", "hidden_size: 16 and 32"), ("g", "family: llama and gpt2")]
)
def test_donors_of_another_shape_or_family_are_refused(donors, room, other, reason):
    found = refused(recipe_for([(donors["a"], 0), (donors[other], 1)]), room / "out", room)
    assert any(reason in fault.found for fault in found)


def test_donors_of_another_type_are_refused(donors, tmp_path, room):
    half = write_donor(tmp_path / "half", seed=1, dtype="bfloat16")
    found = refused(recipe_for([(donors["a"], 0), (half, 1)]), room / "out", room)
    assert (
        [fault.place for fault in found] == ["recipe: dtype"]
        and "float32" in found[0].found
        and "bfloat16" in found[0].found
    )


def test_quantised_donors_are_refused(coded, tmp_path, room):
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(4)]
    donor = changed(
        coded["a"],
        tmp_path / "int8",
        lambda all: all | {name: all[name].astype(np.int8) for name in names},
    )
    (fault,) = refused(recipe_for([(donor, 0)]), room / "out", room)
    assert fault.place == str(donor) and "I8" in fault.found


def test_a_donor_without_a_tokenizer_is_refused_where_its_tokenizer_is_needed(
    coded, tmp_path, room
):
    mute = Path(shutil.copytree(coded["a"], tmp_path / "mute"))
    (mute / "tokenizer.json").unlink()
    (fault,) = refused(recipe_for([(mute, 0), (coded["c"], 1)]), room / "out", room)
    assert fault.place == str(mute) and "tokenizer" in fault.expected
    merged([(mute, 0), (coded["c"], 1)], room / "out", fields={"tokenizer_source": str(coded["c"])})
    merged([(coded["c"], 0), (mute, 1)], room / "other")


def test_first_and_last_donors_of_other_vocabularies_are_refused(donors, tmp_path, room):
    more = write_donor(tmp_path / "more", seed=1, vocab_size=60)
    (fault,) = refused(recipe_for([(donors["a"], 0), (more, 1)]), room / "out", room)
    assert "48 and 60" in fault.found
    merged([(donors["a"], 0), (more, 1), (donors["a"], 2)], room / "out")


def test_all_faults_are_reported_together(donors, tmp_path, room):
    mute = Path(shutil.copytree(donors["a"], tmp_path / "mute"))
    (mute / "tokenizer.json").unlink()
    order = [(mute, 0), (mute, 1), (donors["wide"], 3), (donors["wide"], 4), (mute, 7)]
    found = [
        f"{fault.place} {fault.found}" for fault in refused(recipe_for(order), room / "out", room)
    ]
    ranges = ["slices[1].sources[0].layer_range [3, 5]", "slices[2].sources[0].layer_range [7, 8]"]
    for part in (*ranges, "hidden_size: 16 and 32", f"{mute} none"):
        assert any(part in fault for fault in found), part


# Interruptions


def without_room(*_arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def after(calls: int, real, wrong):
    """`real` for so many calls, then `wrong`."""
    left = iter(range(calls))
    return lambda *arguments: wrong(*arguments) if next(left, None) is None else real(*arguments)


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_a_disk_that_fills_up_leaves_nothing(order, room, monkeypatch, calls):
    recipe = recipe_for(order)
    donors = open_donors(recipe)
    monkeypatch.setattr(os, "copy_file_range", after(calls, os.copy_file_range, without_room))
    monkeypatch.setattr(os, "pwrite", without_room)
    (fault,) = refused(recipe, room / "out", room, donors)
    assert fault.place == str(room / "out") and "No space left" in fault.found


def test_a_disk_that_fills_up_leaves_no_folders_on_the_way(order, room, monkeypatch):
    recipe = recipe_for(order)
    donors = open_donors(recipe)
    monkeypatch.setattr(os, "copy_file_range", without_room)
    monkeypatch.setattr(os, "pwrite", without_room)
    refused(recipe, room / "new" / "out", room, donors)


def test_a_disk_that_fills_up_leaves_an_empty_folder_empty(order, room, monkeypatch):
    (room / "out").mkdir()
    monkeypatch.setattr(os, "copy_file_range", without_room)
    monkeypatch.setattr(os, "pwrite", without_room)
    refused(recipe_for(order), room / "out", room)


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_disk_that_does_not_sync_leaves_nothing(order, room, monkeypatch, calls):
    def broken(_handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", after(calls, os.fsync, broken))
    refused(recipe_for(order), room / "out", room)


def test_a_donor_that_has_shrunk_since_it_was_opened_is_refused(coded, tmp_path, room):
    donor = Path(shutil.copytree(coded["a"], tmp_path / "donor"))
    recipe = recipe_for([(donor, 0), (donor, 3)])
    opened = open_donors(recipe)
    os.truncate(donor / "model.safetensors", 9000)
    (fault,) = refused(recipe, room / "out", room, opened)
    assert fault.place == str(donor / "model.safetensors") and fault.found == "9,000"


@pytest.mark.parametrize("way", ["short chunks", "no such call"])
def test_a_donor_that_shrinks_meanwhile_leaves_nothing(coded, tmp_path, room, monkeypatch, way):
    donor = Path(shutil.copytree(coded["a"], tmp_path / "donor"))
    monkeypatch.setattr("frankenmerge.merging.copying.CHUNK", 100)
    otherwise(monkeypatch, way)
    before = tree(room)
    with pytest.raises(FrankenmergeError) as caught:
        merged(
            [(donor, 0), (donor, 3)],
            room / "out",
            progress=meter(lambda _: os.truncate(donor / "model.safetensors", 9000)),
        )
    assert "model.safetensors ended at byte 9,000" in caught.value.faults[0].found
    assert tree(room) == before


@pytest.mark.parametrize("calls", [0, 7])
def test_an_interrupted_merge_leaves_nothing(order, room, calls):
    def interrupt(_moved):
        raise KeyboardInterrupt

    before = tree(room)
    with pytest.raises(KeyboardInterrupt):
        merged(order, room / "out", progress=meter(after(calls, lambda _moved: None, interrupt)))
    assert tree(room) == before


def otherwise(monkeypatch, way: str) -> None:
    real = os.copy_file_range

    def across(*_arguments):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    match way:
        case "other device":
            monkeypatch.setattr(os, "copy_file_range", across)
        case "no such call":
            monkeypatch.delattr(os, "copy_file_range")
        case "refused midway":
            monkeypatch.setattr(os, "copy_file_range", after(5, real, across))
        case "short copies":
            monkeypatch.setattr(
                os,
                "copy_file_range",
                lambda source, target, count, *at: real(source, target, min(count, 100), *at),
            )


@pytest.mark.parametrize("way", ["other device", "no such call", "refused midway", "short copies"])
def test_the_bytes_are_the_same_without_copies_in_the_kernel(order, tmp_path, monkeypatch, way):
    merged(order, tmp_path / "kernel", shard_size=6000)
    otherwise(monkeypatch, way)
    merged(order, tmp_path / "other", shard_size=6000)
    assert tree(tmp_path / "other") == tree(tmp_path / "kernel")


# The operations


def test_the_operations_name_each_tensors_origin_in_layer_order(coded):
    a, b = (str(coded[name]) for name in "ab")
    recipe = recipe_of([Block(a, 3), Block(b, 0)])
    copies = resolved(recipe).operations
    origins = [
        (copy.name, copy.donor, copy.source)
        for copy in copies
        if "layers" not in copy.name or "norm" in copy.name
    ]
    assert origins == [
        ("model.embed_tokens.weight", a, "model.embed_tokens.weight"),
        ("model.layers.0.input_layernorm.weight", a, "model.layers.3.input_layernorm.weight"),
        (
            "model.layers.0.post_attention_layernorm.weight",
            a,
            "model.layers.3.post_attention_layernorm.weight",
        ),
        ("model.layers.1.input_layernorm.weight", b, "model.layers.0.input_layernorm.weight"),
        (
            "model.layers.1.post_attention_layernorm.weight",
            b,
            "model.layers.0.post_attention_layernorm.weight",
        ),
        ("model.norm.weight", b, "model.norm.weight"),
        ("lm_head.weight", b, "model.embed_tokens.weight"),
    ]
