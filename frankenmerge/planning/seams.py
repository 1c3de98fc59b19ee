"""The evidence for a seam: cost, scores, and the neurons that agree most and least."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from frankenmerge.artefacts.alignment import Alignment
from frankenmerge.artefacts.evidence import NeuronRecord, SeamBlockRecord, SeamRecord
from frankenmerge.artefacts.recipe import Seam

LISTED = 5
"""How many agreeing and disagreeing neurons the evidence names."""


@dataclass(frozen=True)
class SeamEvidence:
    """A seam, what it is predicted to cost, and the scores of the two states that meet there."""

    seam: Seam
    cost: float
    """Predicted damage, in nats per token, of a recipe with only this seam."""
    skipped: int
    """Number of blocks that are left out; negative if blocks are repeated."""
    scores: dict[str, float]
    nulls: dict[str, dict[str, float]]
    """For each score, its value under each null."""
    agree: list[dict[str, Any]]
    """The neurons with the highest score: neuron, its scores, each donor's top-activating tokens,
    and the tokens of both donors.

    A neuron that the search omitted has no score.
    """
    disagree: list[dict[str, Any]]
    gauged: bool = False
    """Whether the recipe rotates one donor into the basis of the other."""

    @property
    def by_chance(self) -> bool:
        """Whether the donors' tokens agree at most twice as often as those of unrelated neurons."""
        return self.scores["jaccard"] <= 2 * self.nulls["jaccard"]["permuted_neurons"]

    def record(self) -> SeamRecord:
        """The evidence as in the plan's file."""
        after, before = (
            SeamBlockRecord(model=block.model, block=block.index) for block in self.seam
        )
        return SeamRecord(
            after=after,
            before=before,
            cost=self.cost,
            skipped_blocks=self.skipped,
            by_chance=self.by_chance,
            gauged=self.gauged,
            scores=self.scores,
            nulls=self.nulls,
            agree=[NeuronRecord.model_validate(neuron) for neuron in self.agree],
            disagree=[NeuronRecord.model_validate(neuron) for neuron in self.disagree],
        )

    def as_json(self) -> dict[str, Any]:
        """The evidence as JSON; block numbers are 0-based, as in the recipe."""
        return self.record().as_json()


def seam_evidence(
    seam: Seam, alignment: Alignment, left: int, entered: int, cost: float, *, gauged: bool
) -> SeamEvidence:
    """Collect the evidence for one seam.

    Args:
        seam: the last block before it and the first after it.
        alignment: of the donor that is left with the donor that is entered.
        left: number of blocks after which the first donor is left.
        entered: index of the first block of the second donor.
        cost: predicted damage, in nats per token, of a recipe with only this seam.
        gauged: whether the recipe rotates one donor into the basis of the other.
    """
    scores = {
        name: round(float(score.matrix[left, entered]), 4)
        for name, score in alignment.scores.items()
    }
    nulls = {
        name: {null: round(float(matrix[left, entered]), 4) for null, matrix in score.nulls.items()}
        for name, score in alignment.scores.items()
    }
    detail = {
        name: score.detail[left, entered].astype(np.float32)
        for name, score in alignment.scores.items()
        if score.detail.shape[2]
    }
    # Many neurons tie on the tokens; the correlation orders those.
    ranked = np.lexsort((detail["correlation"], detail["jaccard"]))

    agree, disagree = (
        [_neuron_evidence(int(neuron), alignment, left, entered, detail) for neuron in neurons]
        for neurons in (ranked[::-1][:LISTED], ranked[:LISTED])
    )
    return SeamEvidence(seam, cost, entered - left, scores, nulls, agree, disagree, gauged)


def _neuron_evidence(
    neuron: int, alignment: Alignment, left: int, entered: int, detail: dict[str, np.ndarray]
) -> dict[str, Any]:
    """One neuron's scores and top-activating tokens; `detail` has each score of every neuron."""
    a, b = (
        table[block, neuron].tolist()
        for table, block in zip(alignment.tokens, (left, entered), strict=True)
    )

    def texts(tokens: list[int]) -> list[str]:
        return [alignment.vocabulary[token] for token in tokens]

    return {
        "neuron": neuron,
        "scores": {
            name: round(float(values[neuron]), 4)
            for name, values in detail.items()
            if not np.isnan(values[neuron])
        },
        "tokens": [texts(a[:4]), texts(b[:4])],
        "shared": texts([token for token in a if token in b]),
    }
