"""`features` with fluent inputs and a text: printed, as JSON, as a file, and in the report."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from frankenmerge.artefacts.features import parse

LETTERS = "\0abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEXT = "the quick brown fox jumps over the lazy dog\na big dog and a small fox"
OPTIONS = ("--layers", "0,3", "--neurons", "2,5")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def states(donors):
    """The library's own states of documents, `[s, d]`, after BOS."""
    model = AutoModelForCausalLM.from_pretrained(donors["a"]).eval()

    def call(document, block):
        ids = torch.tensor([[0, *(LETTERS.index(letter) for letter in document)]])
        with torch.no_grad():
            return model(input_ids=ids, output_hidden_states=True).hidden_states[block][0]

    return call


def found(run, *arguments) -> list[dict]:
    code, out, err = run("features", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)["features"]


def test_examples_are_the_places_of_the_highest_activation(donors, run, text, states):
    rows = found(run, donors["a"], *OPTIONS, "--text", text, "--separator", "\\n")
    for row in rows:
        expected = []
        for document in TEXT.split("\n"):
            own = states(document, row["block"])[1:, row["neuron"]]
            expected.append((float(own.max()), document, int(own.argmax())))
        for example, (activation, document, place) in zip(
            row["examples"], sorted(expected, reverse=True), strict=True
        ):
            assert example["activation"] == pytest.approx(activation, rel=1e-4, abs=1e-5)
            assert example["texts"][example["place"]] == document[place]
            passage = "".join(example["texts"]).removeprefix("<s>")
            assert passage in document and example["text"] == str(text)
            assert [len(each) for each in example["texts"]].count(1) == len(passage)


def test_windows_share_a_long_text(donors, run, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(TEXT.replace("\n", " ") * 8)
    for row in found(run, donors["a"], *OPTIONS, "--text", path):
        values = [example["activation"] for example in row["examples"]]
        assert len(values) == 5 and values == sorted(values, reverse=True)


def test_a_file_that_the_report_shows(donors, run, text, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "a.features.json"
    options = ("--method", "ascent", "--layers", "3", "--neurons", "2", "--tokens", 3)
    arguments = (donors["a"], *options, "--fluent", "--steps", 3, "--text", text)
    code, out, err = run("features", *arguments, "-o", path)
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    assert "Fluent inputs of block 3, neuron 2" in out and "vocabulary passes" in out
    file = parse(json.loads(path.read_text()), str(path))
    (row,) = found(run, *arguments)
    assert [feature.as_json() for feature in file.features] == [row]
    assert row["front"][0]["tokens"] == row["tokens"]
    example = row["examples"][0]
    assert f"[{example['texts'][example['place']]}]" in out
    page = tmp_path / "report.html"
    assert run("report", folder, "-o", page)[0] == 0
    html = page.read_text()
    assert 'id="inputs"' in html and "Activation of block 3, neuron 2, against fluency" in html
    assert html.count('<mark class="peak">') == len(row["examples"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--fluent", "--isolated"), "--isolated"),
        (("--fluent", "--tokens", "1"), "none of a single token"),
    ],
)
def test_what_fluent_inputs_cannot_be_is_refused(donors, run, options, words):
    code, out, err = run("features", donors["a"], "--method", "ascent", *OPTIONS, *options)
    assert code == 2 and not out and words in err and "Traceback" not in err


def test_examples_of_several_neurons_are_refused(donors, run, text):
    options = ("--method", "gradient", "--features", "[:, :, 0:4]", "--text", text)
    code, _, err = run("features", donors["a"], *options)
    assert code == 2 and "examples are of single neurons" in err
