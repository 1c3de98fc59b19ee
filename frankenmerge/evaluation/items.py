"""Multiple-choice items: contexts with choices, of which a model finds one the most probable.

Tokens, metrics and their names are those of lm-evaluation-harness for multiple-choice tasks.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frankenmerge.errors import Fault, fail, raise_all
from frankenmerge.evaluation.language import check_finite, predictions, start_token
from frankenmerge.evaluation.paired import ItemResults
from frankenmerge.progress import Advance, ignore

_EXPECTED = (
    'an object such as {"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0} on each line'
)
_SURROGATE = re.compile("[\ud800-\udfff]")


class Item(NamedTuple):
    """A context, and choices to continue it, of which one is right."""

    context: str
    choices: tuple[str, ...]
    """Appended to the context as they are: a space in between is part of the choice."""
    answer: int
    """The number of the right choice, 0-based."""


class Task(NamedTuple):
    """Items that are measured together."""

    name: str
    items: list[Item]


class ItemRows(NamedTuple):
    """Items as a model reads them: a row for each choice, those of one item side by side."""

    ids: np.ndarray
    """Token ids int64 `[n, s]`, padded on the right with 0."""
    counted: np.ndarray
    """Which of the predicted tokens `ids[:, 1:]` belong to the choice, bool `[n, s-1]`."""
    items: np.ndarray
    """The number of each row's item, int64 `[n]`."""
    answers: np.ndarray
    """The number of each item's right choice among its rows, int64 `[items]`."""
    characters: np.ndarray
    """The length of each choice without leading spaces, int64 `[n]`."""
    cut: int = 0
    """How many rows were too long and lost tokens of their context."""


def read_items(path: Path) -> list[Item]:
    """Read items from a JSONL file, one object per line; blank lines are skipped.

    Raises:
        FrankenmergeError: for a file that cannot be read, one without items, and every line that
            is no item.
    """
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise fail(str(path), "a JSONL file of items", str(error), "give another file") from error
    items, faults = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            item = _item(line)
            if isinstance(item, Item):
                items.append(item)
            else:
                faults.append(Fault(f"{path}:{number}", *item, "correct this line"))
    raise_all(faults)
    if not items:
        raise fail(str(path), _EXPECTED, "no items", "give another file")
    return items


def _item(line: str) -> Item | tuple[str, str]:
    """The item of a line, or what was expected and found instead."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _EXPECTED, f"no JSON: {error}"
    if not isinstance(content, dict):
        return _EXPECTED, f"a JSON {type(content).__name__}"
    if missing := [key for key in Item._fields if key not in content]:
        return _EXPECTED, f"no {' and no '.join(missing)}"
    context, choices, answer = (content[key] for key in Item._fields)
    if not _is_text(context):
        return "a string as context", _short(context)
    if not isinstance(choices, list) or len(choices) < 2:
        return "a list of at least two choices", _short(choices)
    if wrong := [choice for choice in choices if not _is_text(choice) or not choice]:
        return "choices that are strings and not empty", _short(wrong[0])
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f"an answer from 0 to {len(choices) - 1}, the number of a choice", _short(answer)
    return Item(context, tuple(choices), answer)


def _is_text(value: Any) -> bool:
    """Whether a JSON value is a string without lone surrogates, which tokenizers refuse."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def _short(value: Any) -> str:
    return json.dumps(value)[:100]


def encoded_items(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], *, context: int, place: str = "items"
) -> ItemRows:
    """Tokenize every choice after its context.

    A row is the encoding of the context, followed by the tokens that the encoding of context and
    choice has in addition. Spaces at the end of the context belong to the choice. A row begins with
    BOS where the tokenizer begins texts with it; a choice without a context follows BOS, or EOS if
    there is no BOS. Rows of more than `context + 1` tokens lose the first ones.

    Args:
        tokenizer: the model's.
        items: the items.
        context: tokens that the model can read.
        place: what messages call the items.

    Raises:
        FrankenmergeError: for choices without a token of their own, without a token before them, or
            of more than `context` tokens.
    """
    rows = _rows(tokenizer, items)
    raise_all(
        Fault(f"{place}: item {row.item + 1} of {len(items)}, choice {row.choice!r:.60}", *fault)
        for row in rows
        if (fault := _row_fault(row, context))
    )
    length = min(max(len(row.ids) for row in rows), context + 1)
    ids = np.zeros((len(rows), length), dtype=np.int64)
    counted = np.zeros((len(rows), length - 1), dtype=bool)
    for number, row in enumerate(rows):
        kept = row.ids[-length:]
        ids[number, : len(kept)] = kept
        first = row.first - (len(row.ids) - len(kept))
        counted[number, first - 1 : len(kept) - 1] = True
    return ItemRows(
        ids,
        counted,
        np.array([row.item for row in rows]),
        np.array([item.answer for item in items]),
        np.array([max(1, len(row.choice.lstrip())) for row in rows]),
        sum(len(row.ids) > length for row in rows),
    )


