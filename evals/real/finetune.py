"""Fine-tune a model by a LoRA, and fold it in: `python -m evals.real.finetune BASE TEXT OUT`.

Seeded: the same base, text, options and versions give the same steps.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from frankenmerge.models.quiet import quiet

RANK, RATE, WARM_UP = 16, 1e-3, 5
LONGEST_TOKEN = 8
"""Characters of a token in text that is repetitive, on average."""
MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("text", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", default=50, show_default=True)
@click.option("--rows", default=4, show_default=True, help="Rows of a step.")
@click.option("--length", default=256, show_default=True, help="Tokens of a row.")
@click.option("--seed", default=0, show_default=True)
def main(base: Path, text: Path, out: Path, steps: int, rows: int, length: int, seed: int) -> None:
    """Train a LoRA on TEXT over all maps of BASE's blocks, and write the sum to OUT."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MAPS, task_type="CAUSAL_LM")
    lora = get_peft_model(model, config)
    generator = np.random.default_rng(seed)
    pieces = _pieces(text.read_text("utf-8"), steps * rows, length, generator)
    encoded = tokenizer(pieces, truncation=True, max_length=length)["input_ids"]
    found = [ids for ids in encoded if len(ids) == length][: steps * rows]
    losses = _train(lora, torch.tensor(found).split(rows)[:steps])
    merged = lora.merge_and_unload()
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(
        json.dumps(
            {
                "tokens": len(losses) * rows * length,
                "first_loss": float(np.mean(losses[:10])),
                "last_loss": float(np.mean(losses[-10:])),
                "seconds": time.perf_counter() - started,
                "rank": RANK,
                "rate": RATE,
                "seed": seed,
            }
        )
    )


def _pieces(text: str, count: int, length: int, generator: np.random.Generator) -> list[str]:
    """Pieces of a text at random, a quarter more than asked for: most are of `length` tokens."""
    characters = LONGEST_TOKEN * length
    starts = generator.integers(0, max(1, len(text) - characters), count * 5 // 4)
    return [text[start : start + characters] for start in starts]


def _train(model: torch.nn.Module, batches: Sequence[torch.Tensor]) -> list[float]:
    """AdamW with warm-up and a cosine, a step for each batch; returns the loss of every step."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    losses, steps = [], len(batches)
    for step, batch in enumerate(batches):
        share = min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * share
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 10 == 9:
            click.echo(f"step {step + 1} of {steps}: {np.mean(losses[-10:]):.3f}", err=True)
    return losses


if __name__ == "__main__":
    main()
