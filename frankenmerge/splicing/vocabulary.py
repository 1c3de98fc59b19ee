"""Which row of the embedding each token has, in donors and result. Reads tokenizer.json alone."""

from collections.abc import Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_schema import Row, Zero
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import quantity
from frankenmerge.donors.token_bytes import TokenBytes, roles, token_bytes
from frankenmerge.donors.tokens import Tokens
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.splicing.token_maps import NO_ROW, TokenMap, token_map
from frankenmerge.storage.safetensors_header import Tensor

if TYPE_CHECKING:
    import numpy as np


class Vocabulary(NamedTuple):
    """The result's vocabulary where it is put together token by token."""

    tokens: Tokens
    donors: dict[str, Tokens]
    rows: int
    """Of embedding and head: one for every id, and the padding."""
    maps: Mapping[str, TokenMap] = {}
    """Of donors whose missing rows are approximated."""


def known_tokens(donor: Checkpoint) -> Tokens:
    """A donor's tokens; none where its tokenizer has no tokenizer.json that lists them."""
    if not (donor.path / "tokenizer.json").is_file():
        return {}
    try:
        return donor.tokens
    except FrankenmergeError:
        return {}


def _rows(donor: Checkpoint) -> int:
    return quantity(donor.config, "vocabulary") or 0


def rowless_remarks(name: str, tokens: Tokens, rows: int) -> Iterator[str]:
    """Report tokens whose ids are beyond the result's embedding of so many rows."""
    if beyond := [token for token, index in tokens.items() if index >= rows]:
        listed = ", ".join(f"{token} ({tokens[token]})" for token in beyond[:3])
        yield (
            f"the tokenizer of {name} has tokens without a row in the embedding, which has "
            f"{rows:,} rows: {listed}{', ...' if len(beyond) > 3 else ''}; a text with them cannot "
            "be processed, and tokenizer_source: base adds rows of zeros for them"
        )


