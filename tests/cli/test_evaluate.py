"""`frankenmerge evaluate`: what it prints, writes and refuses."""

import json

import pytest
from conftest import DEMO

from frankenmerge.artefacts.recipe import Block, recipe_of

FIGURES = {
    "bits_per_byte",
    "perplexity",
    "nats_per_token",
    "accuracy",
    "tokens",
    "bytes",
    "intervals",
}


@pytest.fixture
def splice(tmp_path):
    """A recipe of the demo's donors, and a short text of each kind."""
    code, prose = (str(DEMO / "donors" / name) for name in ("code", "prose"))
    path = tmp_path / "splice.yaml"
    path.write_text(
        recipe_of(
            [
                *(Block(code, index) for index in range(5)),
                *(Block(prose, index) for index in (5, 6, 7)),
            ]
        ).dump()
    )
    texts = []
    for name in ("code", "prose"):
        texts.append(tmp_path / f"{name}.txt")
        texts[-1].write_text((DEMO / "text" / f"{name}.txt").read_text()[:2500])
    return path, texts, (code, prose)


def check_models(record, texts) -> None:
    """Every model has all figures with intervals, and samples."""
    for model in record["models"]:
        assert model.keys() >= FIGURES and list(model["texts"]) == [str(text) for text in texts]
        for entry in (model, *model["texts"].values()):
            assert entry.keys() >= FIGURES
            for figure, (low, high) in entry["intervals"].items():
                assert low < entry[figure] < high
        assert 0 <= model["invalid_words"] <= 1 and 0 <= model["repetition"] <= 1
        assert [sample["prompt"] for sample in model["samples"]][
            0
        ] == "This module provides" and len(model["samples"]) == 2
        assert all(
            sample["text"] and isinstance(sample["invalid"], list) for sample in model["samples"]
        )


def check_differences(record, names) -> None:
    """The recipe is compared with both donors, paired."""
    assert [(entry["model"], entry["donor"]) for entry in record["differences"]] == [
        (names[0], donor) for donor in names[1:]
    ]
    for entry, donor in zip(record["differences"], record["models"][1:], strict=True):
        assert entry["bits_per_byte"] == pytest.approx(
            record["models"][0]["bits_per_byte"] - donor["bits_per_byte"]
        )
        assert entry["interval"][0] < entry["bits_per_byte"] < entry["interval"][1]
        # Paired: the interval is narrower than that of either figure by itself.
        low, high = donor["intervals"]["bits_per_byte"]
        assert entry["interval"][1] - entry["interval"][0] < (high - low) / 2


def test_everything_at_once(splice, run, tmp_path):
    path, texts, donors = splice
    words, output = tmp_path / "words", tmp_path / "splice.evaluation.json"
    words.write_text("the\nself\n")
    options = [
        *("--text", texts[0], "--text", texts[1], "--samples", 1, "--words", words),
        *("--prompt", "This module provides"),
        *("--seams", "--retention", "--compare", 5, "--seed", 3),
    ]
    code, out, err = run("evaluate", path, *options, "--json", "-o", output)
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert (
        json.loads(output.read_text()) == record and record["kind"] == "frankenmerge.evaluation/1"
    )
    names = [str(path), *donors]
    assert [(model["name"], model["role"]) for model in record["models"]] == [
        (names[0], "recipe"),
        (names[1], "donor"),
        (names[2], "donor"),
    ]
    check_models(record, texts)
    check_differences(record, names)
    (seams,) = record["seams"]
    assert seams["model"] == names[0] and [block["block"] for block in seams["blocks"]] == list(
        range(1, 9)
    )
    assert [block["block"] for block in seams["blocks"] if block["seam"]] == [6]
    assert [entry["donor"] for entry in record["retention"]] == list(donors)
    assert (
        record["retention"][0]["kept"]
        == 1
        > record["retention"][1]["kept"]
        > record["retention"][1]["chance"]
    )
    assert record["comparison"]["passed"] is True and record["tasks"] == []
    made_by = record["provenance"]
    assert (
        made_by["seed"] == 3
        and made_by["arguments"]["models"] == [names[0]]
        and made_by["arguments"]["threshold"] == 5
    )
    assert set(made_by["models"]) == set(donors) and set(made_by["recipes"]) == {names[0]}
    assert set(made_by["versions"]) == {"frankenmerge", "torch", "transformers", "python"}

    assert run("evaluate", path, *options, "--json")[1] == out.replace(
        json.dumps(str(output)), "null"
    )


