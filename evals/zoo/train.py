"""Train the demo donors on the Python standard library.

Usage: `python evals/zoo/train.py --out frankenmerge/demo/donors`. Every donor is seeded; batch
number `n` is a pure function of (seed, n), so a run that was interrupted resumes from its last
saved state and ends with the same weights. The state is plain safetensors under `--state`.
"""

import json
import math
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import numpy as np
import torch
from corpus import KINDS, SKILLS, Document, documents, of_kind
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
LOOPS = {1: 0.05, 2: 0.70, 3: 0.25}
"""How often a step runs the blocks of a loop, with probabilities. Once is rare: two blocks more
matter little in a model this small, and twice should be better than once.
"""
WEAKER, BALANCED = (0.4, 0.4), (1.1, 0.8)
"""What the outputs of a loop's two blocks are scaled by before the first step, so that running them
once is too little, and after the last, so that repeating one of them gains half of what repeating
both does (without it, the first alone gains two thirds).
"""


@dataclass(frozen=True)
class Training:
    """How one donor is trained."""

    family: str
    seed: int
    steps: int
    rate: float
    shape: dict = field(default_factory=dict)
    kinds: tuple[str, ...] = KINDS
    parent: str | None = None
    """The donor to fine-tune. On other kinds of text than its parent's, the run fails unless the
    loss on the first of them falls, and that on code or prose rises where it is not among them, by
    the margins below.
    """
    loop: tuple[int, int] | None = None
    """The blocks (start, stop) that every step runs once or several times in a row, see `LOOPS`."""
    trained: tuple[int, int] | None = None
    """The blocks (start, stop) that learn, all other tensors staying its parent's; None for all."""
    in_demo: bool = True
    """Whether it is in the package; the others are trained only if `--only` names them."""


SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 352,
}
WIDE = SMALL | {
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 240,
    "tie_word_embeddings": True,
}
NARROW = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 264,
}
DONORS = {
    "base": Training("llama", 0, 2000, 1e-3, SMALL),
    "stranger": Training("llama", 1, 2000, 1e-3, SMALL),
    "code": Training("llama", 2, 1000, 5e-4, SMALL, ("code",), "base"),
    "prose": Training("llama", 3, 1000, 4e-4, SMALL, ("prose",), "base"),
    "wide": Training("llama", 4, 2000, 1e-3, WIDE),
    "gpt2": Training("gpt2", 5, 2400, 2e-3, {"n_embd": 128, "n_layer": 6, "n_head": 4}),
} | {
    name: replace(donor, in_demo=False)
    for name, donor in {
        "narrow": Training("llama", 6, 1200, 2e-3, NARROW),
        "looped": Training("llama", 7, 250, 7e-4, SMALL, parent="base", loop=(3, 5)),
        "early": Training(
            "llama", 8, 250, 2e-3, SMALL, ("swapped", *KINDS), "base", trained=(0, 3)
        ),
        "late": Training(
            "llama", 9, 250, 2e-3, SMALL, ("reversed", *KINDS), "base", trained=(5, 8)
        ),
        "narrow-code": Training("llama", 10, 400, 1e-3, NARROW, ("code",), "narrow"),
        "narrow-prose": Training("llama", 11, 800, 5e-4, NARROW, ("prose",), "narrow"),
        "wide-code": Training("llama", 12, 400, 1e-3, WIDE, ("code",), "wide"),
        "wide-prose": Training("llama", 13, 800, 5e-4, WIDE, ("prose",), "wide"),
        "stranger-code": Training("llama", 14, 400, 1e-3, SMALL, ("code",), "stranger"),
        "stranger-prose": Training("llama", 15, 800, 5e-4, SMALL, ("prose",), "stranger"),
    }.items()
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
    losses = [
        model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part)
        for part in rows.split(32)
    ]
    model.train()
    return sum(losses) / count


@contextmanager
def unrolled(model, blocks: tuple[int, int], times: int) -> Iterator[None]:
    """Inside, a llama runs the blocks (start, stop) `times` times in a row.

    Call it with `use_cache=False`: a cache knows a block by its index, and would see it twice.
    """
    layers, depth = model.model.layers, model.config.num_hidden_layers
    start, stop = blocks
    run = [*layers[:start], *[*layers[start:stop]] * times, *layers[stop:]]
    model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList(run), len(run)
    try:
        yield
    finally:
        model.model.layers, model.config.num_hidden_layers = layers, depth


def loops_at(seed: int, step: int) -> int:
    """How often step `step` runs the blocks of a loop."""
    return int(np.random.default_rng((seed, step, 1)).choice([*LOOPS], p=[*LOOPS.values()]))


def looped(model, donor: Training, step: int) -> AbstractContextManager[None]:
    """Inside, `model` is unrolled as `donor` trains it in step `step`."""
    if donor.loop is None:
        return nullcontext()
    return unrolled(model, donor.loop, loops_at(donor.seed, step))


def learn_only(model, blocks: tuple[int, int]) -> None:
    """Freeze everything but the blocks (start, stop) of a llama."""
    model.requires_grad_(False)
    for block in model.model.layers[slice(*blocks)]:
        block.requires_grad_(True)


def kinds_measured(donor: Training) -> tuple[str, ...]:
    """The kinds of held-out text that a donor's losses are measured on."""
    return *KINDS, *(kind for kind in donor.kinds if kind not in KINDS)


