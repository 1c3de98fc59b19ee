"""What healing minimises: the divergence from teachers, the tokens' own loss, or a mix."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.evaluation.domains import TARGET_BYTES, Domain
from frankenmerge.models.hooks import embedding_of
from frankenmerge.models.teaching import divergence, mean_log_probabilities

TeacherKind = Literal["ensemble", "donor", "best-per-domain", "none"]
TEACHERS: tuple[TeacherKind, ...] = ("ensemble", "donor", "best-per-domain", "none")


class Batch(NamedTuple):
    """Rows of one domain."""

    domain: int
    """Its number."""
    rows: np.ndarray


class Objective:
    """The loss of a model on rows of the domains to heal on."""

    def __init__(
        self,
        domains: Sequence[Domain],
        teachers: Sequence[Mapping[str, PreTrainedModel]],
        mix: float,
    ) -> None:
        """Compute the teachers' probabilities once, where they fit into `TARGET_BYTES`.

        Args:
            domains: what a model is healed on.
            teachers: of every domain, the models whose mean probabilities are the target; none
                where `mix` is 1.
            mix: share of the tokens' own loss.
        """
        self.domains, self.teachers, self.mix = domains, teachers, mix
        self._kept: list[Tensor] = []
        if mix < 1 and all(teachers) and self._bytes() <= TARGET_BYTES:
            self._kept = [
                torch.cat([self._taught(number, each).cpu() for each in domain.batches()])
                for number, domain in enumerate(domains)
            ]

    def _bytes(self) -> int:
        vocabulary = embedding_of(next(iter(self.teachers[0].values()))).shape[0]
        return sum(domain.counted.numel() for domain in self.domains) * vocabulary * 4

    def batches(self, seed: Sequence[int], step: int, rows: int) -> list[Batch]:
        """`rows` rows of all domains together, a pure function of seed and step.

        Every row of a domain is used once before any is used again.
        """
        share = max(1, rows // len(self.domains))
        found = []
        for number, domain in enumerate(self.domains):
            places = np.arange(step * share, (step + 1) * share)
            size = len(domain.ids)
            orders = {
                int(epoch): np.random.default_rng([*seed, number, int(epoch)]).permutation(size)
                for epoch in np.unique(places // size)
            }
            chosen = [orders[int(place) // size][int(place) % size] for place in places]
            found.append(Batch(number, np.array(chosen)))
        return found

    def weight(self, batch: Batch) -> int:
        """How many tokens of a batch count."""
        return int(self.domains[batch.domain].counted[torch.from_numpy(batch.rows)].sum())

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """The sum over the counted tokens of a batch, in nats."""
        domain = self.domains[batch.domain].of_rows(batch.rows)
        device = next(model.parameters()).device
        logits = model(input_ids=domain.ids.to(device), use_cache=False).logits
        predicted = logits[:, :-1].float().log_softmax(-1)
        counted = domain.counted.to(device)
        total = predicted.new_zeros(())
        if self.mix < 1:
            taught = self._target(batch, domain).to(device)
            total = total + (1 - self.mix) * (divergence(taught, predicted) * counted).sum()
        if self.mix > 0:
            ids = domain.ids[:, 1:, None].to(device)
            own = -predicted.gather(-1, ids).squeeze(-1)
            total = total + self.mix * (own * counted).sum()
        return total

    def _target(self, batch: Batch, domain: Domain) -> Tensor:
        if self._kept:
            return self._kept[batch.domain][torch.from_numpy(batch.rows)]
        return self._taught(batch.domain, domain)

    @torch.no_grad()
    def _taught(self, number: int, domain: Domain) -> Tensor:
        models = list(self.teachers[number].values())
        predicted = [
            model(input_ids=domain.ids.to(model.device), use_cache=False).logits[:, :-1]
            for model in models
        ]
        return mean_log_probabilities([each.float().log_softmax(-1) for each in predicted])
