"""The least that steps have to do: bare forward passes by transformers alone, in a process."""

import json
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from frankenmerge.models.quiet import quiet

POSITIONS = 2048
"""Of one forward pass."""


dtype_option = click.option("--dtype", default="float32", show_default=True)


@click.group()
def main() -> None:
    """Run one floor, and print nothing."""


@main.command()
@click.argument("model")
@dtype_option
def vocabulary(model: str, dtype: str) -> None:
    """Every token of the vocabulary, alone and after BOS, through all blocks without the head.

    BOS itself runs once: what the blocks keep of it is repeated.
    """
    loaded, _ = _loaded(model, getattr(torch, dtype))
    ids = torch.arange(loaded.config.vocab_size)[:, None]
    with torch.no_grad():
        for part in ids.split(POSITIONS):
            loaded.base_model(input_ids=part, use_cache=False)
        for part in ids.split(POSITIONS):
            kept = DynamicCache()
            bos = torch.tensor([[loaded.config.bos_token_id]])
            loaded.base_model(input_ids=bos, past_key_values=kept)
            kept.batch_repeat_interleave(len(part))
            loaded.base_model(input_ids=part, past_key_values=kept)


@main.command()
@click.argument("models", nargs=-1)
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path))
@click.option("--tokens", required=True, type=int, help="Of each text.")
@click.option("--context", required=True, type=int, help="Tokens in a window.")
def text(models: tuple[str, ...], texts: tuple[Path, ...], tokens: int, context: int) -> None:
    """The first tokens of texts through MODELS, in windows."""
    for name in models:
        model, tokenizer = _loaded(name)
        for path in texts:
            ids = torch.tensor(tokenizer(path.read_text("utf-8"))["input_ids"][:tokens])
            _run(model, [list(part) for part in ids.split(context)])


@main.command()
@click.argument("models", nargs=-1)
@click.option("--items", "path", required=True, type=click.Path(path_type=Path))
@dtype_option
def items(models: tuple[str, ...], path: Path, dtype: str) -> None:
    """Every choice of a task's items after its context through MODELS, long ones first."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    prompts = [row["context"] + choice for row in rows for choice in row["choices"]]
    for name in models:
        model, tokenizer = _loaded(name, getattr(torch, dtype))
        _run(model, tokenizer(prompts)["input_ids"])


def _loaded(name: str, dtype: torch.dtype = torch.float32):
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
        return model, AutoTokenizer.from_pretrained(name)


@torch.no_grad()
def _run(model, rows: list[list[int]]) -> None:
    for batch in _batches(sorted(rows, key=len, reverse=True)):
        model(input_ids=batch, use_cache=False)


def _batches(rows: list[list[int]]) -> Iterator[torch.Tensor]:
    """Rows, the longest first, padded on the right; `POSITIONS` in a batch."""
    while rows:
        count = max(1, POSITIONS // len(rows[0]))
        part, rows = rows[:count], rows[count:]
        yield torch.nn.utils.rnn.pad_sequence(
            [torch.as_tensor(row) for row in part], batch_first=True
        )


if __name__ == "__main__":
    main()