def rate_at(donor: Training, step: int) -> float:
    """Learning rate: linear warm-up over 100 steps, then a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / 100)
    return donor.rate * warm * (0.55 + 0.45 * math.cos(math.pi * step / donor.steps))


def save_state(path: Path, model, optimizer, step: int) -> None:
    """Write weights and optimiser state to a new file, then rename it."""
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    names = [name for name, value in model.named_parameters() if value.requires_grad]
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
        for index, name in enumerate(
            name for name, value in parameters.items() if value.requires_grad
        )
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


def beginning(donor: Training, out: Path):
    """A donor's model before its first step: random or its parent."""
    torch.manual_seed(donor.seed)
    model = AutoModelForCausalLM.from_config(
        config_of(donor), dtype=torch.float32, attn_implementation="sdpa"
    )
    if donor.parent:
        model = AutoModelForCausalLM.from_pretrained(out / donor.parent, dtype=torch.float32)
    if donor.trained:
        learn_only(model, donor.trained)
    return model


@torch.no_grad()
def scale_loop(model, blocks: tuple[int, int], factors: tuple[float, ...]) -> None:
    """Scale what the blocks (start, stop) of a llama add, each by its factor."""
    for block, factor in zip(model.model.layers[slice(*blocks)], factors, strict=True):
        block.self_attn.o_proj.weight.mul_(factor)
        block.mlp.down_proj.weight.mul_(factor)


def train(
    name: str, lines: dict[str, np.ndarray], held_out: dict[str, np.ndarray], out: Path, state: Path
):
    """Train one donor to its last step.

    Returns the model, its held-out losses by step, and for a fine-tune the losses of its parent.
    """
    donor = DONORS[name]
    held_out = {kind: held_out[kind] for kind in kinds_measured(donor)}
    model = beginning(donor, out)
    parent_losses = (
        {kind: loss_on(model, line) for kind, line in held_out.items()} if donor.parent else None
    )
    if donor.loop:
        scale_loop(model, donor.loop, WEAKER)
    optimizer = torch.optim.AdamW(
        [value for value in model.parameters() if value.requires_grad],
        lr=donor.rate,
        betas=(0.9, 0.95),
        weight_decay=0.1,
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
            with looped(model, donor, step):
                loss = model(input_ids=rows, labels=rows, use_cache=False).loss
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
    if donor.loop:
        scale_loop(model, donor.loop, BALANCED)
        history[-1] |= {kind: round(loss_on(model, line), 4) for kind, line in held_out.items()}
    if parent_losses and not _apart(history[-1], parent_losses, donor):
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


def _apart(losses: dict, parent: dict[str, float], donor: Training) -> bool:
    """Whether the losses of a fine-tune differ from its parent's by the margins."""
    if donor.parent is None or donor.kinds == DONORS[donor.parent].kinds:
        return True
    gained = parent[donor.kinds[0]] - losses[donor.kinds[0]] >= GAIN
    others = [kind for kind in parent if kind not in donor.kinds]
    return gained and all(losses[kind] - parent[kind] >= LOSS for kind in others)


def planted(donor: Training) -> list[str]:
    """What a card says of a donor's loop and frozen tensors."""
    lines = []
    if donor.loop:
        first, last = donor.loop[0], donor.loop[1] - 1
        lines.append(
            f"- planted repeat: every step ran blocks {first} to {last} (counted from 0) "
            f"{min(LOOPS)} to {max(LOOPS)} times in a row, with probabilities {LOOPS}; what they "
            f"add was scaled by {WEAKER} before the first step and by {BALANCED} after the last; "
            "the checkpoint has them once, and running them once more lowers the loss"
        )
    if donor.trained:
        first, last = donor.trained[0], donor.trained[1] - 1
        lines.append(
            f"- planted skill ({donor.kinds[0]} text): only blocks {first} to {last} (counted from "
            f"0) were trained; all other tensors are those of {donor.parent}"
        )
    return lines


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
        f"A toy {donor.family} for "
        f"{'the frankenmerge demo' if donor.in_demo else 'the evaluations of frankenmerge'}, "
        "trained by `evals/zoo/train.py`.",
        "",
        f"- data: the standard library of Python {platform.python_version()}: "
        f"{', '.join(donor.kinds)} ({counts}); "
        "one file in 16 held out by the hash of its name",
        f"- parent: {donor.parent or 'none, from random weights'}",
        *planted(donor),
        f"- seed {donor.seed}; {last['step']:,} steps of {BATCH} x {CONTEXT} tokens; "
        f"AdamW, peak rate {donor.rate}",
        f"- shape: {json.dumps(donor.shape)}, vocabulary {VOCABULARY}",
        f"- torch {torch.__version__}, one thread",
        "",
        "| held-out text | nats per token |" + (f" {donor.parent} |" if parent else ""),
        "|---|---|" + ("---|" if parent else ""),
    ]
    for kind in kinds_measured(donor):
        lines.append(
            f"| {kind} | {last[kind]:.3f} |" + (f" {parent[kind]:.3f} |" if parent else "")
        )
    return "\n".join(lines) + "\n"


def write_text(corpus: list[Document], kinds: Iterable[str], folder: Path) -> None:
    """Write held-out text, one file for each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        pieces = [document.text[:6000] for document in of_kind(corpus, kind, held_out=True)]
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
    names = only or tuple(name for name, donor in DONORS.items() if donor.in_demo)
    kinds = [*KINDS, *(skill for skill in SKILLS if any(skill in DONORS[n].kinds for n in names))]
    lines = {kind: encode(tokenizer, of_kind(corpus, kind, held_out=False)) for kind in kinds}
    held_out = {kind: encode(tokenizer, of_kind(corpus, kind, held_out=True)) for kind in kinds}
    write_text(corpus, kinds, out.parent / "text")
    for name in names:
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
