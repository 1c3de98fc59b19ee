"""Donors for the tests: tiny random models of several families, written once a session."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
DEMO = Path(__file__).resolve().parents[1] / "frankenmerge" / "demo"

VOCABULARY = 48
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

TINY = {
    "mixtral": {"num_local_experts": 4},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
    },
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
}
"""What else makes a donor of a family small, where its own defaults are large."""


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single letters; id 0 begins a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", *"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: VOCABULARY - 1]]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>"
    ).save_pretrained(folder)


def write_donor(
    folder: Path,
    family: str = "llama",
    seed: int = 0,
    shard: str = "5GB",
    dtype: str = "float32",
    **changes,
) -> Path:
    """Write a random donor of `family` and return its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = (
        {"n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 64}
        if family == "gpt2"
        else SMALL | {"max_position_embeddings": 64}
    )
    shape = (
        shape
        | TINY.get(family, {})
        | {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    )
    config = AutoConfig.for_model(family, **shape | changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def donors(tmp_path_factory) -> dict[str, Path]:
    """Donors: Llamas `a`, `b` (tied), `deep` (6 blocks, in shards), `wide`; GPT-2s `g`, `h`."""
    root = tmp_path_factory.mktemp("donors")
    return {
        "a": write_donor(root / "a", seed=1),
        "b": write_donor(root / "b", seed=2, tie_word_embeddings=True),
        "deep": write_donor(root / "deep", seed=3, num_hidden_layers=6, shard="20KB"),
        "wide": write_donor(root / "wide", seed=4, hidden_size=32),
        "g": write_donor(root / "g", "gpt2", seed=5),
        "h": write_donor(root / "h", "gpt2", seed=6),
    }


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run the command line in this process, its cache in `tmp_path`.

    Returns exit status, standard output and standard error.
    """
    from frankenmerge.cli import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return left.value.code, captured.out, captured.err

    return call


@pytest.fixture
def text(tmp_path) -> Path:
    """A text in the letters of the tests' tokenizer."""
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and The Cat sat on a mat " * 4)
    return path


@pytest.fixture(scope="session")
def real() -> tuple[Path, Path]:
    """Two small models by other authors, where they are available."""
    paths = DATA / "models" / "stories260K-ffn192", DATA / "models" / "llama2xs-281K"
    if not all(path.is_dir() for path in paths):
        pytest.skip(f"the real checkpoints are not in {DATA / 'models'}")
    return paths


def resolved(recipe, donors=None):
    """The splice of a recipe; its donors are opened where they are not given."""
    from frankenmerge.splicing.opening import open_donors
    from frankenmerge.splicing.resolve import resolve

    return resolve(recipe, open_donors(recipe) if donors is None else donors)


def written(recipe, output, *, donors=None, rank=None, progress=None, **options):
    """Merge a recipe into `output`; `options` are those of a merge."""
    from frankenmerge.distributed import Rank
    from frankenmerge.merging.write_plan import MergeOptions
    from frankenmerge.merging.writer import merge
    from frankenmerge.progress import silent

    splice, rank = resolved(recipe, donors), rank or Rank()
    return merge(splice, output, MergeOptions(**options), rank=rank, progress=progress or silent)


def in_memory(recipe, donors=None, fits=None):
    """The model of a recipe, assembled in memory; gauges are fitted where fits are not given."""
    from frankenmerge.models.loading import load_model
    from frankenmerge.splicing.assemble import assemble
    from frankenmerge.splicing.gauge_fitting import fitted_rotations

    splice = resolved(recipe, donors)
    models = {name: load_model(donor) for name, donor in splice.donors.items()}
    return assemble(splice, models, fits=fitted_rotations(splice) if fits is None else fits)


def meter(advance):
    """A progress meter that calls `advance` with the number of units done."""
    from contextlib import contextmanager

    @contextmanager
    def progress(_what, _total, _unit):
        yield advance

    return progress


def changed(source: Path, folder: Path, tensors=None, config=None) -> Path:
    """Copy a donor of one file to the new `folder`, changed by functions.

    `tensors` changes its numpy arrays by name, `config` its config.
    """
    import json
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder)
    if tensors:
        arrays = tensors(load_file(folder / "model.safetensors"))
        save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    if config:
        settings = config(json.loads((folder / "config.json").read_text()))
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def write_stand_in(
    folder: Path, family: str, dtype: str = "BF16", tokens: int | None = None, **sizes
) -> Path:
    """Write a donor of any size that takes no disk: config and header over a hole for the weights.

    Its tokenizer has the tokens t0, t1, ..., as many as the vocabulary or `tokens`.
    """
    import json
    from math import prod

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, tie_word_embeddings=False, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    header, position = {}, 0
    for name, tensor in model.state_dict().items():
        stop = position + prod(tensor.shape) * {"BF16": 2, "F16": 2, "F32": 4}[dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json_string())
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    vocabulary = {f"t{index}": index for index in range(tokens or config.vocab_size)}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
        )
    )
    return folder


def rotated_donor(source, folder, rotation):
    """The donor with its whole stream rotated and its head untied, as a checkpoint."""
    from safetensors.torch import load_file, save_file

    from frankenmerge.donors.checkpoint import open_checkpoint
    from frankenmerge.splicing.rotation import rotate_all

    checkpoint = open_checkpoint(str(source))
    architecture = checkpoint.architecture
    stored = load_file(source / "model.safetensors")
    head, embedding = (
        f"{architecture.head}weight",
        f"{architecture.root}{architecture.embedding[0]}weight",
    )
    outside = {
        name: stored[found]
        for role in ("embedding", "final", "head")
        for name, found in checkpoint.by_role.get((role, None), {}).items()
    }
    result = rotate_all(
        outside | {head: outside.get(head, outside[embedding])}, architecture, rotation
    )
    for index in range(checkpoint.blocks):
        block = {
            canonical: stored[name]
            for canonical, name in checkpoint.by_role["block", index].items()
        }
        result |= {
            name.format(index): value
            for name, value in rotate_all(block, architecture, rotation).items()
        }
    # A norm's small constant is added to the stream's mean square, which the scale has changed.
    constants = {
        key: value * rotation.scale**2
        for key, value in checkpoint.config.items()
        if key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    }
    path = changed(
        source, folder, config=lambda config: config | constants | {"tie_word_embeddings": False}
    )
    save_file(
        {name: value.float().contiguous() for name, value in result.items()},
        path / "model.safetensors",
        {"format": "pt"},
    )
    return path
