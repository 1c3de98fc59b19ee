"""The scores that an alignment may hold, and their null models: what each is called and means.

One entry per score. `analysis.align` has the function of every entry; tables, plots and the report
take their words from here.
"""

from typing import NamedTuple


class ScoreInfo(NamedTuple):
    """The words for a score or a null model."""

    title: str
    """As the report's heading."""
    explanation: str
    """What it measures, in full sentences; empty for a name of another version."""
    unit: str
    """What the numbers count; 1 is full agreement in all scores but `distance`."""
    short_title: str
    """For plots and table headings, in lower case."""


SCORES: dict[str, ScoreInfo] = {
    "jaccard": ScoreInfo(
        "Top tokens shared",
        "The Jaccard index of each neuron's top-activating tokens in the two donors (tokens in "
        "both sets over tokens in either), averaged over neurons. Plans use it to name neurons.",
        "Jaccard index",
        "top tokens shared (Jaccard)",
    ),
    "argmax": ScoreInfo(
        "Same best token",
        "The share of neurons whose single top-activating token is the same in both donors.",
        "share of neurons",
        "same best token",
    ),
    "correlation": ScoreInfo(
        "Correlation",
        "The correlation of each neuron's activations on random tokens in the two donors, averaged "
        "over neurons. The residual stream alone causes much of it: compare with the residual law.",
        "Pearson's r",
        "correlation on random tokens",
    ),
    "rank_correlation": ScoreInfo(
        "Rank correlation",
        "The same for the ranks of the activations, so that a few large ones have no more weight "
        "than the rest.",
        "Spearman's rho",
        "rank correlation on random tokens",
    ),
    "cka": ScoreInfo(
        "CKA",
        "Whether the donors agree on which inputs are similar (centred kernel alignment). It does "
        "not depend on the order of the neurons, which a raw splice does.",
        "CKA",
        "CKA",
    ),
    "neighbours": ScoreInfo(
        "Shared neighbours",
        "The share of an input's nearest inputs that are the same in both donors. Like CKA, it "
        "does not depend on the order of the neurons.",
        "share of nearest inputs",
        "shared neighbours",
    ),
    "angular": ScoreInfo(
        "Angle",
        "How small the angle between the two donors' states is: 1 is the same direction, 0.5 a "
        "right angle.",
        "1 - angle / pi",
        "angle",
    ),
    "relative_error": ScoreInfo(
        "Relative error",
        "One minus the norm of the difference between the states, relative to their own norms. "
        "Negative values, where the difference is larger than the states, are coloured like 0.",
        "1 - relative norm of the difference",
        "relative error",
    ),
    "gauge": ScoreInfo(
        "After a rotation",
        "The share of one donor's states that the other's explain (R squared) after one rotation, "
        "the same at every depth, maps its basis to the first donor's. Measured on inputs that the "
        "rotation was not fitted on.",
        "R squared",
        "after a rotation",
    ),
    "norm_ratio": ScoreInfo(
        "Length ratio",
        "The norm of the shorter state over the norm of the longer one. It ignores direction, and "
        "so says nothing about meaning.",
        "ratio of norms",
        "length ratio",
    ),
    "influence": ScoreInfo(
        "Influence between",
        "One minus the difference between how far the two donors' blocks so far have changed the "
        "direction of the state (the sum of ShortGPT's block influence).",
        "1 - summed cosine distance",
        "influence between",
    ),
    "relative_depth": ScoreInfo(
        "Relative depth",
        "One minus the difference between the relative depths of the two blocks. It uses no "
        "activations: a baseline.",
        "1 - difference of relative depth",
        "relative depth",
    ),
    "distance": ScoreInfo(
        "Distance",
        "Minus the number of blocks between the two depths. It uses no activations: a baseline.",
        "blocks",
        "distance",
    ),
    "greedy": ScoreInfo(
        "Greedy inputs shared",
        "The share of positions at which greedy search finds the same token for both donors.",
        "share of tokens",
        "same tokens by greedy search",
    ),
    "ascent": ScoreInfo(
        "Ascent inputs shared",
        "The share of positions at which ascent finds the same token for both donors.",
        "share of tokens",
        "same tokens by ascent",
    ),
    "gradient": ScoreInfo(
        "Gradient inputs shared",
        "The share of positions at which gradient search finds the same token for both donors.",
        "share of tokens",
        "same tokens by gradient search",
    ),
    "pixels": ScoreInfo(
        "Optimised images alike",
        "The correlation between the pixels of the images that gradient ascent finds for the same "
        "neuron in two vision transformers.",
        "Pearson's r",
        "images by ascent on pixels",
    ),
}
"""In the order in which they are presented."""

NULLS: dict[str, ScoreInfo] = {
    "permuted_neurons": ScoreInfo(
        "Other neurons",
        "every neuron is compared with a different one",
        "as the score",
        "by chance",
    ),
    "permuted_probes": ScoreInfo(
        "Other inputs",
        "the inputs are shuffled in one of the donors",
        "as the score",
        "other inputs",
    ),
    "residual_law": ScoreInfo(
        "Residual law",
        "what the shared residual stream alone produces when blocks write independently, even in "
        "an untrained model",
        "as the score",
        "residual law",
    ),
}
"""What a score is without agreement, in the order in which they are presented."""


def score_info(name: str) -> ScoreInfo:
    """Words for a score; a name that this version does not know is its own title."""
    return SCORES.get(name) or _unknown(name)


def null_info(name: str) -> ScoreInfo:
    """Words for a null model; a name that this version does not know is its own title."""
    return NULLS.get(name) or _unknown(name)


def _unknown(name: str) -> ScoreInfo:
    title = name.replace("_", " ")
    return ScoreInfo(title, "", "", title)
