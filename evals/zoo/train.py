"""Train the demo donors on the Python standard library.

Usage: `python evals/zoo/train.py --out frankenmerge/demo/donors`. Every donor is seeded; batch
number `n` is a pure function of (seed, n), so a run that was interrupted resumes from its last
saved state and ends with the same weights. The state is plain safetensors under `--state`.
"""

import json
import math
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch
from corpus import Document, documents
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

BOS, VOCABULARY, CONTEXT, BATCH = "<|endoftext|>", 1024, 128, 16
SAVE_EVERY = 100
TEXT_SHOWN = 50_000


@dataclass(frozen=True)
class Training:
    """How one donor is trained."""

    family: str
    seed: int
    steps: int
    rate: float
    shape: dict = field(default_factory=dict)
    kinds: tuple[str, ...] = ("code", "prose")
    parent: str | None = None
    """The donor to fine-tune; the run fails unless the losses on `kinds` fall and that on the other
    kind rises by the margins below.
    """
    in_demo: bool = True
    """Whether it is in the package; the others are trained only if `--only` names them."""


SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 352,
}
DONORS = {
    "base": Training("llama", 0, 2000, 1e-3, SMALL),
    "stranger": Training("llama", 1, 2000, 1e-3, SMALL),
    "code": Training("llama", 2, 1000, 5e-4, SMALL, ("code",), "base"),
    "prose": Training("llama", 3, 1000, 4e-4, SMALL, ("prose",), "base"),
    "wide": Training(
        "llama",
        4,
        2000,
        1e-3,
        SMALL
        | {
            "hidden_size": 160,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 240,
            "tie_word_embeddings": True,
        },
    ),
    "narrow": Training(
        "llama",
        6,
        1200,
        2e-3,
        {
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 264,
        },
        in_demo=False,
    ),
    "gpt2": Training("gpt2", 5, 2400, 2e-3, {"n_embd": 128, "n_layer": 6, "n_head": 4}),
}
GAIN, LOSS = 0.10, 0.15
"""Nats per token by which a fine-tune must be better than its parent on its own text, and worse on
the other.
"""


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `VOCABULARY` tokens; token 0 begins a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=CONTEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[Document]) -> np.ndarray:
    """Token ids of the documents, each after BOS, as one line `[tokens]`."""
    encoded = tokenizer([document.text for document in texts])["input_ids"]
    return np.concatenate(
        [np.array([tokenizer.bos_token_id, *ids], dtype=np.int64) for ids in encoded]
    )