def result_vocabulary(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> Vocabulary | None:
    """The result's vocabulary, or None where the rows of embedding and head stay as they are.

    They do where the recipe says nothing about the tokenizer, and where all donors agree on every
    token. Otherwise the result has the tokens of the donor that the recipe names, or of all
    (`union`): first the base's under their ids, then those of the others in order of appearance,
    then those that the recipe adds.

    Raises:
        FrankenmergeError: for donors whose tokens cannot be read.
    """
    if recipe.vocabulary is None:
        return None
    asked = (recipe.tokenizer and recipe.tokenizer.tokens) or {}
    padding = recipe.tokenizer and recipe.tokenizer.pad_to_multiple_of
    # A base model that passthrough makes no use of gives no row.
    bases = [] if recipe.merge_method == "passthrough" else [recipe.base]
    used = {*recipe.embedding_donors, *recipe.head_donors, *bases}
    chosen = donors[recipe.tokenizer_donor]
    plain = (
        not asked
        and not padding
        and {_rows(donors[name]) for name in used} == {_rows(chosen)}
        and max(known_tokens(chosen).values(), default=-1) < _rows(chosen)
    )
    files = {
        donors[name].tokenizer_hash
        for name in (recipe.tensor_donors if recipe.vocabulary == "union" else used)
    }
    if plain and files <= {chosen.tokenizer_hash, None}:
        return None
    read = _read(recipe, donors)
    tokens = dict(read[recipe.tokenizer_donor])
    others = (
        [token for name in recipe.tensor_donors for token in read[name]]
        if recipe.vocabulary == "union"
        else []
    )
    following = count(1 + max(tokens.values(), default=-1))
    for token in (token for token in dict.fromkeys([*others, *asked]) if token not in tokens):
        tokens[token] = next(following)
    if plain and all(read[name] == tokens for name in used):
        return None
    rows = 1 + max(tokens.values(), default=-1)
    # Unless padding is asked for, rows that pad the tokenizer's own matrix stay, as they do where
    # all rows stay.
    rows = -(-rows // padding) * padding if padding else max(rows, _rows(chosen))
    return Vocabulary(tokens, read, rows, _maps(recipe, donors, read, tokens, rows))


def _maps(
    recipe: Recipe,
    donors: Mapping[str, Checkpoint],
    read: Mapping[str, Tokens],
    tokens: Tokens,
    rows: int,
) -> dict[str, TokenMap]:
    """Where missing rows are approximated: the result's tokens in terms of those of its donors."""
    if recipe.tokenizer is None or recipe.tokenizer.approximate is None:
        return {}
    chosen = donors[recipe.tokenizer_donor]

    def parsed(donor: Checkpoint) -> TokenBytes:
        return token_bytes(donor.tokenizer_json, donor.path / "tokenizer.json")

    wanted, named = parsed(chosen), roles(chosen.tokenizer_settings)
    maps = {}
    for name in {*recipe.embedding_donors, *recipe.head_donors}:
        if read[name] == tokens:
            continue
        own = roles(donors[name].tokenizer_settings)
        alike = {
            token: read[name][own[role]]
            for role, token in named.items()
            if own.get(role) in read[name]
        }
        known = parsed(donors[name]).below(_rows(donors[name]))
        maps[name] = token_map(known, wanted, alike, rows)
        if (maps[name].exact == NO_ROW).all():
            place, expected = f"{name}: tokenizer", f"tokens that {chosen.name} has, too"
            raise fail(place, expected, "no token in common", "name another donor")
    return maps


def _read(recipe: Recipe, donors: Mapping[str, Checkpoint]) -> dict[str, Tokens]:
    """The tokens of all donors; those of one without a tokenizer are those of the result's."""
    chosen = donors[recipe.tokenizer_donor]
    read: dict[str | None, Tokens] = {}
    faults: list[Fault] = []
    for donor in (chosen, *(donors[name] for name in recipe.tensor_donors)):
        try:
            if donor.tokenizer_hash not in read:
                read[donor.tokenizer_hash] = (
                    donor.tokens
                    if donor.has_tokenizer or donor is chosen
                    else read[chosen.tokenizer_hash]
                )
        except FrankenmergeError as error:
            faults += error.faults
    raise_all(faults)
    return {name: read[donors[name].tokenizer_hash] for name in recipe.donors}


class Rows(NamedTuple):
    """A matrix of one row for each token of the result: a donor's row, or zeros."""

    donors: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    """What the rows are taken from, one for each donor."""
    origin: "np.ndarray"
    """For each row of the result the number of its donor, -1 for zeros; int16 `[v]`."""
    row: "np.ndarray"
    """For each row of the result its place in the donor's matrix; int32 `[v]`."""


def rows_of(
    donor: str, tensors: Mapping[str, Tensor], vocabulary: Vocabulary, recipe: Recipe
) -> Rows:
    """Put one donor's embedding or head in the result's order.

    A token has the donor's own row. Where the donor lacks it, or the recipe forces another, it has
    the row that the recipe names, else the base model's, else that of the first donor that has it,
    else zeros. A row of no token is that of the donor of the tokenizer, or zeros.

    Args:
        donor: whose matrix.
        tensors: the matrices `[v, d]` of all donors, in the order in which they substitute for
            each other.
        vocabulary: the result's.
        recipe: has the settings of single tokens.

    Raises:
        FrankenmergeError: for a token's source that has no such row.
    """
    import numpy as np

    names = list(tensors)
    asked = (recipe.tokenizer and recipe.tokenizer.tokens) or {}
    ids = {
        name: {
            token: index
            for token, index in vocabulary.donors[name].items()
            if index < tensors[name].shape[0]
        }
        for name in names
    }
    origin, row = np.full(vocabulary.rows, -1, np.int16), np.zeros(vocabulary.rows, np.int32)
    faults: list[Fault] = []
    for token, place in vocabulary.tokens.items():
        settings = asked.get(token)
        if token in ids[donor] and not (settings and settings.force):
            origin[place], row[place] = names.index(donor), ids[donor][token]
        elif settings and settings.source is not None:
            if isinstance(settings.source, Zero):
                continue
            name, index = _asked_row(token, settings.source, ids)
            if index is None or not 0 <= index < tensors[name].shape[0]:
                where = f"recipe: tokenizer.tokens.{token}.source"
                faults.append(
                    Fault(
                        where,
                        f"a token that {name} has",
                        "none",
                        "name another token, its id, or another model",
                    )
                )
                continue
            origin[place], row[place] = names.index(name), index
        elif name := next((name for name in names if token in ids[name]), None):
            origin[place], row[place] = names.index(name), ids[name][token]
    raise_all(faults)
    if (padded := recipe.tokenizer_donor) in names:
        unnamed = np.ones(min(vocabulary.rows, tensors[padded].shape[0]), bool)
        unnamed[[index for index in vocabulary.tokens.values() if index < len(unnamed)]] = False
        (places,) = np.nonzero(unnamed)
        origin[places], row[places] = names.index(padded), places
    return Rows(tuple(names), tuple(tensors.values()), origin, row)


def _asked_row(token: str, source: Row | str, ids: Mapping[str, Tokens]) -> tuple[str, int | None]:
    if isinstance(source, str):
        return source, ids[source].get(token)
    return source.model, ids[source.model].get(
        source.token
    ) if source.token is not None else source.token_id
