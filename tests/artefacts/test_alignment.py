"""The alignment on disk: what is written is what is read, and what is no alignment is refused."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from frankenmerge.artefacts.alignment import (
    Alignment,
    Exchange,
    Score,
    load_alignment,
    save_alignment,
)
from frankenmerge.errors import FrankenmergeError


def random_alignment(blocks=(3, 5), width=6, names=("one", "two")) -> Alignment:
    """An alignment of random numbers, every one of them different."""
    generator = np.random.default_rng(0)
    rows, columns = blocks[0] + 1, blocks[1] + 1

    def matrix():
        return generator.random((rows, columns), dtype=np.float32)

    def score(*nulls):
        return Score(
            matrix(),
            {null: matrix() for null in nulls},
            generator.random((rows, columns, width)).astype(np.float16),
        )

    return Alignment(
        donors=names,
        fingerprints=("f1", "f2"),
        widths=(width, width + 2),
        scores={
            "argmax": score("permuted_probes", "permuted_neurons"),
            "jaccard": score("permuted_probes", "permuted_neurons"),
            "correlation": score("permuted_probes", "permuted_neurons", "residual_law"),
        },
        tokens=(
            generator.integers(0, 48, (rows, width, 10), dtype=np.int32),
            generator.integers(0, 48, (columns, width + 2, 10), dtype=np.int32),
        ),
        vocabulary=["<s>", "ä", "語", *map(str, range(45))],
        provenance={"context": "plain", "atlases": [{"k": 10}, {"k": 10}]},
        exchange=Exchange(
            (
                generator.random(blocks, dtype=np.float32),
                generator.random(blocks[::-1], dtype=np.float32),
            ),
            (
                generator.random((blocks[0],) * 2, dtype=np.float32),
                generator.random((blocks[1],) * 2, dtype=np.float32),
            ),
        ),
    )


@pytest.fixture
def alignment() -> Alignment:
    return random_alignment()


def assert_same_array(one, other) -> None:
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


def assert_equal(one: Alignment, other: Alignment) -> None:
    for field in ("donors", "fingerprints", "widths", "vocabulary", "provenance", "blocks"):
        assert getattr(one, field) == getattr(other, field)
    assert one.scores.keys() == other.scores.keys()
    for name, score in one.scores.items():
        twin = other.scores[name]
        assert score.nulls.keys() == twin.nulls.keys()
        assert_same_array(score.matrix, twin.matrix)
        assert_same_array(score.detail, twin.detail)
        for null, matrix in score.nulls.items():
            assert_same_array(matrix, twin.nulls[null])
    for tokens, twin in zip(one.tokens, other.tokens, strict=True):
        assert_same_array(tokens, twin)
    assert (one.exchange is None) == (other.exchange is None)
    for tables, twins in zip(one.exchange or (), other.exchange or (), strict=True):
        for table, twin in zip(tables, twins, strict=True):
            assert_same_array(table, twin)


def test_exchange_turns_round_with_the_alignment(alignment):
    rotated = alignment.transposed.exchange
    for pair, back in zip(alignment.exchange, rotated, strict=True):
        assert_same_array(pair[0], back[1])
        assert_same_array(pair[1], back[0])


def test_what_was_saved_is_loaded(alignment, tmp_path):
    save_alignment(alignment, tmp_path / "ab")
    assert_equal(load_alignment(tmp_path / "ab"), alignment)


def test_a_transposed_alignment_survives_the_disk(alignment, tmp_path):
    save_alignment(alignment.transposed, tmp_path / "ba")
    assert_equal(load_alignment(tmp_path / "ba"), alignment.transposed)


def test_two_saves_are_the_same_bytes(alignment, tmp_path):
    for number in range(8):
        save_alignment(alignment, tmp_path / str(number))
    assert len({(tmp_path / str(number)).read_bytes() for number in range(8)}) == 1


def test_blocks_do_not_count_the_embedding(alignment):
    assert alignment.blocks == (3, 5)
    assert alignment.transposed.blocks == (5, 3)


def test_transposing_exchanges_the_donors(alignment):
    rotated = alignment.transposed
    assert (rotated.donors, rotated.fingerprints, rotated.widths) == (
        ("two", "one"),
        ("f2", "f1"),
        (8, 6),
    )
    assert rotated.tokens[0] is alignment.tokens[1] and rotated.tokens[1] is alignment.tokens[0]
    for name, score in alignment.scores.items():
        for i, j in np.ndindex(4, 6):
            assert rotated.scores[name].matrix[j, i] == score.matrix[i, j]
            assert all(
                rotated.scores[name].nulls[null][j, i] == matrix[i, j]
                for null, matrix in score.nulls.items()
            )
            np.testing.assert_array_equal(rotated.scores[name].detail[j, i], score.detail[i, j])


def test_transposing_twice_gives_the_same(alignment):
    assert_equal(alignment.transposed.transposed, alignment)


def test_transposing_exchanges_what_is_told_of_the_atlases(alignment):
    mixed = replace(
        alignment, provenance={"atlases": [{"dtype": "float32"}, {"dtype": "bfloat16"}]}
    )
    assert mixed.transposed.provenance["atlases"] == [{"dtype": "bfloat16"}, {"dtype": "float32"}]


def absent(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def prose(path):
    path.write_text("slices: []\n" * 50)


def an_atlas(path):
    save_file(load_file(path), path, {"frankenmerge.atlas/1": "{}"})


def a_later_kind(path):
    save_file(load_file(path), path, {"frankenmerge.alignment/2": "{}"})


def a_score_without_detail(path):
    metadata = {
        "donors": ["a", "b"],
        "fingerprints": ["f", "f"],
        "widths": [6, 8],
        "provenance": {},
    }
    arrays = load_file(path)
    del arrays["detail.jaccard"]
    save_file(arrays, path, {"frankenmerge.alignment/1": json.dumps(metadata)})


def nothing_told(path):
    save_file(load_file(path), path, {"frankenmerge.alignment/1": "{}"})


def one_donor(path):
    metadata = {"donors": ["a"], "fingerprints": ["f", "f"], "widths": [6, 8], "provenance": {}}
    save_file(load_file(path), path, {"frankenmerge.alignment/1": json.dumps(metadata)})


BROKEN = [
    absent,
    folder,
    truncated,
    prose,
    an_atlas,
    a_later_kind,
    a_score_without_detail,
    nothing_told,
    one_donor,
]


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_no_alignment_is_refused_by_its_name(alignment, tmp_path, broken):
    path = tmp_path / "broken.alignment.safetensors"
    save_alignment(alignment, path)
    broken(path)
    with pytest.raises(FrankenmergeError) as refused:
        load_alignment(path)
    (fault,) = refused.value.faults
    assert fault.place == str(path) and "alignment" in fault.expected and fault.remedy


def test_the_command_line_tells_that_an_alignment_is_missing(run, tmp_path):
    code, out, err = run(
        "plan", tmp_path / "none.alignment.safetensors", "-o", tmp_path / "recipe.yaml"
    )
    assert (code, out) == (2, "")
    assert "none.alignment.safetensors" in err and "no such file" in err and "Traceback" not in err


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_save_leaves_nothing(alignment, tmp_path, monkeypatch, moment):
    def interrupt(*_):
        raise Interrupted

    monkeypatch.setattr(os, moment, interrupt)
    with pytest.raises(Interrupted):
        save_alignment(alignment, tmp_path / "ab.alignment.safetensors")
    assert list(tmp_path.iterdir()) == []
