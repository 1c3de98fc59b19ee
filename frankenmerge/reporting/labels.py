"""What scores, nulls and missing parts are called on a page, in plain words."""

from typing import NamedTuple


class Named(NamedTuple):
    """A score's title, and what it measures."""

    title: str
    told: str


SCORES = {
    "jaccard": Named(
        "Top tokens shared",
        "The tokens that excite a neuron most in one donor and in the other: how many both have, of all "
        "they have (Jaccard index), a mean over the neurons. Plans name their neurons by it.",
    ),
    "argmax": Named(
        "Same best token",
        "The share of neurons that one and the same token excites most in both donors.",
    ),
    "correlation": Named(
        "Correlation",
        "How a neuron's activations on random tokens rise and fall together in both donors, a mean "
        "over the neurons. The residual stream alone makes much of it: look at the residual law.",
    ),
    "rank_correlation": Named(
        "Rank correlation",
        "The same of the activations' ranks, so that a few large ones count no more.",
    ),
    "cka": Named(
        "CKA",
        "How alike the donors see which inputs resemble each other. It does not see in which order the neurons stand, "
        "which a raw splice depends on.",
    ),
    "neighbours": Named(
        "Shared neighbours",
        "The share of an input's nearest inputs that are the same in both donors. Blind to the order "
        "of the neurons, like CKA.",
    ),
    "angular": Named(
        "Angle",
        "How small the angle between both donors' states is: 1 is the same direction, 0.5 a right angle.",
    ),
    "relative_error": Named(
        "Relative error",
        "One minus the size of the difference between the states, against their own size; below 0 "
        "they differ by more than they are long, and are painted like 0.",
    ),
    "gauge": Named(
        "After a rotation",
        "The share of one donor's states that the other's explain once one rotation, the same at every depth, has "
        "brought their bases together (R squared), on inputs that the fit has not seen.",
    ),
    "norm_ratio": Named(
        "Length ratio",
        "The shorter state's length over the longer one's. It knows nothing of meaning.",
    ),
    "greedy": Named(
        "Greedy inputs shared",
        "The share of tokens that greedy search finds in the same place for both donors.",
    ),
    "gradient": Named(
        "Gradient inputs shared",
        "The share of tokens that gradient search finds in the same place for both donors.",
    ),
}
NULLS = {
    "permuted_neurons": Named("Other neurons", "every neuron is held against a different one"),
    "permuted_probes": Named("Other inputs", "the inputs are shuffled in one of the donors"),
    "residual_law": Named(
        "Residual law",
        "what adding independent blocks to one stream gives for nothing, even untrained",
    ),
}
ROLES = {"model": "measured", "recipe": "run in memory", "donor": "donor"}
MISSING = {
    "recipes": ("a recipe", "frankenmerge plan ALIGNMENT -o RUN/recipe.yaml"),
    "evidence": ("the plan's evidence", "frankenmerge plan ALIGNMENT -o RUN/recipe.yaml"),
    "alignments": ("an alignment", "frankenmerge align A B -o RUN/ab.alignment.safetensors"),
    "features": ("tables of features", "frankenmerge analyze A -o RUN/a.atlas.safetensors"),
    "evaluations": (
        "an evaluation",
        "frankenmerge evaluate RUN/recipe.yaml --text FILE -o RUN/evaluation.json",
    ),
    "merges": ("a merged checkpoint", "frankenmerge merge RUN/recipe.yaml RUN/merged"),
}


def score_named(name: str) -> Named:
    """A score's words; one of another version is called by its name."""
    return SCORES.get(name, Named(name.replace("_", " "), ""))


def null_named(name: str) -> Named:
    """A null's words."""
    return NULLS.get(name, Named(name.replace("_", " "), ""))
