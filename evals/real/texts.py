"""Texts and items for real models: `python -m evals.real.texts OUT --data DATA`.

The standard library's sources and prose, to train on and held out; and what DATA has of WikiText-2
and PIQA.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from evals.zoo.corpus import KINDS, Document, documents, of_kind

CHARACTERS, SHORT, EXCERPT = 40_000, 1_500, 4_000
"""Of each held-out text, of its beginning in `short.txt`, and of any single file in a text."""
WIKITEXT, PIQA = Path("text/wikitext2-valid.txt"), Path("tasks/piqa-valid-400.jsonl")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path))
def main(out: Path, data: Path) -> None:
    """Write `train-KIND*.txt`, `NAME.txt`, `short.txt` and `piqa*.jsonl` to the folder OUT."""
    out.mkdir(parents=True, exist_ok=True)
    found = documents()
    held_out = {}
    for kind in KINDS:
        train, others = (of_kind(found, kind, side) for side in (False, True))
        text = "\n\n".join(document.text.strip() for document in train)
        (out / f"train-{kind}.txt").write_text(text, "utf-8")
        text = "\n\n".join(excerpts(train, CHARACTERS))
        (out / f"train-{kind}-short.txt").write_text(text, "utf-8")
        held_out[kind] = "\n\n".join(excerpts(others, CHARACTERS))
    if (data / WIKITEXT).exists():
        held_out["wikitext"] = (data / WIKITEXT).read_text("utf-8")[:CHARACTERS].strip()
    for name, text in held_out.items():
        (out / f"{name}.txt").write_text(text, "utf-8")
    short = "\n\n".join(text[:SHORT] for text in held_out.values())
    (out / "short.txt").write_text(short, "utf-8")
    if (data / PIQA).exists():
        items = piqa_items(data / PIQA)
        for name, part in (("piqa", items), ("piqa-100", items[:100])):
            lines = "".join(json.dumps(each) + "\n" for each in part)
            (out / f"{name}.jsonl").write_text(lines, "utf-8")


def excerpts(found: list[Document], characters: int) -> Iterator[str]:
    """Beginnings of documents, `characters` in all, in an order that a seed fixes."""
    for place in np.random.default_rng(0).permutation(len(found)):
        if characters <= 0:
            return
        text = found[place].text.strip()[: min(EXCERPT, characters)]
        yield text
        characters -= len(text)


def piqa_items(path: Path) -> list[dict]:
    """PIQA's items as `evaluate --tasks` reads them; prompts as lm-evaluation-harness has them."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    labels = path.with_name(f"{path.stem}-labels.lst").read_text("utf-8").split()
    return [
        {
            "context": f"Question: {row['goal']}\nAnswer:",
            "choices": [f" {row['sol1']}", f" {row['sol2']}"],
            "answer": int(label),
        }
        for row, label in zip(rows, labels, strict=True)
    ]


if __name__ == "__main__":
    main()
