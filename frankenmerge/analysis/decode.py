"""From embeddings back to tokens: by the pseudo-inverse of the embedding matrix.

Also the artefact that the source document (see docs/method.md) mistook for it, `decode_hidden`.

For an embedding `e` it reads the token as `argmax_V e E^+`, with `E` the embedding matrix `[v, d]`.
`E^+ E a` is not one-hot (its diagonal averages `d / v`), so only the argmax is meaningful, and that
it is right for the tokens themselves is checked, not assumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from frankenmerge.errors import fail
from frankenmerge.models.hooks import embedding_of

_SCORES = 1 << 24
"""Scores in memory at once."""


@dataclass(frozen=True)
class Decoder:
    """The pseudo-inverse of one embedding matrix, in float64; reusable.

    With `E = QR`, `E^+ = R^+ Q^T = R^+ (E R^+)^T`, for any rank.
    """

    inverse: Tensor
    """`R^+`, `[d, min(v, d)]`."""
    rows: Tensor
    """`E R^+`, `[v, min(v, d)]`: the score of token `j` for the embedding of token `t` is the
    product of rows `t` and `j`.
    """
    lowest: Tensor
    """`[v]`: for every token the lowest id among those with exactly its embedding, which is what it
    decodes to.
    """
    excluded: Tensor
    """`[v]`, bool: the tokens that nothing decodes to."""

    @property
    def left_out(self) -> tuple[int, ...]:
        """The excluded tokens' ids."""
        return tuple(self.excluded.nonzero()[:, 0].tolist())

    @torch.no_grad()
    def __call__(self, embeddings: Tensor) -> Tensor:
        """Tokens `[...]` of embeddings `[..., d]`; of equal scores the lowest id wins."""
        rows = embeddings.reshape(-1, embeddings.shape[-1]).to(self.inverse)
        found = [self._best(chunk) for chunk in rows.split(max(1, _SCORES // len(self.rows)))]
        return torch.cat(found).reshape(embeddings.shape[:-1])

    def _best(self, rows: Tensor) -> Tensor:
        scores = (rows @ self.inverse) @ self.rows.T
        return self.lowest[scores.masked_fill_(self.excluded, -torch.inf).argmax(dim=1)]


def embedding_table(model: PreTrainedModel) -> Tensor:
    """Every token as `inputs_embeds`, `[v, d]`: the embedding matrix, scaled if the family does.

    Gemma's embedding module multiplies by `sqrt(d)` before the model sees it; GPT-2's learned
    positions are added later to any embeddings, and are not included.
    """
    weight = embedding_of(model)
    with torch.no_grad():
        return model.get_input_embeddings()(torch.arange(len(weight), device=weight.device))


def decoder_of(table: Tensor, *, excluded: Sequence[int] | None = ()) -> Decoder:
    """Invert an embedding matrix, once, and check that every token's own embedding decodes to it.

    Tokens with exactly the same embedding decode to the lowest id among them. A token may decode to
    one with a longer embedding of a similar direction: in llama2xs-281K, 257 of 512 do, nearly all
    of them bytes that do not occur in its training text.

    Args:
        table: `[v, d]`, from `embedding_table`.
        excluded: tokens that nothing may decode to, such as special or untrained ones. None
            excludes those that do not decode to themselves; the decoder's `excluded` lists them.

    Raises:
        FrankenmergeError: if tokens that are not excluded decode to others; names them.
    """
    table = table.double() + 0.0  # -0.0 becomes 0.0, so that equal rows have equal bytes
    inverse = torch.linalg.pinv(torch.linalg.qr(table, mode="r").R)
    mask = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    mask[list(excluded or ())] = True
    decoder = Decoder(inverse, table @ inverse, _lowest(table, mask), mask)
    doubtful = _doubtful(decoder)
    wrong = doubtful[decoder(table[doubtful]) != decoder.lowest[doubtful]]
    if excluded is None:
        mask[wrong] = True
    elif len(wrong):
        named = ", ".join(map(str, wrong[:10].tolist())) + (
            f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        )
        remedy = "exclude these tokens; they are often untrained"
        raise fail(
            "embedding matrix",
            "every token's embedding to decode to that token",
            f"another one for {named}",
            remedy,
        )
    return decoder


def decode_hidden(embeddings: Tensor) -> Tensor:
    """The artefact: argmax over the width of embeddings `[..., d]`, a neuron's index, not a token.

    The source document's Llama gradient tables were decoded this way: descent on neuron `f`
    increases component `f` of the embedding, and this returns `f` for any model. See
    `artefact_share`.
    """
    return embeddings.argmax(dim=-1)


def artefact_share(tokens: Tensor, neurons: Sequence[int]) -> float:
    """The share of decoded tokens `[n, s]` that equal their row's neuron; 1 for the artefact."""
    wanted = torch.tensor(neurons, device=tokens.device)[:, None]
    return (tokens == wanted).double().mean().item()


def _lowest(table: Tensor, excluded: Tensor) -> Tensor:
    first: dict[bytes, int] = {}
    ids = []
    for token, (row, left_out) in enumerate(
        zip(table.cpu().numpy(), excluded.tolist(), strict=True)
    ):
        ids.append(token if left_out else first.setdefault(row.tobytes(), token))
    return torch.tensor(ids, device=table.device)


def _doubtful(decoder: Decoder) -> Tensor:
    """The tokens whose own score leads by less than the precision of float32.

    Comparing all of them in float64 takes five times as long. A row's product with a shorter row is
    smaller than with itself (Cauchy-Schwarz): only longer rows need to be compared.
    """
    lengths = decoder.rows.norm(dim=1).masked_fill(decoder.excluded, -1)
    order = lengths.argsort(descending=True)[: int((~decoder.excluded).sum())]
    rows, own = decoder.rows[order].float(), lengths[order].float()
    slack = 1e-4 * own * own.max()
    found, step = [], max(1, _SCORES // len(order))
    for start in range(0, len(order), step):
        stop = min(start + step, len(order))
        scores = rows[start:stop] @ rows[:stop].T
        scores[:, start:].fill_diagonal_(-torch.inf)
        found.append(order[start:stop][scores.max(dim=1).values >= (own**2 - slack)[start:stop]])
    return torch.cat(found).sort().values
