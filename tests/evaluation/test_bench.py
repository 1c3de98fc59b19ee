"""Texts as they are read, and the window in which all models are measured."""

import pytest
from conftest import write_donor

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.errors import FrankenmergeError
from frankenmerge.evaluation.bench import LONGEST_CONTEXT, shared_context
from frankenmerge.evaluation.documents import read_text


def test_the_window_is_the_shortest_of_the_checkpoints(donors, tmp_path):
    short = write_donor(tmp_path / "short", max_position_embeddings=32)
    assert (
        shared_context([open_checkpoint(str(path)) for path in (donors["a"], short, donors["g"])])
        == 32
    )
    assert shared_context([open_checkpoint(str(donors["a"]))]) == 64


def test_the_window_is_at_most_2048_by_default(donors, tmp_path):
    long = write_donor(tmp_path / "long", max_position_embeddings=8192)
    assert shared_context([open_checkpoint(str(long))]) == LONGEST_CONTEXT == 2048
    assert shared_context([]) == 2048


def test_line_ends_are_measured_as_they_are(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\n")
    assert read_text(tmp_path / "dos.txt").content == "one\r\ntwo\r\n"


def missing(path):
    path.unlink()


def empty(path):
    path.write_text("")


def latin_1(path):
    path.write_bytes(b"caf\xe9 au lait")


@pytest.mark.parametrize("spoil", [missing, empty, latin_1])
def test_a_text_that_cannot_be_read_is_refused(text, spoil):
    spoil(text)
    with pytest.raises(FrankenmergeError) as refused:
        read_text(text)
    (fault,) = refused.value.faults
    assert fault.place == (f"{text}:1" if spoil is latin_1 else str(text))
