"""Which atlases can be aligned, what is refused, and what `align` writes and prints."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_donor

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.artefacts.alignment import load_alignment
from frankenmerge.artefacts.atlas import Atlas, TopTokens
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError


def atlas_of(path) -> Atlas:
    return analyze(open_checkpoint(str(path)))


@pytest.fixture(scope="module")
def atlases(donors) -> dict[str, Atlas]:
    return {name: atlas_of(donors[name]) for name in ("a", "b", "wide")}


def overlap(one, other) -> float:
    one, other = set(one), set(other)
    return len(one & other) / len(one | other)


def test_donors_of_different_widths_are_compared_on_the_indices_both_have(
    atlases, donors, run, tmp_path
):
    alignment = align(atlases["a"], atlases["wide"])
    assert alignment.widths == (16, 32)
    assert alignment.provenance["shared_neurons"] == 16
    assert {score.detail.shape for score in alignment.scores.values()} == {(5, 5, 16), (5, 5, 0)}
    assert [tokens.shape[1] for tokens in alignment.tokens] == [16, 32]
    output = tmp_path / "aw.alignment.safetensors"
    code, out, _ = run("align", donors["a"], donors["wide"], "-o", output)
    assert code == 0 and "Widths 16 and 32: the first 16 neurons are compared." in " ".join(
        out.split()
    )
    code, out, _ = run("align", donors["a"], donors["wide"], "-o", output, "--json")
    record = json.loads(out)
    assert (code, record["widths"], record["shared_neurons"]) == (0, [16, 32], 16)


def test_as_many_tokens_are_compared_as_both_atlases_have(atlases):
    a, b = atlases["a"], atlases["b"]
    short = replace(a, top={"plain": TopTokens(*(array[:, :, :4] for array in a.top["plain"]))})
    found = align(short, b).scores["jaccard"].detail
    for i, j, f in np.ndindex(found.shape):
        expected = overlap(a.top["plain"].tokens[i, f, :4], b.top["plain"].tokens[j, f, :4])
        assert found[i, j, f] == pytest.approx(expected, abs=1e-3)


def test_donors_of_different_vocabularies_are_refused(atlases, donors, run, tmp_path):
    other = write_donor(tmp_path / "other", vocab_size=50)
    with pytest.raises(FrankenmergeError, match="48 and 50 tokens"):
        align(atlases["a"], atlas_of(other))
    code, _, err = run("align", donors["a"], other, "-o", tmp_path / "x.alignment.safetensors")
    assert code == 2 and "48 and 50 tokens" in err
    assert not (tmp_path / "x.alignment.safetensors").exists()


def test_vocabularies_of_one_size_and_other_texts_are_refused(atlases):
    texts = [text.upper() for text in atlases["a"].vocabulary]
    with pytest.raises(FrankenmergeError, match="the same vocabulary"):
        align(atlases["a"], replace(atlases["b"], vocabulary=texts))


def test_atlases_of_other_probes_are_refused(atlases):
    provenance = atlases["b"].provenance | {"probes": {"shape": [64, 17], "sha256": "0", "seed": 1}}
    with pytest.raises(FrankenmergeError, match="the same probes"):
        align(atlases["a"], replace(atlases["b"], provenance=provenance))


def test_a_context_that_an_atlas_lacks_is_refused(atlases, donors, run, tmp_path):
    plain = {"plain": atlases["b"].top["plain"]}
    with pytest.raises(FrankenmergeError) as refused:
        align(atlases["a"], replace(atlases["b"], top=plain), context="bos")
    (fault,) = refused.value.faults
    assert fault.place == atlases["b"].donor and "bos" in fault.expected and fault.found == "plain"
    without = write_donor(tmp_path / "without", bos_token_id=None)
    code, _, err = run(
        "align", donors["a"], without, "-o", tmp_path / "x.alignment.safetensors", "--bos"
    )
    assert code == 2 and "bos_token_id" in err


def test_every_fault_is_told_at_once(atlases):
    a = atlases["a"]
    provenance = a.provenance | {"probes": None}
    with pytest.raises(FrankenmergeError) as refused:
        align(a, replace(a, vocabulary=["x"], top={}, provenance=provenance))
    assert len(refused.value.faults) == 3


def test_the_command_line_writes_what_it_tells(donors, atlases, run, tmp_path):
    path = tmp_path / "ab.alignment.safetensors"
    code, out, _ = run("align", donors["a"], donors["b"], "-o", path, "--bos", "--json")
    record, written, expected = (
        json.loads(out),
        load_alignment(path),
        align(atlases["a"], atlases["b"], context="bos"),
    )
    assert code == 0 and list(record["scores"]) == list(written.scores) == list(expected.scores)
    assert record["donors"] == [str(donors["a"]), str(donors["b"])] and record["blocks"] == [4, 4]
    assert written.provenance["context"] == "bos"
    for name, score in expected.scores.items():
        np.testing.assert_array_equal(written.scores[name].matrix, score.matrix)
        np.testing.assert_array_equal(np.float32(record["scores"][name]["matrix"]), score.matrix)
        for null, matrix in score.nulls.items():
            np.testing.assert_array_equal(np.float32(record["scores"][name]["nulls"][null]), matrix)
