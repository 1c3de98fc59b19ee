"""The atlas on disk: what is written is what is read, and what is no atlas is refused."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_donor
from safetensors.numpy import load_file, save_file

from frankenmerge.analysis.analyze import analyze, cached_analyze
from frankenmerge.artefacts.atlas import Atlas, TopTokens, load_atlas, save_atlas
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError


def opened(path):
    return open_checkpoint(str(path))


@pytest.fixture(scope="module")
def atlas(donors) -> Atlas:
    return analyze(opened(donors["a"]))


def assert_equal(one: Atlas, other: Atlas) -> None:
    assert (one.donor, one.fingerprint, one.vocabulary) == (
        other.donor,
        other.fingerprint,
        other.vocabulary,
    )
    assert one.provenance == other.provenance
    assert one.top.keys() == other.top.keys()
    pairs = [(one.probes, other.probes), (one.probe_scale, other.probe_scale)]
    for context, top in one.top.items():
        pairs += zip(top, other.top[context], strict=True)
    for array, twin in pairs:
        assert array.dtype == twin.dtype
        np.testing.assert_array_equal(array, twin)


def test_what_was_saved_is_loaded(atlas, tmp_path):
    save_atlas(atlas, tmp_path / "a.atlas.safetensors")
    assert_equal(load_atlas(tmp_path / "a.atlas.safetensors"), atlas)


def test_contexts_keep_their_order(atlas, tmp_path):
    save_atlas(atlas, tmp_path / "a.atlas.safetensors")
    assert list(load_atlas(tmp_path / "a.atlas.safetensors").top) == list(atlas.top)


def test_texts_of_every_script_survive_the_disk(atlas, tmp_path):
    strange = replace(
        atlas,
        donor="größe/模型",
        vocabulary=["\ufffd", "\x00", '"', "\\", "\n", "é", "語", "🙂", "", *atlas.vocabulary[9:]],
    )
    save_atlas(strange, tmp_path / "strange")
    assert_equal(load_atlas(tmp_path / "strange"), strange)


def test_an_atlas_of_one_context_has_one_context_when_loaded(atlas, tmp_path):
    save_atlas(replace(atlas, top={"plain": atlas.top["plain"]}), tmp_path / "plain")
    assert list(load_atlas(tmp_path / "plain").top) == ["plain"]


def test_arrays_that_are_views_are_written_in_their_own_order(atlas, tmp_path):
    rotated = replace(
        atlas,
        top={
            "plain": TopTokens(
                atlas.top["plain"].tokens[:, ::-1], atlas.top["plain"].values[:, ::-1]
            )
        },
    )
    save_atlas(rotated, tmp_path / "rotated")
    assert_equal(load_atlas(tmp_path / "rotated"), rotated)


def test_two_saves_are_the_same_bytes(atlas, tmp_path):
    for number in range(8):
        save_atlas(atlas, tmp_path / str(number))
    assert len({(tmp_path / str(number)).read_bytes() for number in range(8)}) == 1


def test_two_analyses_find_the_same(donors, atlas):
    assert_equal(analyze(opened(donors["a"])), atlas)


def test_an_atlas_tells_its_donors_sizes(atlas):
    assert (atlas.blocks, atlas.width, len(atlas.vocabulary)) == (4, 16, 48)
    assert atlas.top["plain"].tokens.shape == atlas.top["bos"].values.shape == (5, 16, 10)
    assert (atlas.top["plain"].tokens.dtype, atlas.top["plain"].values.dtype) == (
        np.int32,
        np.float32,
    )


def test_an_atlas_has_no_bos_context_where_the_donor_has_no_bos(tmp_path):
    atlas = analyze(opened(write_donor(tmp_path / "donor", bos_token_id=None)))
    assert list(atlas.top) == ["plain"]


def test_the_vocabulary_is_what_the_tokenizer_makes_of_every_id(atlas):
    assert atlas.vocabulary == [
        "<s>",
        *"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:47],
    ]


def test_ids_beyond_the_tokenizer_are_shown_as_numbers(tmp_path):
    vocabulary = analyze(opened(write_donor(tmp_path / "donor", vocab_size=50))).vocabulary
    assert vocabulary[46:] == ["S", "T", "<48>", "<49>"]


def absent(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:40])


def empty(path):
    path.write_bytes(b"")


def prose(path):
    path.write_text("slices: []\n" * 50)


def weights(path):
    save_file({"probes": np.zeros(3, dtype=np.float32)}, path)


def other_kind(path):
    save_file(load_file(path), path, {"frankenmerge.alignment/1": "{}"})


def no_metadata(path):
    save_file(load_file(path), path, {})


def broken_metadata(path):
    save_file(load_file(path), path, {"frankenmerge.atlas/1": "{"})


def a_part_missing(path):
    metadata = {"donor": "a", "fingerprint": "f", "provenance": {}}
    arrays = load_file(path)
    del arrays["bos.values"]
    save_file(arrays, path, {"frankenmerge.atlas/1": json.dumps(metadata)})


BROKEN = [
    absent,
    folder,
    truncated,
    cut_in_the_header,
    empty,
    prose,
    weights,
    other_kind,
    no_metadata,
    broken_metadata,
    a_part_missing,
]


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_no_atlas_is_refused_by_its_name(atlas, tmp_path, broken):
    path = tmp_path / "broken.atlas.safetensors"
    save_atlas(atlas, path)
    broken(path)
    with pytest.raises(FrankenmergeError) as refused:
        load_atlas(path)
    (fault,) = refused.value.faults
    assert fault.place == str(path) and "atlas" in fault.expected and fault.remedy


def test_a_vocabulary_that_cannot_be_read_is_refused(atlas, tmp_path):
    path = tmp_path / "a.atlas.safetensors"
    save_atlas(atlas, path)
    content = path.read_bytes()
    assert content.count(b'["<s>", "a"') == 1
    path.write_bytes(content.replace(b'["<s>", "a"', b'["<s>", a"a'))
    with pytest.raises(FrankenmergeError, match="a.atlas"):
        load_atlas(path)


@pytest.mark.parametrize("donor", ["a", "b", "g"])
def test_stored_activations_are_within_half_a_float16_step_of_the_true_ones(donors, donor):
    import torch

    from frankenmerge.analysis.probes import random_probes
    from frankenmerge.models.loading import load_model

    checkpoint = opened(donors[donor])
    atlas = analyze(checkpoint)
    with torch.no_grad():
        hidden = load_model(checkpoint)(
            input_ids=torch.from_numpy(random_probes(48)), output_hidden_states=True
        ).hidden_states
    for block in range(4):
        true = hidden[block][:, 1:].flatten(0, 1).numpy()
        scale = np.abs(true).max(axis=0)
        np.testing.assert_allclose(atlas.probe_scale[block], scale, rtol=1e-5)
        # Below 1 the steps of float16 are 2^-11 at most, so rounding errs by 2^-12; a little more
        # for float32 itself.
        assert (np.abs(atlas.activations(block) - true) <= scale * (2**-12 + 1e-5)).all()


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_save_leaves_what_was_there(atlas, tmp_path, monkeypatch, moment, earlier):
    path = tmp_path / "a.atlas.safetensors"
    if earlier:
        path.write_text("an earlier file")

    def interrupt(*_):
        raise Interrupted

    monkeypatch.setattr(os, moment, interrupt)
    with pytest.raises(Interrupted):
        save_atlas(atlas, path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["an earlier file"] * earlier


def test_a_place_that_cannot_be_written_is_a_fault_of_the_users(atlas, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FrankenmergeError, match="can be written"):
        save_atlas(atlas, tmp_path / "file" / "a.atlas.safetensors")


def test_folders_on_the_way_are_made(atlas, tmp_path):
    save_atlas(atlas, tmp_path / "x" / "y" / "a.atlas.safetensors")
    assert [path.name for path in (tmp_path / "x" / "y").iterdir()] == ["a.atlas.safetensors"]


def marked(atlas: Atlas) -> Atlas:
    return replace(atlas, provenance={"marked": True})


def test_an_atlas_in_the_cache_is_taken_from_there(donors, tmp_path):
    checkpoint = opened(donors["a"])
    first = cached_analyze(checkpoint, cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    save_atlas(marked(first), kept)
    again = cached_analyze(checkpoint, cache=tmp_path)
    assert_equal(again, marked(first))


def test_a_cached_atlas_is_told_by_the_name_the_user_gave_now(donors, tmp_path, monkeypatch):
    cached_analyze(opened(donors["a"]), cache=tmp_path)
    monkeypatch.chdir(donors["a"].parent)
    assert cached_analyze(open_checkpoint("a"), cache=tmp_path).donor == "a"
    assert len(list(tmp_path.iterdir())) == 1


def change_a_weight(path):
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def change_the_config(path):
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(
        text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03')
    )


def change_the_tokenizer(path):
    text = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(text.replace('"z"', '"ž"'))


@pytest.mark.parametrize("change", [change_a_weight, change_the_config, change_the_tokenizer])
def test_a_changed_donor_misses_the_cache(tmp_path, change):
    path = write_donor(tmp_path / "donor", seed=1)
    cache = tmp_path / "cache"
    first = cached_analyze(opened(path), cache=cache)
    (kept,) = cache.iterdir()
    save_atlas(marked(first), kept)
    before = {file: file.read_bytes() for file in path.iterdir()}
    change(path)
    assert before != {file: file.read_bytes() for file in path.iterdir()}
    assert "marked" not in cached_analyze(opened(path), cache=cache).provenance


def test_another_dtype_misses_the_cache(donors, tmp_path):
    for dtype in ("float32", "bfloat16"):
        assert (
            cached_analyze(opened(donors["a"]), cache=tmp_path, dtype=dtype).provenance["dtype"]
            == dtype
        )


def test_the_command_line_writes_the_atlas_and_takes_it_for_a_donor(donors, atlas, run, tmp_path):
    path = tmp_path / "a.atlas.safetensors"
    code, out, _ = run("analyze", donors["a"], "-o", path, "--json")
    assert code == 0
    metadata = json.loads(out)
    assert (
        metadata["blocks"],
        metadata["width"],
        metadata["vocabulary"],
        metadata["contexts"],
    ) == (
        4,
        16,
        48,
        ["plain", "bos"],
    )
    assert metadata["fingerprint"] == atlas.fingerprint
    assert_equal(load_atlas(path), atlas)
    code, _, _ = run("align", path, path, "-o", tmp_path / "aa.alignment.safetensors")
    assert code == 0


def test_progress_tells_every_input_once_a_block(donors):
    from frankenmerge.analysis.analyze import work

    done = []
    analyze(opened(donors["a"]), advance=done.append)
    assert sum(done) == work(opened(donors["a"])) == 4 * (48 + 48 + 64)