def config_of(donor: Training) -> PretrainedConfig:
    """The donor's configuration."""
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "dtype": "bfloat16"}
    if donor.family == "gpt2":
        return GPT2Config(
            **donor.shape,
            **ids,
            n_positions=CONTEXT,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    return LlamaConfig(**donor.shape, **ids, max_position_embeddings=CONTEXT)


def batch(lines: list[np.ndarray], seed: int, step: int) -> torch.Tensor:
    """Rows `[BATCH, CONTEXT]` of step `step`, taken evenly from every line."""
    generator = np.random.default_rng((seed, step))
    rows = []
    for row in range(BATCH):
        line = lines[row % len(lines)]
        start = generator.integers(0, len(line) - CONTEXT)
        rows.append(line[start : start + CONTEXT])
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def loss_on(model, line: np.ndarray) -> float:
    """Mean nats per token over at most 256 rows of a held-out line."""
    count = min(256, len(line) // CONTEXT)
    rows = torch.from_numpy(line[: count * CONTEXT].reshape(count, CONTEXT))
    model.eval()
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(32)]
    model.train()
    return sum(losses) / count


def rate_at(donor: Training, step: int) -> float:
    """Learning rate: linear warm-up over 100 steps, then a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / 100)
    return donor.rate * warm * (0.55 + 0.45 * math.cos(math.pi * step / donor.steps))


def save_state(path: Path, model, optimizer, step: int) -> None:
    """Write weights and optimiser state to a new file, then rename it."""
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    names = [name for name, _ in model.named_parameters()]
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{names[index]}|{key}": value for key, value in state.items()}
    save_file(tensors, path.with_suffix(".new"), {"step": str(step)})
    os.replace(path.with_suffix(".new"), path)


def load_state(path: Path, model, optimizer) -> None:
    """Put a saved state back into `model` and `optimizer`."""
    tensors = load_file(path)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
    state = {
        index: {
            key: tensors[f"optimizer.{name}|{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
        }
        for index, name in enumerate(parameters)
    }
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def saved_step(path: Path) -> int:
    """The step after which `path` was saved, 0 when there is none."""
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        return int(handle.metadata()["step"])


def train(
    name: str, lines: dict[str, np.ndarray], held_out: dict[str, np.ndarray], out: Path, state: Path
):
    """Train one donor to its last step.

    Returns the model, its held-out losses by step, and for a fine-tune the losses of its parent.
    """
    donor = DONORS[name]
    torch.manual_seed(donor.seed)
    model = AutoModelForCausalLM.from_config(
        config_of(donor), dtype=torch.float32, attn_implementation="sdpa"
    )
    if donor.parent:
        model = AutoModelForCausalLM.from_pretrained(out / donor.parent, dtype=torch.float32)
    parent_losses = (
        {kind: loss_on(model, line) for kind, line in held_out.items()} if donor.parent else None
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=donor.rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    path = state / f"{name}.safetensors"
    log = state / f"{name}.jsonl"
    begun = saved_step(path)
    if begun:
        load_state(path, model, optimizer)
    history = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    history = [row for row in history if row["step"] <= begun]
    with _progress(name) as progress:
        bar = progress.add_task(name, total=donor.steps, completed=begun, loss="")
        for step in range(begun, donor.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(donor, step)
            rows = batch([lines[kind] for kind in donor.kinds], donor.seed, step)
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(bar, advance=1, loss=f"{loss.item():.3f}")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == donor.steps:
                history.append(
                    {"step": step + 1}
                    | {kind: round(loss_on(model, line), 4) for kind, line in held_out.items()}
                )
                log.write_text("".join(json.dumps(row) + "\n" for row in history))
                save_state(path, model, optimizer, step + 1)
    if parent_losses and not _apart(history[-1], parent_losses, donor.kinds):
        raise click.ClickException(
            f"{name} did not reach its margins in {donor.steps} steps: "
            f"{history[-1]}, its parent {parent_losses}"
        )
    return model, history, parent_losses


def _progress(name: str) -> Progress:
    return Progress(
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )


def _apart(losses: dict, parent: dict[str, float], own: tuple[str, ...]) -> bool:
    """Whether the losses of a fine-tune differ from its parent's by the margins."""
    gained = all(parent[kind] - losses[kind] >= GAIN for kind in own)
    return gained and all(losses[kind] - parent[kind] >= LOSS for kind in parent if kind not in own)


def card(
    name: str, history: list[dict], parent: dict[str, float] | None, tokens: dict[str, int]
) -> str:
    """The donor's README: data, steps, losses, versions."""
    donor, last = DONORS[name], history[-1]
    counts = ", ".join(f"{tokens[kind]:,} {kind} tokens" for kind in donor.kinds)
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "tags: [frankenmerge-zoo]",
        "---",
        "",
        f"# {name}",
        "",
        f"A toy {donor.family} for the frankenmerge demo, trained by `evals/zoo/train.py`.",
        "",
        f"- data: the standard library of Python {platform.python_version()}: "
        f"{', '.join(donor.kinds)} ({counts}); "
        "one file in 16 held out by the hash of its name",
        f"- parent: {donor.parent or 'none, from random weights'}",
        f"- seed {donor.seed}; {last['step']:,} steps of {BATCH} x {CONTEXT} tokens; "
        f"AdamW, peak rate {donor.rate}",
        f"- shape: {json.dumps(donor.shape)}, vocabulary {VOCABULARY}",
        f"- torch {torch.__version__}, one thread",
        "",
        "| held-out text | nats per token |" + (f" {donor.parent} |" if parent else ""),
        "|---|---|" + ("---|" if parent else ""),
    ]
    for kind in ("code", "prose"):
        lines.append(
            f"| {kind} | {last[kind]:.3f} |" + (f" {parent[kind]:.3f} |" if parent else "")
        )
    return "\n".join(lines) + "\n"


def write_text(held_out: list[Document], folder: Path) -> None:
    """Write the demo's held-out text, one file for each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("code", "prose"):
        pieces = [document.text[:6000] for document in held_out if document.kind == kind]
        (folder / f"{kind}.txt").write_text(
            "\n\n".join(pieces)[:TEXT_SHOWN] + "\n", encoding="utf-8"
        )


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for the donors."
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=".zoo",
    help="Folder for the state of unfinished training.",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(DONORS)),
    help="Train only this donor; may be repeated. [default: those of the demo]",
)
def main(out: Path, state: Path, only: tuple[str, ...]) -> None:
    """Train the donors that do not exist yet."""
    torch.set_num_threads(1)
    state.mkdir(parents=True, exist_ok=True)
    corpus = documents()
    tokenizer_path = state / "tokenizer"
    if tokenizer_path.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_path)
    else:
        tokenizer = build_tokenizer([document.text for document in corpus if not document.held_out])
        tokenizer.save_pretrained(tokenizer_path)
    split = {
        (kind, held): [
            document for document in corpus if document.kind == kind and document.held_out == held
        ]
        for kind in ("code", "prose")
        for held in (False, True)
    }
    lines = {kind: encode(tokenizer, split[kind, False]) for kind in ("code", "prose")}
    held_out = {kind: encode(tokenizer, split[kind, True]) for kind in ("code", "prose")}
    write_text([document for document in corpus if document.held_out], out.parent / "text")
    for name in only or (name for name, donor in DONORS.items() if donor.in_demo):
        if (out / name / "model.safetensors").exists():
            click.echo(f"{name}: exists already", err=True)
            continue
        model, history, parent = train(name, lines, held_out, out, state)
        model.bfloat16().save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        counts = {kind: len(line) for kind, line in lines.items()}
        (out / name / "README.md").write_text(card(name, history, parent, counts))
        click.echo(json.dumps({name: history[-1]}))


if __name__ == "__main__":
    main()
