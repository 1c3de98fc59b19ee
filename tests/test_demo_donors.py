"""The donors in the package are what their cards say, and merging them is exact."""

import pytest
import torch
from conftest import DEMO, in_memory, written

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.documents import Text
from frankenmerge.models.loading import load_model

NAMES = ("base", "code", "prose", "stranger", "wide", "gpt2")


def donor(name: str) -> str:
    return str(DEMO / "donors" / name)


def test_the_package_stays_below_20_megabytes():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 20e6


@pytest.mark.parametrize("name", NAMES)
def test_a_donor_is_a_complete_bf16_checkpoint_with_a_card(name):
    checkpoint = open_checkpoint(donor(name))
    assert list(checkpoint.dtypes) == ["BF16"] and checkpoint.has_tokenizer
    assert f"# {name}" in (checkpoint.path / "README.md").read_text()


@pytest.mark.parametrize(
    "pieces",
    [
        [("code", 0, 6), ("prose", 2, 8)],
        [("base", 0, 3), ("stranger", 2, 5), ("base", 5, 8)],
        [("gpt2", 0, 4), ("gpt2", 2, 6)],
        [("gpt2", 0, 1), ("gpt2", 0, 1), ("gpt2", 5, 6)],
        [("wide", 0, 3), ("wide", 1, 4)],
    ],
    ids=str,
)
def test_a_merged_checkpoint_has_exactly_the_logits_of_the_splice_in_memory(pieces, tmp_path):
    recipe = recipe_of(
        [Block(donor(name), index) for name, start, stop in pieces for index in range(start, stop)]
    )
    virtual = in_memory(recipe)
    merged = load_model(open_checkpoint(str(written(recipe, tmp_path / "merged").output)))
    ids = torch.randint(1024, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(merged(input_ids=ids).logits, virtual(input_ids=ids).logits)


def held_out_texts(monkeypatch) -> list[Text]:
    """All of the standard library that the donors were not trained on."""
    monkeypatch.syspath_prepend(str(DEMO.parents[1] / "evals" / "zoo"))
    from corpus import documents

    found = [document for document in documents() if document.held_out]
    return [
        Text(kind, "\n\n".join(document.text for document in found if document.kind == kind))
        for kind in ("code", "prose")
    ]


@pytest.mark.slow
def test_a_fine_tune_gained_on_its_own_text_and_lost_on_the_others(monkeypatch):
    checkpoints = {donor(name): open_checkpoint(donor(name)) for name in ("base", "code", "prose")}
    bench = Bench(held_out_texts(monkeypatch), checkpoints)
    base, code, prose = (bench.checkpoint(donor(name)).losses for name in ("base", "code", "prose"))
    assert base["code"].nats_per_token - code["code"].nats_per_token >= 0.1
    assert code["prose"].nats_per_token - base["prose"].nats_per_token >= 0.15
    assert base["prose"].nats_per_token - prose["prose"].nats_per_token >= 0.1
    assert prose["code"].nats_per_token - base["code"].nats_per_token >= 0.15
