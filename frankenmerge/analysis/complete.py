"""Complete search: run every token of the vocabulary once, keep the best for every feature.

For block `l` and neuron `f` the feature is `argmax_a O^l_f(a)` over all tokens `a` (the source
document, see docs/method.md, "Complete Search Features"). One pass serves every block and neuron;
only the top k of the blocks so far are kept.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from frankenmerge.analysis.ranking import merge, pack, top_tokens
from frankenmerge.artefacts.atlas import TopTokens
from frankenmerge.models.hooks import Site, embedding_of
from frankenmerge.models.passes import BATCH, Passage
from frankenmerge.models.streaming import Donor, each_block, model_of
from frankenmerge.progress import Advance, ignore


def complete_search(
    donor: Donor,
    *,
    k: int = 10,
    prefix: tuple[int, ...] = (),
    site: Site = "block",
    isolated: bool = False,
    bottom: bool = False,
    masked: Sequence[int] = (),
    shortcut: bool = True,
    advance: Advance = ignore,
) -> TopTokens:
    """Find the `k` tokens with the highest activation of every feature of every block.

    Args:
        donor: a model, or a streamed donor; block outputs are compared in float32.
        k: how many tokens to keep.
        prefix: tokens put before the searched one, such as BOS; none by default.
        site: the blocks' outputs, or their attention's.
        isolated: whether every block is fed the embedding directly.
        bottom: find the tokens with the lowest activation instead, the lowest first.
        masked: tokens that are not searched, such as special and untrained ones.
        shortcut: whether to skip queries and keys for tokens without a prefix, which does not
            change the attention.
        advance: called with the number of tokens that passed a block since its last call.

    Returns:
        Tokens and activations `[l+1, d, k]`, best first; of equal activations the lowest token id
        wins.

    Raises:
        FrankenmergeError: when an activation is not a number.
    """
    tokens = searched(donor, masked)
    passage = Passage(
        donor,
        tokens[:, None],
        prefix=prefix,
        site=site,
        isolated=isolated,
        batch=BATCH,
        shortcut=shortcut,
    )
    ranked = Ranked(tokens, k, bottom)
    ranked.add(passage.entering())
    for index, block in each_block(donor):
        ranked.add(passage.through(index, block), advance)
    return ranked.top


def searched(donor: Donor, masked: Sequence[int] = ()) -> Tensor:
    """The ids of the vocabulary that are not masked, ascending.

    Rows of the embedding beyond the vocabulary, such as Mllama's for images, are no tokens.
    """
    model = model_of(donor)
    weight = embedding_of(model)
    size = getattr(model.config.get_text_config(decoder=True), "vocab_size", len(weight))
    tokens = range(min(size, len(weight)))
    return torch.tensor(sorted(set(tokens) - set(masked)), device=weight.device)


class Ranked:
    """The best tokens of every feature, block after block."""

    def __init__(self, tokens: Tensor, k: int, bottom: bool = False) -> None:
        """Start before any block: rank `tokens` `[n]`, keep the `k` highest, or lowest."""
        self.tokens, self.k, self.sign = tokens, min(k, len(tokens)), -1.0 if bottom else 1.0
        self.keys: list[Tensor] = []

    def add(
        self,
        outputs: Iterable[tuple[slice, Tensor]],
        advance: Advance = ignore,
    ) -> None:
        """Rank the next block's outputs `[b, s, d]`, batches of rows, by their last position."""
        best: Tensor | None = None
        for rows, states in outputs:
            tokens = self.tokens[rows].to(states.device)
            best = merge(
                best,
                pack(self.sign * states[:, -1].float().T, tokens, f"block {len(self.keys)}"),
                self.k,
            )
            advance(len(tokens))
        assert best is not None
        self.keys.append(best.cpu())

    @property
    def top(self) -> TopTokens:
        """Tokens and activations of the blocks so far."""
        return top_tokens(torch.stack(self.keys), self.sign)