@pytest.mark.slow
def test_tables_fit_eighty_columns(splice, run, tmp_path):
    path, texts, _ = splice
    third = tmp_path / "a-rather-long-name-of-a-text.txt"
    third.write_text(texts[0].read_text()[:600])
    options = [
        "--text",
        texts[0],
        "--text",
        texts[1],
        "--text",
        third,
        "--samples",
        1,
        "--seams",
        "--retention",
        "--compare",
        5,
    ]
    code, out, err = run("evaluate", path, *options)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    for title in (
        "On text",
        "Further figures",
        "Compared with each donor",
        "after each block",
        "preserved features",
        "After '",
        "not worse",
    ):
        assert title in out


def test_a_model_alone_is_measured_and_nothing_else(run, donors, text):
    code, out, _ = run("evaluate", donors["a"], "--text", text, "--json")
    record = json.loads(out)
    (model,) = record["models"]
    assert (
        code == 0
        and model["invalid_words"] is None
        and model["repetition"] is None
        and model["samples"] == []
    )
    assert [
        record[key] for key in ("differences", "seams", "retention", "tasks", "comparison")
    ] == [
        [],
        [],
        [],
        [],
        None,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--words", "list.txt"], "--samples or --prompt"),
        (["--prompt", "the fox", "--words", "list.txt"], "list.txt"),
        (["--seams"], "frankenmerge.json"),
        (["--retention"], "frankenmerge.json"),
        (["--compare", "0.1"], "frankenmerge.json"),
        (["--against", "nowhere"], "nowhere"),
    ],
)
def test_options_that_do_not_fit_are_refused(run, donors, text, options, message):
    code, out, err = run("evaluate", donors["a"], "--text", text, *options)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


@pytest.mark.parametrize("bits", ["nan", "inf", "-inf"])
def test_a_threshold_is_a_number(splice, run, bits):
    path, texts, _ = splice
    code, out, err = run("evaluate", path, "--text", texts[0], f"--compare={bits}")
    assert (code, out) == (2, "") and "--compare" in err and "a number" in err


@pytest.mark.parametrize("place", ["below a file", "a folder"])
@pytest.mark.parametrize("command", ["evaluate", "analyze", "align", "report"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(
    splice, run, tmp_path, monkeypatch, command, place
):
    path, (text, _), donors = splice

    def opened(*_args, **_options):
        raise AssertionError("work began")

    for stage in (
        "reporting.run.read_run",
        "workflows.aligning.open_donor",
        "workflows.atlases.open_donor",
        "workflows.evaluating.open_donor",
        "workflows.subjects.open_donor",
        "splicing.opening.open_donor",
    ):  # the modules are imported first, so that none imports what replaces it
        monkeypatch.setattr(f"frankenmerge.{stage}", opened)
    words = {
        "evaluate": [path, "--text", text],
        "analyze": donors[:1],
        "align": donors,
        "report": [tmp_path],
    }[command]
    output = tmp_path if place == "a folder" else text / "sub" / "x"
    code, out, err = run(command, *words, "-o", output)
    assert (code, out) == (2, "") and str(output) in err and "a file that can be written" in err


def test_a_file_s_folder_need_not_be_there_yet(donors, text, run, tmp_path):
    code, _, _ = run(
        "evaluate",
        donors["a"],
        "--text",
        text,
        "-o",
        tmp_path / "new" / "folder" / "a.evaluation.json",
    )
    assert (
        code == 0
        and json.loads((tmp_path / "new" / "folder" / "a.evaluation.json").read_text())["models"]
    )
