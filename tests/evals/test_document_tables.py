"""The source document's tables: how cells are scored, and the cells compared with the searches."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import DATA, VOCABULARY
from document_cells import TABLES

from frankenmerge.analysis.analyze import token_texts
from frankenmerge.analysis.features import parse_features
from frankenmerge.analysis.gradient import gradient_search
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.loading import load_model

EVALS = Path(__file__).resolve().parents[2] / "evals"


@pytest.fixture
def document(monkeypatch):
    monkeypatch.syspath_prepend(EVALS)
    import document

    return document


@pytest.fixture
def printed(document):
    import document_tables

    def call(*arguments: object) -> dict:
        done = CliRunner().invoke(document_tables.main, [*map(str, arguments), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return call


@pytest.mark.parametrize(
    ("found", "cell", "options", "expected"),
    [
        ([" View"], "View", {}, "agrees"),
        ([" Peb"], "Peb ", {"excuse": "why"}, "agrees"),
        (["Peb"], "View", {}, "differs"),
        (["Peb"], "View", {"excuse": "why"}, "not comparable"),
        (["Peb"], None, {}, "not comparable"),
        (["(@", '"></', " guiName", '"></'], ' (@"></ guiName"></', {}, "agrees"),
        (["(@", '"></', " guiName", '">'], ' (@"></ guiName"></', {}, "differs"),
        (["</s>", "\n", "</s>", " "], "</s></s>", {}, "agrees"),
        (
            ["x", "called", "y"],
            "are called Also",
            {"positions": range(1, 2), "tokens": ("are", "called", "Also")},
            "agrees",
        ),
        (
            ["are", "call", "Also"],
            "are called Also",
            {"positions": range(1, 2), "tokens": ("are", "called", "Also")},
            "differs",
        ),
        (
            ["x", "called", "y"],
            "are called Also",
            {"positions": range(0, 2), "tokens": ("are", "called", "Also")},
            "differs",
        ),
        (
            ["are", "called", "Also"],
            "are called Also",
            {"positions": range(1, 2), "tokens": None},
            "not comparable",
        ),
    ],
)
def test_verdict(document, found, cell, options, expected):
    assert document.verdict(found, cell, **options) == expected


WORDS = {"Item", "called", "call", "ed", "I", "ger", "Also", "lass", "ура", "a", "aa"}


@pytest.mark.parametrize(
    ("cell", "count", "expected"),
    [
        ("ItemItemItem", 3, ("Item",) * 3),
        ("called Iger Alsolass", 5, ("called", "I", "ger", "Also", "lass")),
        ("called Iger Alsolass", 6, ("call", "ed", "I", "ger", "Also", "lass")),
        ("called Iger Alsolass", 4, None),
        ("aaa", 2, ("aa", "a")),
        ("aaa", 3, ("a", "a", "a")),
        ("ураItem", 2, ("ура", "Item")),
        ("Item?", 2, None),
        ("", 1, None),
    ],
)
def test_a_string_is_split_into_as_many_tokens(document, cell, count, expected):
    assert document.split(cell, WORDS, count) == expected


def test_models_are_identified_by_their_shape(document):
    from transformers import AutoConfig

    for name, shape in document.MODELS.items():
        assert document.model_of(AutoConfig.for_model(**shape)) == name
    assert document.model_of(AutoConfig.for_model("gpt2")) == "gpt2"
    assert (
        document.model_of(
            AutoConfig.for_model(**document.MODELS["llama-7b"] | {"max_position_embeddings": 4096})
        )
        is None
    )
    assert document.model_of(AutoConfig.for_model("gpt2", n_layer=6)) is None


def test_every_row_has_a_block_of_its_table_and_a_cell_for_each_feature():
    for table in TABLES:
        specs = parse_features(table.features.format(*range(2000, 2005)), 1, 4096)
        for rows in table.pages.values():
            assert set(rows) <= set(table.blocks)
            short = [block for block, cells in rows.items() if len(cells) != len(specs)]
            assert short == ([4] if table.name == "softmax prior" else [])


def test_gpt2_cells_are_tokens_of_gpt2(document):
    """One token for a complete search, four for a greedy one; a mistyped cell would have none."""
    from transformers import AutoTokenizer

    folder = DATA / "tokenizers" / "gpt2"
    if not folder.is_dir():
        pytest.skip(f"GPT-2's tokenizer is not in {folder}")
    from document_searches import GREEDY_TOKENS, ids_by_text

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = ids_by_text(tokenizer.batch_decode([[token] for token in range(50257)]))
    counts = {"greedy": GREEDY_TOKENS}
    strings = [
        (cell, counts.get(table.method, 1))
        for table in TABLES
        for model, rows in table.pages.items()
        for cells in rows.values()
        for cell in cells
        if model.startswith("gpt2")
    ]
    assert len(strings) == 95
    assert [string for string, count in strings if document.split(string, ids, count) is None] == [
        "distruptions"
    ]  # as in the document
    known = {
        "Pwr": 49267,
        "Claud": 36303,
        "Peb": 42507,
        "View": 7680,
        "ItemTracker": 47198,
        "watched": 7342,
        "(@": 4275,
    }
    assert all(token in ids[text] for text, token in known.items())


def test_a_donor_fills_every_table_and_its_limits_are_reported(printed, donors):
    (result,) = printed("--model", donors["a"])["models"]
    assert [table["table"] for table in result["tables"]] == [table.name for table in TABLES]
    assert (result["document_model"], result["trained"], result["tokenizer"]) == (None, True, True)
    model = load_model(open_checkpoint(str(donors["a"])))
    texts = token_texts(open_checkpoint(str(donors["a"])))
    for table in result["tables"]:
        assert {cell["block"] for cell in table["cells"]} == {1, 2, 4} & set(
            next(t.blocks for t in TABLES if t.name == table["table"])
        )
        for cell in table["cells"]:
            assert cell["texts"] == [texts[token] for token in cell["tokens"]]
            assert (cell["page"], cell["verdict"]) == (None, "not comparable")
    by_name = {table["table"]: table for table in result["tables"]}
    assert by_name["greedy search"]["notes"] == [
        "Skipped, because the model has 4 blocks: 8, 12, 16, 20, 24."
    ]
    assert by_name["gradient, single neurons"]["features"] == "[:, :, 8-12]"
    assert [cell["tokens"] for cell in by_name["complete search"]["cells"]] == [
        [best(model, block, f)] for block in (1, 2, 4) for f in range(4)
    ]
    for cell in by_name["inversion, L1"]["cells"]:
        assert cell["tokens"] == [best(model, 1, int(cell["feature"][-2]))]


@torch.no_grad()
def best(model, block: int, neuron: int, prefix: tuple[int, ...] = ()) -> int:
    """The top-activating token of a neuron after a prefix, from the library's own hidden states.

    Not for the last block.
    """
    inputs = torch.tensor([[*prefix, token] for token in range(VOCABULARY)])
    caught = []
    handle = model.base_model.layers[block - 1].register_forward_hook(
        lambda _module, _args, output: caught.append(output)
    )
    model(input_ids=inputs)
    handle.remove()
    return int(caught[0][:, -1, neuron].argmax())


TINY = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 16, "vocab_size": VOCABULARY}


class Expected(NamedTuple):
    """What the searches find in a model, from its own hidden states."""

    texts: list[str]
    first: list[int]
    """The top-activating tokens of the first neurons of block 2."""
    built: list[int]
    """Greedy search for the first of them, of four tokens."""
    hidden: list[list[str]]
    """Gradient search for two neurons of block 1 at all positions, then for one at three positions.
    """

    def changed(self, words: list[str], positions: set[int]) -> str:
        """Words joined, with another token, also of an id below the width, at some positions."""
        return "".join(
            self.texts[(self.texts.index(word) + 1) % 16] if place in positions else word
            for place, word in enumerate(words)
        )


def expected_of(donor: Path) -> Expected:
    checkpoint = open_checkpoint(str(donor))
    model, texts = load_model(checkpoint), token_texts(checkpoint)
    first = [best(model, 2, neuron) for neuron in range(4)]
    built = [first[0]]
    for _ in range(3):
        built.append(best(model, 2, 0, tuple(built)))
    specs = parse_features("[:, :, 9-10]", 1, 16) + parse_features("[:, 0-2, 9]", 1, 16)
    hidden = [
        [texts[token] for token in row]
        for row in gradient_search(model, specs, decode="hidden").tokens.tolist()
    ]
    return Expected(texts, first, built, hidden)


def tables_like(document, expected: Expected) -> tuple:
    """Tables for the model `ours`: cells that agree, that differ and that cannot be compared."""
    texts, first, hidden = expected.texts, expected.first, expected.hidden
    wrong = texts[(first[1] + 1) % VOCABULARY]
    complete = (f" {texts[first[0]]}", wrong, None, texts[first[3]])
    greedy = ("".join(texts[token] for token in expected.built),)
    gradient = ("".join(hidden[0]), "".join(hidden[1][:4]) + wrong)
    position = (
        expected.changed(hidden[2], {1, 2, 3, 4}),
        expected.changed(hidden[3], {1}),
        "XYZ??",
    )

    def table(name: str, method: str, features: str, blocks: tuple, cells: tuple, **more):
        return document.Table(name, method, features, blocks, {"ours": {blocks[0]: cells}}, **more)

    control = {"untrained": True, "excuse": "random"}
    return (
        table("complete", "complete", "[:, :, 0-3]", (2, 4), complete),
        table("greedy", "greedy", "[:, :, 0-0]", (2,), greedy),
        table("gradient", "gradient", "[:, :, {1}-{2}]", (1,), gradient),
        table("position", "gradient", "[:, 0-2, {1}]", (1,), position),
        table("short", "complete", "[:, :, 0-3]", (2,), (texts[first[0]], wrong)),
        table("control", "complete", "[:, :, 0-3]", (2,), (wrong,) * 4, **control),
    )


def test_cells_of_the_documents_own_model_are_scored(document, printed, donors, monkeypatch):
    import document_tables

    expected = expected_of(donors["a"])
    monkeypatch.setitem(document.MODELS, "ours", TINY)
    monkeypatch.setattr(document_tables, "TABLES", tables_like(document, expected))
    (result,) = printed("--model", donors["a"])["models"]
    assert result["document_model"] == "ours"
    found = {table["table"]: table["cells"] for table in result["tables"]}
    verdicts = {
        name: [cell["verdict"] for cell in cells if cell["way"] != "E^+"]
        for name, cells in found.items()
    }
    assert verdicts["complete"] == [
        "agrees",
        "differs",
        "not comparable",
        "agrees",
        *["not comparable"] * 4,
    ]
    assert verdicts["greedy"] == ["agrees", "agrees"]
    assert [cell["way"] for cell in found["greedy"]] == ["last position", "all positions"]
    assert (found["greedy"][0]["page_ids"], found["greedy"][0]["tokens"]) == (
        [[token] for token in expected.built],
        expected.built,
    )
    assert verdicts["gradient"] == ["agrees", "differs"]
    assert verdicts["position"] == ["agrees", "differs", "not comparable"]
    assert {cell["verdict"] for cell in found["gradient"] if not cell["artefact"]} == {
        "not comparable"
    }
    assert verdicts["short"] == ["not comparable"] * 4
    assert "has 2 cells for 4 features" in result["tables"][4]["notes"][0]
    assert "differs" not in verdicts["control"]
    assert result["verdicts"] == Counter(
        cell["verdict"] for cells in found.values() for cell in cells
    )


def test_random_weights_in_a_shape_of_the_document(document, printed, donors, monkeypatch):
    monkeypatch.setitem(
        document.MODELS,
        "gpt2",
        {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": VOCABULARY},
    )

    def shown(*arguments: object) -> list[dict]:
        asked = ("--table", "complete search", "--table", "untrained, complete search")
        (result,) = printed("--random", "gpt2", *asked, *arguments)["models"]
        assert not result["trained"] and set(result["verdicts"]) == {"not comparable"}
        return [cell for table in result["tables"] for cell in table["cells"]]

    ids, again, named, other = (
        shown(),
        shown(),
        shown("--tokenizer", donors["a"]),
        shown("--seed", 1),
    )
    assert ids == again
    assert [cell["texts"] for cell in ids] == [
        [f"<{token}>" for token in cell["tokens"]] for cell in ids
    ]
    assert [cell["tokens"] for cell in named] == [cell["tokens"] for cell in ids]
    texts = token_texts(open_checkpoint(str(donors["a"])))
    assert [cell["texts"] for cell in named] == [
        [texts[token] for token in cell["tokens"]] for cell in named
    ]
    assert len(ids) == 12  # blocks 1 and 2, and block 1 of the control, which has the next seed
    assert (
        [cell["tokens"] for cell in ids[8:]]
        == [cell["tokens"] for cell in other[:4]]
        != [cell["tokens"] for cell in ids[:4]]
    )


def test_claims_are_shares_with_an_interval_and_a_null(document):
    import document_claims

    from frankenmerge.artefacts.atlas import TopTokens

    # scipy.stats.binomtest(7, 20).proportion_ci(method="wilson")
    assert document_claims.wilson(7 / 20, 20) == pytest.approx((0.18119, 0.56715), abs=1e-4)
    generator = np.random.default_rng(0)
    aligned = np.tile(generator.permutation(400), (5, 1))[:, :, None]
    aligned[3] = generator.permutation(400)[:, None]
    specs = [spec for block in (1, 2, 3, 4) for spec in parse_features("[:, :, 0-3]", block, 400)]
    for blocks, untrained, expected in (
        ((1, 2), False, "true"),
        ((1, 2, 3), False, "true"),
        ((3, 4), False, "not shown"),
        ((3, 4), True, "true"),
        ((1, 2), True, "false"),
    ):
        table = document.Table("x", "complete", "[:, :, 0-3]", blocks, untrained=untrained)
        own = [spec for spec in specs if spec.block in blocks]
        (found,) = document_claims.claims(table, own, {}, lambda: TopTokens(aligned, aligned), 400)
        assert found.verdict == expected
    assert found.share == 1 and found.null == 0 and found.count == 400


def test_claims_of_a_model_that_is_not_the_documents_own(printed, donors):
    names = ("greedy search", "gradient, single neurons", "complete search")
    asked = [option for name in names for option in ("--table", name)]
    (result,) = printed("--model", donors["a"], *asked)["models"]
    tables = {table["table"]: table for table in result["tables"]}
    ways = [
        [cell["tokens"] for cell in tables["greedy search"]["cells"] if cell["way"] == way]
        for way in ("last position", "all positions")
    ]
    same, *_ = tables["greedy search"]["claims"]
    assert same["share"] == pytest.approx(np.mean([a == b for a, b in zip(*ways, strict=True)]))
    (own, repeated) = tables["gradient, single neurons"]["claims"]
    cells = [cell for cell in tables["gradient, single neurons"]["cells"] if not cell["artefact"]]
    pairs = [a == b for cell in cells for a, b in combinations(cell["tokens"], 2)]
    assert repeated["share"] == pytest.approx(np.mean(pairs))
    assert own["null"] == pytest.approx(1 / VOCABULARY)


@pytest.mark.parametrize(
    ("arguments", "reported"), [((), "--model"), (("--model", "/nowhere"), "/nowhere")]
)
def test_mistakes_are_reported(document, arguments, reported):
    import document_tables

    done = CliRunner().invoke(document_tables.main, arguments)
    assert done.exit_code in (1, 2) and reported in done.output
    assert isinstance(done.exception, SystemExit)
