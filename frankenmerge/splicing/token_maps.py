"""The tokens of one vocabulary in terms of another's, compared by the bytes they stand for."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from frankenmerge.donors.token_bytes import TokenBytes

if TYPE_CHECKING:
    import numpy as np

NO_ROW = -1


class TokenMap(NamedTuple):
    """The tokens of a vocabulary in terms of those of a donor that has another one."""

    exact: "np.ndarray"
    """The donor's row of the same token, `NO_ROW` for a token that it lacks; int32 `[v]`."""
    pieces: "np.ndarray"
    """Rows of the known pieces of other tokens, `NO_ROW` behind the last; int32 `[v, p]`."""

    @property
    def composed(self) -> "np.ndarray":
        """Tokens that the donor lacks, with pieces that it knows; bool `[v]`."""
        return (self.exact == NO_ROW) & (self.pieces[:, 0] != NO_ROW)


def token_map(
    model: TokenBytes, donor: TokenBytes, alike: Mapping[str, int], rows: int
) -> TokenMap:
    """Find every token of a donor's vocabulary in a model's.

    Args:
        model: the tokens that there are rows of.
        donor: the tokens that rows are needed of.
        alike: ids of the model's special tokens by the donor's names for what they do.
        rows: of the result.
    """
    import numpy as np

    ids, special = model.ids, {token: index for index, token in model.special.items()}
    bytewise = {model.plain[index]: index for index in model.single if index in model.plain}
    exact, listed = np.full(rows, NO_ROW, np.int32), dict[int, list[int]]()
    for index, text in donor.plain.items():
        first = bytewise if index in donor.single else ids
        if (found := first.get(text, ids.get(text))) is not None:
            exact[index] = found
        else:
            listed[index] = pieces(text, ids)
    for index, token in donor.special.items():
        exact[index] = special.get(token, alike.get(token, NO_ROW))
    longest = max(map(len, listed.values()), default=0)
    made = np.full((rows, max(1, longest)), NO_ROW, np.int32)
    for index, found in listed.items():
        made[index, : len(found)] = found
    return TokenMap(exact, made)


def pieces(text: bytes, ids: Mapping[bytes, int]) -> list[int]:
    """The fewest tokens that make up a text, the longer ones first; none where there are none.

    Args:
        text: of a token.
        ids: tokens by their bytes.
    """
    best: list[tuple[int, int, int] | None] = [None] * len(text) + [(0, 0, 0)]
    for start in reversed(range(len(text))):
        for stop in range(len(text), start, -1):
            rest, token = best[stop], ids.get(text[start:stop])
            if rest is not None and token is not None:
                count = rest[0] + 1
                if (found := best[start]) is None or count < found[0]:
                    best[start] = count, stop, token
    made, place = [], 0
    while place < len(text) and (step := best[place]) is not None:
        made.append(step[2])
        place = step[1]
    return made if place == len(text) else []
