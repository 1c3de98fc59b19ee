"""Refined gauges: the right rotation is known, and what is written is what is run."""

import json
from contextlib import contextmanager

import pytest
import torch
from conftest import resolved, rotated_donor, write_donor, written
from safetensors.torch import load_file
from splicing.test_gauge_fitting import in_memory, on_disk, recipe_of

from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.donors.families import FAMILIES
from frankenmerge.errors import FrankenmergeError
from frankenmerge.merging.fits import awaited_fits, load_fits, save_fits
from frankenmerge.models.loading import load_model
from frankenmerge.models.sampling import sample_tokens
from frankenmerge.splicing import gauge_fitting as fitting
from frankenmerge.splicing.assemble import assemble
from frankenmerge.splicing.gauge_fitting import Fit, fitted_rotations
from frankenmerge.splicing.gauge_refining import donor_states, refined
from frankenmerge.splicing.rotation import Rotation, random_rotation

IDS = torch.randint(48, (12, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(fitting, "SAMPLED_ROWS", 16)
    monkeypatch.setattr(fitting, "SAMPLED_LENGTH", 16)


def nudged(rotation: Rotation, amount: float) -> Rotation:
    """A rotation near a given one, which keeps the all-ones direction where that keeps it."""
    skew = (
        torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        * amount
    )
    skew = (torch.eye(16) - 1 / 16).double() @ (skew - skew.T) @ (torch.eye(16) - 1 / 16).double()
    return Rotation(rotation.matrix @ torch.matrix_exp(skew), rotation.scale)


def off(rotation: Rotation) -> float:
    return float((rotation.matrix @ rotation.matrix.T - torch.eye(16)).abs().max())


@pytest.mark.parametrize("maps", ["rotations", "linear"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_refining_leads_back_towards_the_right_rotation(family, maps, tmp_path):
    first = write_donor(tmp_path / "first", family, seed=3)
    centred = FAMILIES[family].norm == "layer"
    away = random_rotation(16, 1, centred=centred)
    second = rotated_donor(first, tmp_path / "second", away)
    recipe = recipe_of(
        (first, 0, 2, None), (second, 2, 4, {"to": "previous", "refine": 60, "maps": maps})
    )
    splice = resolved(recipe)
    models = {
        name: load_model(donor).requires_grad_(False) for name, donor in splice.donors.items()
    }
    start = nudged(
        Rotation(away.matrix.T.contiguous()), 0.2 if family == "gpt2" else 0.05
    )  # this one hardly feels less
    found = refined(splice, models, {1: start}, donor_states(models, IDS))[1]

    @torch.no_grad()
    def divergence(fit):
        model = assemble(splice, models, fits={1: fit})
        said = model(input_ids=IDS).logits.log_softmax(-1)
        right = models[str(first)](input_ids=IDS).logits.log_softmax(-1)
        return float((right.exp() * (right - said)).sum(-1).mean())

    assert len(found) == 3
    assert divergence(Fit(start, 0.0, found)) < 0.3 * divergence(Fit(start, 0.0))
    if maps == "rotations":
        assert max(map(off, found)) < 1e-14 and all(rotation.writing is None for rotation in found)
    else:
        assert min(map(off, found)) > 1e-6 and all(
            rotation.writing is not None for rotation in found
        )
    if centred and maps == "rotations":
        torch.testing.assert_close(
            found[0].matrix.sum(0), torch.ones(16, dtype=torch.float64), atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_states_of_donors_are_those_of_transformers(donors):
    model = load_model(open_checkpoint(str(donors["a"])))
    states = donor_states({"a": model}, IDS)
    expected = model.get_output_embeddings()(model.model.norm(states.last["a"]))
    torch.testing.assert_close(expected, model(input_ids=IDS).logits)


def test_tokens_are_sampled_from_the_models_distribution(donors):
    model = load_model(open_checkpoint(str(donors["a"])))
    ids = sample_tokens(model, 4000, 2, 7, seed=0)
    assert ids.shape == (4000, 2) and set(ids[:, 0].tolist()) == {7}
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[7]])).logits[0, -1].softmax(-1)
    assert (ids[:, 1].bincount(minlength=48) / 4000 - expected).abs().max() < 0.03
    assert torch.equal(ids, sample_tokens(model, 4000, 2, 7, seed=0))
    assert not torch.equal(ids, sample_tokens(model, 4000, 2, 7, seed=1))


def strangers(donors, maps, **gauge):
    """A recipe whose first, middle and last slices are rotated, each by rotations of its own."""
    a, b = donors["a"], donors["deep"]
    refine = {"refine": 4, "maps": maps, **gauge}
    return recipe_of(
        (b, 0, 2, {"to": "base", **refine}),
        (a, 1, 3, None),
        (b, 2, 4, {"to": "previous"}),
        (a, 3, 4, {"to": "base", **refine}),
        base_model=str(a),
    )


@pytest.mark.parametrize("maps", ["rotations", "linear"])
def test_what_is_written_is_what_is_run(donors, maps, tmp_path):
    recipe = strangers(donors, maps)
    virtual, written = in_memory(recipe), on_disk(recipe, tmp_path / "merged")
    torch.testing.assert_close(written, virtual, atol=1e-5, rtol=1e-5)
    plain = in_memory(
        parse_recipe(recipe.dump().replace("refine: 4", "").replace(f"maps: {maps}", ""), "plain")
    )
    assert (virtual - plain).abs().max() > 1e-3
    fits = fitted_rotations(resolved(recipe))
    record = json.loads((tmp_path / "merged" / "frankenmerge.json").read_text())["gauges"]
    assert (
        record["0"]["refined"] == [rotation.hash for rotation in fits[0].refined]
        and len(set(record["0"]["refined"])) == 2
    )
    assert "refined" not in record["2"] and len(record["3"]["refined"]) == 2
    source, made = (
        load_file(path)
        for path in (donors["a"] / "model.safetensors", tmp_path / "merged" / "model.safetensors")
    )
    expected = fits[3].refined[0].writes.T @ source["model.layers.3.mlp.down_proj.weight"].double()
    assert torch.equal(made["model.layers.6.mlp.down_proj.weight"], expected.float())


def test_progress_of_fits_steps_and_bytes(donors, tmp_path):
    meters = []

    @contextmanager
    def progress(what, total, unit):
        done = []
        yield done.append
        meters.append((what, total, unit, sum(done)))

    recipe = strangers(donors, "rotations")
    written(recipe, tmp_path / "merged", progress=progress)
    size = resolved(recipe).bytes
    assert meters == [
        ("fitting gauges", 3, "gauges", 3),
        ("refining gauges", 4, "steps", 4),
        ("merging into merged", size, "bytes", size),
    ]


def test_a_slice_between_tied_ends_is_refined_too(donors, tmp_path):
    tied, other = donors["b"], write_donor(tmp_path / "other", seed=9, tie_word_embeddings=True)
    gauge = {"to": "base", "refine": 3}
    recipe = recipe_of(
        (other, 0, 1, None),
        (donors["a"], 1, 3, gauge),
        (tied, 3, 4, None),
        base_model=str(tied),
        embedding=str(tied),
        head=str(tied),
    )
    torch.testing.assert_close(
        on_disk(recipe, tmp_path / "merged"), in_memory(recipe), atol=1e-5, rtol=1e-5
    )
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


def test_every_step_counts_and_a_text_is_used_as_well(donors, text):
    more, longer = (
        strangers(donors, "rotations", refine=5),
        strangers(donors, "rotations", fit=str(text)),
    )
    once, *others = (
        fitted_rotations(resolved(recipe))[0]
        for recipe in (strangers(donors, "rotations"), more, longer)
    )
    assert all(
        rotation.hash != other.refined[0].hash for rotation in once.refined for other in others
    )
    assert once.rotation.hash == others[0].rotation.hash != others[1].rotation.hash


def test_a_resumed_merge_keeps_the_fits_it_began_with(donors, tmp_path, monkeypatch):
    from frankenmerge.merging import writer

    recipe, output = strangers(donors, "rotations"), tmp_path / "merged"
    monkeypatch.setattr(writer, "small_files", interrupt)
    with pytest.raises(FrankenmergeError, match="no room"):
        on_disk(recipe, output, resume=True)
    monkeypatch.undo()
    kept = tmp_path / ".merged.partial" / "fits.safetensors"
    fits = load_fits(kept)
    other = {
        number: fit._replace(
            rotation=random_rotation(16, 9), refined=(random_rotation(16, 9),) * len(fit.refined)
        )
        for number, fit in fits.items()
    }
    save_fits(other, kept)
    on_disk(recipe, output, resume=True)
    record = json.loads((output / "frankenmerge.json").read_text())["gauges"]
    assert record["2"]["rotation"] == random_rotation(16, 9).hash


def interrupt(*_):
    raise OSError("no room")


@pytest.mark.parametrize("maps", ["rotations", "linear"])
def test_fits_are_read_as_they_were_written(donors, maps, tmp_path):
    fits = fitted_rotations(resolved(strangers(donors, maps)))
    save_fits(fits, tmp_path / "fits")
    again = load_fits(tmp_path / "fits")
    assert {number: (fit.rotation.hash, fit.residual) for number, fit in again.items()} == {
        number: (fit.rotation.hash, fit.residual) for number, fit in fits.items()
    }
    assert [rotation.hash for rotation in again[0].refined] == [
        rotation.hash for rotation in fits[0].refined
    ]


def test_further_processes_take_the_fits_of_the_first_and_miss_it_where_it_is_gone(
    donors, tmp_path
):
    splice, folder = resolved(strangers(donors, "rotations")), tmp_path / "work"
    folder.mkdir()
    with pytest.raises(FrankenmergeError, match="RANK 0"):
        awaited_fits(folder, tmp_path / "merged", splice)
    save_fits({1: Fit(random_rotation(16, 9), 0.5)}, folder / "fits.safetensors")
    found = awaited_fits(folder, tmp_path / "merged", splice)
    assert found and found[1].rotation.hash == random_rotation(16, 9).hash


def test_a_changed_text_is_not_resumed(donors, text, tmp_path, monkeypatch):
    from frankenmerge.merging import writer

    recipe, output = strangers(donors, "rotations", fit=str(text)), tmp_path / "merged"
    monkeypatch.setattr(writer, "small_files", interrupt)
    with pytest.raises(FrankenmergeError, match="no room"):
        on_disk(recipe, output, resume=True)
    monkeypatch.undo()
    text.write_text(text.read_text() + "and more ")
    with pytest.raises(FrankenmergeError, match="another text"):
        on_disk(recipe, output, resume=True)


def test_linear_maps_are_for_refined_gauges_alone():
    text = """\
slices: [{sources: [{model: a, layer_range: [0, 1]}], gauge: {to: base, maps: linear}}]
merge_method: passthrough
"""
    with pytest.raises(FrankenmergeError, match="refine"):
        parse_recipe(text, "recipe")


def test_turns_are_hashed_by_their_numbers():
    eye = torch.eye(2).double()
    assert (
        len(
            {
                Rotation(eye).hash,
                Rotation(eye, 2.0).hash,
                Rotation(eye, 1.0, 2 * eye).hash,
                Rotation(eye, 1.0, eye).hash,
            }
        )
        == 4
    )
