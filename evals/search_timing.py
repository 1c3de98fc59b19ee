"""What the timings of searches share: options, random models, and alternating rounds."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from frankenmerge.analysis.features import Feature
from frankenmerge.models.hooks import blocks_of, embedding_of

SEED = 0
LISTING_BATCH = 1000
"""The batch of the listing in the source document."""


class Shape(NamedTuple):
    """Sizes of the random models and the searches."""

    gpt2: dict[str, Any]
    llama: dict[str, Any]
    features: int
    """Number of features of the greedy and the gradient search."""
    listed: int
    """Number of tokens that the listing of the source document is timed on."""


SHAPES = {
    "small": Shape(
        # The defaults are GPT-2 small: 12 blocks, 768 wide, 50,257 tokens.
        gpt2={"model_type": "gpt2"},
        llama={
            "model_type": "llama",
            "hidden_size": 128,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 352,
            "vocab_size": 1024,
            "max_position_embeddings": 128,
        },
        features=64,
        listed=4 * LISTING_BATCH,
    ),
    "tiny": Shape(
        gpt2={
            "model_type": "gpt2",
            "n_layer": 3,
            "n_embd": 16,
            "n_head": 2,
            "vocab_size": 300,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        llama={
            "model_type": "llama",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "vocab_size": 64,
            "max_position_embeddings": 32,
        },
        features=8,
        listed=100,
    ),
}


@dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    donor: str
    shape: Shape
    rounds: int
    threads: int
    device: str


Run = dict[str, tuple[Any, float]]
"""The results of one round, and their seconds, by name."""


def in_turns(work: Mapping[str, Callable[[], Any]], options: Options) -> list[Run]:
    """Time every function once a round, one after the other, in alternating order."""
    return [
        {
            name: timed(work[name], options.device)
            for name in list(work)[:: 1 if number % 2 == 0 else -1]
        }
        for number in range(options.rounds)
    ]


def timed(work: Callable[[], Any], device: str) -> tuple[Any, float]:
    """Call a function; return its result and its seconds."""
    started = time.perf_counter()
    result = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def seconds(runs: list[Run], name: str) -> float:
    """The median over the rounds."""
    return statistics.median(run[name][1] for run in runs)


def ratio(runs: list[Run], slow: str, fast: str) -> float:
    """The median of the ratio in each round."""
    return statistics.median(run[slow][1] / run[fast][1] for run in runs)


def random_model(fields: Mapping[str, Any], device: str) -> PreTrainedModel:
    """A model of this config with random weights."""
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).to(device).eval()


def random_features(model: PreTrainedModel, count: int) -> list[Feature]:
    """Random neurons of random blocks."""
    generator = random.Random(SEED)
    blocks, width = len(blocks_of(model)), embedding_of(model).shape[1]
    return [
        Feature.of(generator.randint(1, blocks), generator.randrange(width)) for _ in range(count)
    ]
