"""The evidence file of plans: the plans, their constraints and the model of their damage."""

from collections.abc import Sequence

from frankenmerge.artefacts.evidence import ConstraintsRecord, Evidence, PredictionModelRecord
from frankenmerge.planning.plan import Plan
from frankenmerge.planning.prediction import DamageModel
from frankenmerge.planning.search import Constraints


def evidence_of(
    plans: Sequence[Plan],
    constraints: Constraints,
    model: DamageModel,
    keys: Sequence[str | None] | None = None,
) -> Evidence:
    """Return the evidence for plans.

    Args:
        plans: the best first; at least one.
        constraints: what all of them meet.
        model: what predicted their damage.
        keys: the key of each plan's recipe with its donors, where these are known.
    """
    keys = keys or [None] * len(plans)
    return Evidence(
        plans=[plan.record(key) for plan, key in zip(plans, keys, strict=True)],
        constraints=ConstraintsRecord.model_validate(constraints.as_json()),
        model=PredictionModelRecord.model_validate(model.as_json()),
    )
