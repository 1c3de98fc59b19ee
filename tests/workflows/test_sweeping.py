"""`plan --sweep`: a planted window is found, an interrupted sweep ends as an undisturbed one."""

import json
from itertools import combinations

import pytest
import torch
from conftest import in_memory, meter, write_donor, written
from relatives import text_from

from frankenmerge.artefacts import sweep as artefact
from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.artefacts.recipe_file import load_recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.evaluation.documents import Text
from frankenmerge.models.loading import load_model
from frankenmerge.planning.candidates import REPEATED
from frankenmerge.workflows.sweeping import SweepOptions, sweep

CELLS = [(*each, scale) for each in combinations(range(4), 2) for scale in REPEATED]
"""Every window of three blocks with every scale."""


def stacked(donor, *indices):
    return recipe_of([Block(str(donor), index) for index in indices])


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A donor that lacks the second pass of its middle block, with texts of the one that had it."""
    root = tmp_path_factory.mktemp("planted")
    source = write_donor(root / "source", seed=1)
    written(stacked(source, 0, 1, 1, 3), root / "whole")
    written(stacked(source, 0, 1, 3), root / "donor")
    texts = [Text(f"text {seed}", text_from(root / "whole", 60, seed)) for seed in (0, 1)]
    return {"whole": root / "whole", "donor": root / "donor", "texts": texts}


@pytest.fixture
def written_text(planted, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(planted["texts"][0].content)
    return path


def test_the_window_that_was_removed_is_found(planted, written_text, run, tmp_path):
    output = tmp_path / "recipe.yaml"
    code, out, err = run(
        "plan", planted["donor"], "--sweep", "--on", written_text, "-o", output, "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert load_recipe(output) == stacked(planted["donor"], 0, 1, 1, 2)
    ids = torch.randint(48, (2, 30))
    whole = load_model(open_checkpoint(str(planted["whole"])))
    assert torch.equal(
        in_memory(load_recipe(output))(input_ids=ids).logits, whole(input_ids=ids).logits
    )
    best = found["confirmed"][0]
    assert (best["start"], best["stop"], best["scale"]) == (1, 2, 1.0)
    assert 0 < best["interval"][0] < best["gain"] < best["interval"][1]
    # Every window once; its gain as transformers finds it on the selected half: rows 0, 2, 4 ...
    assert [(each["start"], each["stop"], each["scale"]) for each in found["windows"]] == CELLS
    content = planted["texts"][0].content
    letters = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    ids = torch.tensor([letters.index(letter) + 1 for letter in content]).view(-1, 63)[::2]
    rows = torch.cat([torch.zeros(len(ids), 1, dtype=torch.long), ids], 1)

    def row_losses(indices):
        made = in_memory(stacked(planted["donor"], *indices))
        with torch.no_grad():
            logits = made(input_ids=rows).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
        ).view(len(rows), -1)

    own = row_losses(range(3))
    assert found["nats"] == pytest.approx(float(own.mean()), rel=1e-5)
    for each in found["windows"]:
        if each["scale"] == 1:
            indices = [*range(each["stop"]), *range(each["start"], 3)]
            won = (own - row_losses(indices)).mean(1)
            assert each["gain"] == pytest.approx(float(won.mean()), abs=1e-5)
            assert each["error"] == pytest.approx(float(won.std() / len(won) ** 0.5), rel=1e-3)
    assert artefact.load(tmp_path / "recipe.sweep.json").as_json() == {
        key: value for key, value in found.items() if key != "seconds"
    }
    assert sorted(path.name for path in tmp_path.glob("recipe*")) == [
        "recipe.sweep.json",
        "recipe.yaml",
    ]


def test_what_is_printed(planted, written_text, run, tmp_path):
    code, out, err = run(
        "plan", planted["donor"], "--sweep", "--on", written_text, "-o", tmp_path / "recipe.yaml"
    )
    assert code == 0, err
    assert "A gain is confirmed" in out and "[1, 2)" in out


def test_only_the_scales_that_were_asked_for(planted, written_text, run, tmp_path):
    def swept_with(*scales):
        options = [word for scale in scales for word in ("--scale", scale)]
        command = ("plan", planted["donor"], "--sweep", "--on", written_text, *options)
        code, out, err = run(*command, "-o", tmp_path / "recipe.yaml", "--json")
        assert code == 0, err
        return json.loads(out)

    every, one = swept_with(), swept_with("1")
    assert one["scales"] == [1.0]
    assert one["windows"] == [each for each in every["windows"] if each["scale"] == 1]
    assert swept_with("0.3", "1", "0.3")["scales"] == [0.3, 1.0]


class Interrupted(Exception):
    """What ends a sweep in the middle."""


def swept(planted, folder, text: int, *, stop_after: int | None = None) -> list[int]:
    """Sweep into a folder; returns how many windows were done at each step."""
    folder.mkdir(exist_ok=True)
    steps: list[int] = []

    def advance(count):
        steps.append(count)
        if sum(steps) == stop_after:
            raise Interrupted

    donor = open_checkpoint(str(planted["donor"]))
    options = SweepOptions([planted["texts"][text]], seed=2)
    sweep(donor, options, folder / "recipe.yaml", progress=meter(advance))
    return steps


@pytest.fixture(scope="module")
def undisturbed(planted, tmp_path_factory) -> list[bytes]:
    """What sweeps of both texts write."""
    folders = [tmp_path_factory.mktemp(f"undisturbed{text}") for text in (0, 1)]
    for text, folder in enumerate(folders):
        swept(planted, folder, text)
    return [(folder / "recipe.sweep.json").read_bytes() for folder in folders]


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_a_sweep_that_was_interrupted_goes_on_where_it_was(planted, undisturbed, tmp_path, cut):
    """Its last line may have been cut off at any place."""
    with pytest.raises(Interrupted):
        swept(planted, tmp_path, 0, stop_after=7)
    journal = tmp_path / "recipe.sweep.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 7
    whole = journal.read_bytes()
    journal.write_bytes(whole[: len(whole) - cut])
    steps = swept(planted, tmp_path, 0)
    # Without its end of line alone a result is whole.
    assert steps[0] == (6 if cut > 1 else 7)
    assert steps[1 : 1 + len(CELLS) - steps[0]] == [1] * (len(CELLS) - steps[0])
    assert (tmp_path / "recipe.sweep.json").read_bytes() == undisturbed[0]
    assert not journal.exists()


def test_it_may_be_interrupted_again(planted, undisturbed, tmp_path):
    for stop in (3, 8, 17):
        with pytest.raises(Interrupted):
            swept(planted, tmp_path, 0, stop_after=stop)
    assert swept(planted, tmp_path, 0)[0] == 17
    assert (tmp_path / "recipe.sweep.json").read_bytes() == undisturbed[0]


def test_the_journal_of_another_text_is_not_used(planted, undisturbed, tmp_path):
    with pytest.raises(Interrupted):
        swept(planted, tmp_path, 0, stop_after=7)
    assert swept(planted, tmp_path, 1)[0] == 0
    assert (tmp_path / "recipe.sweep.json").read_bytes() == undisturbed[1] != undisturbed[0]


@pytest.mark.parametrize("junk", [b"", b"\xff\xfe\x00 no journal", b"[1]\n2\n"])
def test_what_is_no_journal_is_written_anew(planted, undisturbed, tmp_path, junk):
    (tmp_path / "recipe.sweep.journal").write_bytes(junk)
    assert swept(planted, tmp_path, 0)[0] == 0
    assert (tmp_path / "recipe.sweep.json").read_bytes() == undisturbed[0]


@pytest.mark.parametrize("junk", ["5\n", "[1, 2]\n", "{}\n", "\n", "[0, 1"])
def test_lines_that_are_no_results_are_left_out(planted, undisturbed, tmp_path, junk):
    with pytest.raises(Interrupted):
        swept(planted, tmp_path, 0, stop_after=7)
    with (tmp_path / "recipe.sweep.journal").open("a") as file:
        file.write(junk)
    assert swept(planted, tmp_path, 0)[0] == 7
    assert (tmp_path / "recipe.sweep.json").read_bytes() == undisturbed[0]


@pytest.mark.parametrize("case", ["two donors", "its own tokens", "nothing to measure on"])
def test_what_cannot_be_swept_is_refused(planted, written_text, run, tmp_path, case):
    donors = [planted["donor"]] * (2 if case == "two donors" else 1)
    on = {
        "two donors": ["--on", written_text],
        "its own tokens": ["--on", "sampled"],
        "nothing to measure on": [],
    }
    code, out, err = run("plan", *donors, "--sweep", *on[case], "-o", tmp_path / "recipe.yaml")
    assert (code, out) == (2, "") and "Traceback" not in err
    assert all(word in err for word in ("expected:", "found:", "remedy:"))
    assert not list(tmp_path.glob("recipe*"))
