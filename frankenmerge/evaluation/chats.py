"""Conversations as a model reads them: through its chat template."""

import re
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from frankenmerge.errors import fail
from frankenmerge.evaluation.documents import Chat

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY = "measure on plain text, or leave this conversation out"


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, place: str
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[s]` of a conversation, and which belong to the assistant's turns, bool `[s]`.

    The turns are what the template marks with `{% generation %}`. In other templates, a turn is
    what follows the prompt for it, up to its end marker.

    Raises FrankenmergeError where there is no template, or where it does not tell the turns apart.
    """
    template: Any = tokenizer.chat_template
    if not template:
        raise fail(place, "a tokenizer with a chat template", "none", _REMEDY)
    if isinstance(template, str) and _GENERATION.search(template):
        made = _rendered(
            tokenizer,
            chat.messages,
            place,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = made["input_ids"], np.array(made["assistant_masks"], dtype=bool)
    else:
        if not tokenizer.is_fast:
            expected = "a fast tokenizer, or a template with {% generation %}"
            raise fail(place, expected, "neither", _REMEDY)
        text = _rendered(tokenizer, chat.messages, place)
        encode: Any = tokenizer
        made = encode(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        ids, mask = made["input_ids"], np.zeros(len(made["input_ids"]), dtype=bool)
        begins, stops = np.array(made["offset_mapping"]).T
        for first, last in _turns(tokenizer, chat, text, place):
            mask |= (stops > first) & (begins < last)
    if not mask.any():
        raise fail(place, "turns of the assistant in the template", "none", _REMEDY)
    return np.array(ids, dtype=np.int64), mask


def _turns(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str, place: str
) -> list[tuple[int, int]]:
    """Where the assistant's turns begin and end in a rendered conversation, in characters."""
    turns = []
    for number, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(tokenizer, chat.messages[:number], place, add_generation_prompt=True)
        through = _rendered(tokenizer, chat.messages[: number + 1], place)
        if not (through.startswith(before) and text.startswith(through)):
            expected = "a template that appends turns, or marks them with {% generation %}"
            found = f"one that renders what precedes turn {number + 1} differently after it"
            raise fail(place, expected, found, _REMEDY)
        turns.append((len(before), len(through.rstrip())))
    return turns


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Any, place: str, **options: Any) -> Any:
    render: Any = tokenizer.apply_chat_template
    try:
        return render(list(messages), **{"tokenize": False} | options)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        expected = "a conversation that the model's template takes"
        raise fail(place, expected, str(error), _REMEDY) from error