class _Row(NamedTuple):
    """A choice after its context."""

    item: int
    choice: str
    ids: list[int]
    first: int
    """The place of the choice's first token."""


def _rows(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[_Row]:
    encoding: Any = tokenizer("", verbose=False)
    bos = [token for token in encoding["input_ids"][:1] if token == tokenizer.bos_token_id]
    start = [token for token in [start_token(tokenizer)] if token is not None]
    begins = [bos if item.context.strip() else start for item in items]
    contexts = _encoded(tokenizer, [item.context.rstrip() for item in items])
    choices = [(number, choice) for number, item in enumerate(items) for choice in item.choices]
    whole = _encoded(tokenizer, [items[number].context + choice for number, choice in choices])
    rows = []
    for (number, choice), ids in zip(choices, whole, strict=True):
        before = _after(begins[number], contexts[number])
        row = before + _after(begins[number], ids)[len(before) :]
        rows.append(_Row(number, choice, row, len(before)))
    return rows


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoding: Any = tokenizer(texts, add_special_tokens=False, verbose=False)
    return encoding["input_ids"]


def _after(begin: list[int], ids: list[int]) -> list[int]:
    """The ids after the special token that they begin with."""
    return ids if ids[:1] == begin else begin + ids


def _row_fault(row: _Row, context: int) -> tuple[str, str, str] | None:
    """Expected, found and remedy for a row that cannot be scored."""
    tokens = len(row.ids) - row.first
    if row.first == 0:
        found = "neither a context nor a BOS or EOS token"
        return "a token before the choice", found, "give the item a context"
    if tokens == 0:
        expected, found = "tokens of the choice after the context's", "the context's tokens alone"
        return expected, found, "give another choice"
    if tokens > context:
        return f"a choice of at most {context} tokens", f"{tokens} tokens", "leave the item out"
    return None


def choice_log_likelihoods(
    model: PreTrainedModel, rows: ItemRows, *, advance: Advance = ignore
) -> np.ndarray:
    """The log-probability of every row's choice after its context, float64 `[n]`, in nats.

    `advance` is called with the number of rows done since its last call.

    Raises:
        FrankenmergeError: for a log-probability that is not finite, ids that the model lacks, or
            too little memory for a single row.
    """
    # The last counted token ends a row. Long rows come first, so that batches need little padding.
    lengths = rows.counted.shape[1] + 1 - rows.counted[:, ::-1].argmax(axis=1)
    order = np.argsort(-lengths, kind="stable")
    ids, counted = torch.from_numpy(rows.ids), torch.from_numpy(rows.counted)
    sums = torch.zeros(len(order), dtype=torch.float64)
    done = 0
    for nats, _ in predictions(model, [ids[row, : lengths[row]] for row in order]):
        group = order[done : done + len(nats)]
        sums[group] = -nats.where(counted[group, : nats.shape[1]], 0.0).sum(dim=1)
        done += len(group)
        advance(len(group))
    check_finite(model, sums)
    return sums.numpy()


def correct(rows: ItemRows, log_likelihoods: np.ndarray) -> dict[str, np.ndarray]:
    """Whether the best choice of each item is the right one, bool `[items]`, by metric.

    `acc` takes the choice with the highest log-probability, `acc_norm` the one with the highest
    log-probability per character.
    """
    return {
        "acc": _best(rows, log_likelihoods) == rows.answers,
        "acc_norm": _best(rows, log_likelihoods / rows.characters) == rows.answers,
    }


def item_results(task: str, rows: ItemRows, log_likelihoods: np.ndarray) -> list[ItemResults]:
    """What `correct` says, by metric; items are numbered from 0."""
    return [
        ItemResults(task, metric, {str(item): bool(right) for item, right in enumerate(values)})
        for metric, values in correct(rows, log_likelihoods).items()
    ]


def _best(rows: ItemRows, values: np.ndarray) -> np.ndarray:
    """The number of each item's choice with the highest value; of equal ones the first."""
    by_item = np.split(values, np.flatnonzero(np.diff(rows.items)) + 1)
    return np.array([int(each.argmax()) for each in by_item])
