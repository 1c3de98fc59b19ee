"""How strongly do the inputs of each search activate a neuron, for how many passes?

Activations are at the last of four tokens, in standard deviations of the feature on random inputs,
as means over neurons. Passes are of the vocabulary, per feature: of inputs that features share,
each has its part; a gradient counts as three inputs. The reference is plain coordinate ascent from
greedy search's input: one feature at a time, the positions in order, all tokens at each, until none
of them changes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from search_timing import SEED, Options
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.analysis.ascent import GRADIENT_COST, ascent_search
from frankenmerge.analysis.decode import decoder_of, embedding_table
from frankenmerge.analysis.features import Feature
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.analysis.greedy import greedy_search
from frankenmerge.analysis.inputs import even_neurons
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.hooks import block_outputs, blocks_of, embedding_of, forward
from frankenmerge.models.loading import Placement, load_model

BLOCK, NEURONS, LENGTH, BEAM, RANDOM, STEPS = 2, 12, 4, 16, 4096, 100
SCREENS = (16, 32, 64)
LARGE = 10_000
"""Tokens of a vocabulary of which not all are tried at every position."""
_BATCH = 1024


def strength(options: Options) -> dict[str, Any]:
    """Every search on `NEURONS` neurons of one block."""
    model = load_model(open_checkpoint(options.donor), Placement(device=options.device))
    block, width = min(BLOCK, len(blocks_of(model))), embedding_of(model).shape[1]
    features = [Feature.of(block, neuron) for neuron in even_neurons(width)[:NEURONS]]
    return Comparison(model, features).rows()


class Comparison:
    """The searches of some features of one block, and what each found."""

    def __init__(self, model: PreTrainedModel, features: Sequence[Feature]) -> None:
        self.model, self.features = model, features
        self.vocabulary = len(embedding_of(model))
        self.generator = torch.Generator().manual_seed(SEED)
        values = self.activations(self.random(RANDOM))
        self.mean, self.deviation = values.mean(axis=0), values.std(axis=0)

    def rows(self) -> dict[str, Any]:
        """Activation and passes by search."""
        large = self.vocabulary > LARGE
        found: dict[str, Any] = {}
        screens = SCREENS if not large else (SCREENS[-1],)
        for count in screens:
            screened = ascent_search(self.model, self.features, n=LENGTH, candidates=count)
            found[f"ascent_{count}_candidates"] = self.row(
                screened.values[:, -1], screened.passes
            ) | {"recall": screened.recall}
        if not large:
            found |= self._exact()
        budget = found[next(iter(found)) if large else "ascent"]["passes"]
        for name, search in (("random", self.best_random), ("gradient", self.best_gradient)):
            found[name] = self.row(search(budget), budget * len(self.features))
        return found

    def _exact(self) -> dict[str, Any]:
        """The searches that try all tokens."""
        greedy = greedy_search(self.model, self.features, n=LENGTH)
        beam = greedy_search(self.model, self.features, n=LENGTH, beam=BEAM)
        ascent = ascent_search(self.model, self.features, n=LENGTH)
        plain, passes = zip(
            *(
                plain_ascent(self.score(number), self.vocabulary, torch.from_numpy(tokens).long())
                for number, tokens in enumerate(greedy.tokens)
            ),
            strict=True,
        )
        rows = {
            "greedy": self.row(greedy.values[:, -1], greedy.passes),
            f"beam_{BEAM}": self.row(beam.values[:, -1], beam.passes),
            "plain_ascent": self.row(np.array(plain), sum(passes) + greedy.passes),
            "ascent": self.row(ascent.values[:, -1], ascent.passes),
        }
        ratios = ((ascent.values[:, -1] - self.mean) / (np.array(plain) - self.mean)).tolist()
        improvable = [
            self.improvable(number, torch.from_numpy(tokens).long())
            for number, tokens in enumerate(ascent.tokens)
        ]
        rows["ascent"] |= {
            "improvable": float(np.mean(improvable)),
            "over_plain": rows["ascent"]["activation"] / rows["plain_ascent"]["activation"],
            "worst_over_plain": min(ratios),
            "better_than_greedy": float((ascent.values > greedy.values)[:, -1].mean()),
        }
        return rows

    def row(self, values: np.ndarray, passes: float) -> dict[str, Any]:
        """Activations `[features]` and the passes of all features."""
        relative = (values - self.mean) / self.deviation
        return {"activation": float(relative.mean()), "passes": passes / len(self.features)}

    def random(self, count: int) -> Tensor:
        """Random inputs `[count, LENGTH]`."""
        return torch.randint(self.vocabulary, (count, LENGTH), generator=self.generator)

    @torch.no_grad()
    def activations(self, inputs: Tensor) -> np.ndarray:
        """Of all features at the last position, `[inputs, features]`."""
        parts, neurons = [], [feature.neuron for feature in self.features]
        block = self.features[0].block
        with block_outputs(self.model, last=block) as states:
            for rows in inputs.to(self.model.device).split(_BATCH):
                forward(self.model, input_ids=rows)
                parts.append(states[block][:, -1, neurons].float().cpu())
        return torch.cat(parts).numpy()

    def score(self, number: int) -> Callable[[Tensor], Tensor]:
        """The activation of one feature on inputs `[r, n]`."""
        return lambda inputs: torch.from_numpy(self.activations(inputs)[:, number])

    def improvable(self, number: int, tokens: Tensor) -> bool:
        """Whether an exchange of one token of `[n]` by any other gives a higher activation."""
        _, passes = plain_ascent(self.score(number), self.vocabulary, tokens)
        return passes > len(tokens)

    def best_random(self, passes: float) -> np.ndarray:
        """The best of as many random inputs, each feature its own."""
        return self.activations(self.random(round(passes * self.vocabulary))).max(axis=0)

    def best_gradient(self, passes: float) -> np.ndarray:
        """The best of gradient searches from as many random starts as cost the same."""
        decoder = decoder_of(embedding_table(self.model), excluded=None)
        starts = max(1, round(passes * self.vocabulary / (GRADIENT_COST * STEPS)))
        best = np.full(len(self.features), -np.inf)
        for seed in range(starts):
            found = gradient_search(
                self.model, self.features, tokens=LENGTH, steps=STEPS, seed=seed, decoder=decoder
            )
            best = np.maximum(best, self.activations(found.tokens).diagonal())
        return best


def plain_ascent(
    score: Callable[[Tensor], Tensor], vocabulary: int, tokens: Tensor
) -> tuple[float, int]:
    """Coordinate ascent from `tokens` `[n]`: the activation that it ends at, and its passes."""
    tokens, best, passes, unchanged, position = tokens.clone(), -np.inf, 0, 0, 0
    while unchanged < len(tokens):
        inputs = tokens.repeat(vocabulary, 1)
        inputs[:, position] = torch.arange(vocabulary)
        values = score(inputs)
        passes += 1
        chosen = int(values.argmax())
        changed = chosen != int(tokens[position]) and float(values[chosen]) > best
        if changed:
            tokens[position] = chosen
        best = max(best, float(values[chosen]))
        unchanged = 1 if changed else unchanged + 1
        position = (position + 1) % len(tokens)
    return best, passes
