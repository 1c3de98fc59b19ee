"""Seam diagnostics, compared with transformers' own hidden states and heads."""

import pytest
import torch
from conftest import resolved, write_donor, written

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.checks import Checks, Findings, examine
from frankenmerge.evaluation.documents import Text
from frankenmerge.evaluation.language import encode
from frankenmerge.evaluation.seams import WIDTH, WINDOWS, compared_blocks, windows_of
from frankenmerge.models.loading import load_tokenizer
from frankenmerge.splicing.assemble import assemble
from frankenmerge.workflows.evaluating import EvaluateOptions, evaluate

WORDS = "the quick brown fox jumps over the lazy dog and The Cat sat on a mat "


@torch.no_grad()
def outputs(model, ids):
    """Hidden states after every block, without the final norm, and the logits.

    All are transformers' own but for the last block's states, which it returns normed.
    """
    last = []
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    handle = blocks[-1].register_forward_hook(
        lambda _m, _a, output: last.append(output if torch.is_tensor(output) else output[0])
    )
    found = model(input_ids=ids, output_hidden_states=True)
    handle.remove()
    return [*found.hidden_states[:-1], last[0]], found.logits


def bench_of(names, text=WORDS) -> Bench:
    return Bench([Text("text", text)], {name: open_checkpoint(name) for name in names})


def seams_of(bench: Bench, splice):
    """The splice's comparison with its donors, as `evaluate --seams` makes it."""
    findings = Findings()

    def visit(subject):
        examine(subject, bench, Checks(seams=True), findings)

    bench.splice("splice", splice, visit=visit)
    return findings.seams["splice"]


def head(model, states):
    norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    return model.lm_head(norm(states))


def divergence(truth, read):
    """`sum p (log p - log q)`, without the first position."""
    p, q = (logits[:, 1:].double().softmax(-1) for logits in (truth, read))
    return float((p * (p.log() - q.log())).sum(-1).mean())


@torch.no_grad()
@pytest.mark.parametrize("pair", [("a", "b"), ("g", "h")])
def test_every_figure_is_its_formula(donors, pair):
    a, b = (str(donors[name]) for name in pair)
    recipe = recipe_of([Block(a, 0), Block(a, 1), Block(b, 1), Block(b, 2), Block(a, 3)])
    bench = bench_of([a, b])
    models = {name: bench.load(name).model for name in (a, b)}
    model = assemble(resolved(recipe), models)
    ids = torch.from_numpy(bench.encoded(a)["text"].ids[:40])[None]
    found = compared_blocks(model, recipe.blocks, models, [ids])
    streams = {name: outputs(donor, ids) for name, donor in models.items()}
    here, logits = outputs(model, ids)
    assert [(entry.block, entry.donor, entry.donor_block, entry.seam) for entry in found] == [
        (1, a, 0, False),
        (2, a, 1, False),
        (3, b, 1, True),
        (4, b, 2, False),
        (5, a, 3, True),
    ]
    for entry in found:
        states, own = here[entry.block], streams[entry.donor][0][entry.donor_block + 1]
        lengths = [float(each[:, 1:].norm(dim=-1).mean()) for each in (states, own)]
        assert entry.norm_ratio == pytest.approx(lengths[0] / lengths[1], rel=1e-4)
        for name, (stream, truth) in streams.items():
            other = stream[entry.donor_block + 1]
            dots = (states * other).sum(-1) / states.norm(dim=-1) / other.norm(dim=-1)
            assert entry.cosine[name] == pytest.approx(float(dots[:, 1:].mean()), abs=1e-5)
            assert entry.kl[name] == pytest.approx(
                divergence(truth, head(model, states)), rel=1e-3, abs=1e-5
            )
        assert entry.kl_alone == pytest.approx(
            divergence(streams[entry.donor][1], head(models[entry.donor], own)), rel=1e-3, abs=1e-5
        )
    for name in models:
        assert found[-1].kl[name] == pytest.approx(divergence(streams[name][1], logits), rel=1e-3)


def test_a_donor_assembled_from_its_own_blocks_diverges_nowhere(donors):
    a = str(donors["a"])
    recipe = recipe_of([Block(a, index) for index in range(4)])
    seams = seams_of(bench_of([a]), resolved(recipe))
    assert len(seams) == 4
    for entry in seams:
        assert entry.norm_ratio == pytest.approx(1, abs=1e-6)
        assert entry.cosine[a] == pytest.approx(1, abs=1e-6)
        assert entry.kl[a] == pytest.approx(entry.kl_alone, abs=1e-6) and not entry.seam
    assert seams[-1].kl[a] == pytest.approx(0, abs=1e-6)
    assert seams[0].kl[a] > 0.01


def test_a_checkpoint_is_compared_as_its_recipe(donors, tmp_path):
    recipe = recipe_of(
        [Block(str(donors["a"]), 0), Block(str(donors["b"]), 1), Block(str(donors["b"]), 2)]
    )
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    written(recipe, tmp_path / "merged")
    names = [str(tmp_path / "recipe.yaml"), str(tmp_path / "merged")]
    evaluated = evaluate(names, [Text("text", WORDS * 3)], EvaluateOptions(seams=True))
    assert [result.name for result in evaluated.results] == [
        *names,
        str(donors["a"]),
        str(donors["b"]),
    ]
    seams = evaluated.findings.seams
    virtual, merged = (seams[name] for name in names)
    assert set(seams) == set(names) and len(virtual) == 3
    for one, other in zip(virtual, merged, strict=True):
        assert one[:4] == other[:4]
        assert one.norm_ratio == pytest.approx(
            other.norm_ratio, rel=1e-5
        ) and one.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-6)


@torch.no_grad()
def test_donors_whose_vocabularies_are_padded_otherwise_are_compared_on_their_tokens(
    donors, tmp_path
):
    padded = write_donor(tmp_path / "padded", seed=2, vocab_size=64)
    a, b = str(donors["a"]), str(padded)
    bench = bench_of([a, b])
    splice = resolved(recipe_of([Block(a, 0), Block(b, 1), Block(a, 1)]))
    seams = seams_of(bench, splice)
    ids = windows_of(bench.encoded(a), bench.context)
    model = assemble(splice, {name: bench.load(name).model for name in (a, b)})
    truth, read = (
        torch.cat([each(input_ids=row).logits[..., :48] for row in ids])
        for each in (bench.load(b).model, model)
    )
    assert seams[-1].kl[b] == pytest.approx(divergence(truth, read), rel=1e-3)


def test_windows_are_spread_over_every_text(donors):
    tokenizer = load_tokenizer(open_checkpoint(str(donors["a"])))
    texts = {
        name: encode(tokenizer, text, name)
        for name, text in (("long", WORDS * 40), ("short", "ab"))
    }
    rows = windows_of(texts, 10_000)
    assert [row.shape for row in rows] == [(1, WIDTH)] * WINDOWS + [(1, 3)]
    assert (rows[0][0] == torch.from_numpy(texts["long"].ids[:WIDTH])).all()
    assert (rows[WINDOWS - 1][0] == torch.from_numpy(texts["long"].ids[-WIDTH:])).all()
    assert all(row.shape[1] <= 16 for row in windows_of(texts, 16))
