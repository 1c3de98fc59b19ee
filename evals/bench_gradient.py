"""How much faster is the gradient search in batches than one feature at a time? Medians of several runs, both in one process.

Without `--donor` the model is a random Llama of the zoo's size: the time does not depend on the weights.
"""

import json
import time
from collections.abc import Callable
from statistics import median

import click
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from frankenmerge.analysis.decode import decoder_of, embedding_table
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.checkpoint import open_checkpoint
from frankenmerge.models import blocks_of, load_model

SHAPE = {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 352}


@click.command()
@click.option("--donor", help="A donor; otherwise a random one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(donor: str | None, as_json: bool) -> None:
    """Time the gradient search for 64 neurons of the last block."""
    model = load_model(open_checkpoint(donor)) if donor else random_model()
    result = {"gradient": gradient(model), "donor": donor or "random", "torch": torch.__version__, "threads": torch.get_num_threads()}
    if as_json:
        print(json.dumps(result))
        return
    table = Table("measure", "value")
    for name, value in result["gradient"].items():
        table.add_row(name, f"{value:.3g}")
    Console().print(table)


def random_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=1024, max_position_embeddings=128, **SHAPE)).eval()


def gradient(model: PreTrainedModel, *, features: int = 64, steps: int = 10, repeats: int = 3) -> dict[str, float]:
    """Seconds for all features in one batch and one at a time, five tokens each, and how far the results lie apart."""
    wanted = [Feature.of(len(blocks_of(model)), neuron) for neuron in range(features)]
    decoder = decoder_of(embedding_table(model), excluded=None)
    found = {}

    def search(batch: int) -> None:
        found[batch] = gradient_search(model, wanted, steps=steps, batch=batch, decoder=decoder).embeddings

    search(features)  # warms up
    together = [_seconds(lambda: search(features)) for _ in range(repeats)]
    alone = [_seconds(lambda: search(1)) for _ in range(repeats)]
    return {
        "speedup_over_single": median(alone) / median(together),
        "batched_s": median(together),
        "single_s": median(alone),
        "features": features,
        "steps": steps,
        "largest_difference": (found[features] - found[1]).abs().max().item(),
    }


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
