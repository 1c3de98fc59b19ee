"""`frankenmerge report`: what it finds, what it says is missing, and what it refuses."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import invented
import pytest

from frankenmerge.artefacts.atlas import Atlas, TopTokens, save_atlas
from frankenmerge.reporting.page import number
from frankenmerge.reporting.run import read_run
from frankenmerge.reporting.sections import chosen_plan, splices

VOID = {"meta", "link", "input", "br", "img"}


class Reader(HTMLParser):
    """Checks that tags close, and collects the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def report(run, tmp_path):
    """Run the command and read its page."""

    def call(folder) -> Reader:
        code, out, err = run("report", folder, "-o", tmp_path / "report.html")
        assert code == 0, err
        return Reader((tmp_path / "report.html").read_text(encoding="utf-8"))

    return call


def test_everything_in_a_folder_is_shown(report, folder):
    page = report(folder)
    headings = [attributes["id"] for tag, attributes in page.tags if tag == "h2"]
    assert headings == [
        "merged",
        "gain",
        "sweep",
        "seams",
        "agreement",
        "features",
        "prediction",
        "evaluation",
        "provenance",
    ]
    for text in (
        "one[0:4] two[2:5] one[4:6]",
        "0.200",
        "0.100 to 0.400",
        "one block 3 to two block 2, 2 repeated",
        "No better than chance",
        "Seams at chance level 1",
        "1.772 to 1.832",
        "no clear difference",
        "invented_task",
        "in the predicted interval",
        "2.13.0+cpu",
        "f" * 64,
        "max seams 4",
        "0.041 to 0.063",
        "0.021 to 0.047",
        "0.40 one + 0.60 two is better than one by 0.050 nats per token, 62% of what the "
        "donors' ensemble wins.",
        "A gain is confirmed: the best of 42 windows and scales, on 4,000 tokens",
    ):
        assert text in page.text, text
    marked = re.findall(r"<mark>(.*?)</mark>", (folder.parent / "report.html").read_text())
    assert {"raed", "impotred"} <= set(marked)
    assert (
        "frankenmerge merge RUN/recipe.yaml RUN/merged" in page.text
        and "frankenmerge align" not in page.text
    )


def test_plans_with_the_same_constraints_name_them_once(report, folder):
    for name in ("recipe", "another"):
        invented.write(folder / f"{name}.evidence.json", invented.evidence())
    assert report(folder).text.count("max seams 4") == 1


def test_a_search_on_a_task_shows_its_items_and_what_was_not_possible(report, folder):
    tested = invented.evaluation(donors=("x/one", "y/two"))["task_differences"][1]
    found = invented.gain() | {
        "tasks": [tested | {"model": "0.40 one + 0.60 two", "donor": "y/two"}],
        "refused": {"ties: expected 64, found 48": 8},
    }
    (folder / "best.gain.json").write_text(json.dumps(found))
    section = report(folder).text.split("What was won against the donors")[1]
    section = section.split("Windows run twice")[0]
    for text in ("items of", "exact McNemar", "0.40 one + 0.60 two vs. two", "no clear"):
        assert text in section, text
    assert "Not possible with these donors: 8 of ties: expected 64, found 48" in section


@pytest.mark.parametrize(
    ("removed", "heading", "command"),
    [
        (["ab.alignment.safetensors"], "agreement", "frankenmerge align A B"),
        (["recipe.evidence.json"], "seams", "frankenmerge plan ALIGNMENT"),
        (["evaluation.json"], "evaluation", "frankenmerge evaluate"),
        (["evaluation.json"], "prediction", "frankenmerge evaluate"),
        (["ab.alignment.safetensors"], "features", "frankenmerge analyze A"),
        (["recipe.yaml", "recipe.evidence.json"], "merged", "frankenmerge plan ALIGNMENT"),
    ],
)
def test_missing_parts_are_omitted_and_their_commands_shown(
    report, folder, removed, heading, command
):
    for name in removed:
        (folder / name).unlink()
    page = report(folder)
    assert heading not in [
        attributes.get("id") for _, attributes in page.tags
    ] and f"#{heading}" not in str(page.tags)
    assert command in page.text.split("Not in this folder")[1]


def test_files_are_identified_by_their_content(report, folder):
    for old, new in (
        ("ab.alignment.safetensors", "x.safetensors"),
        ("evaluation.json", "y.json"),
        ("recipe.yaml", "z.yml"),
    ):
        (folder / old).rename(folder / new)
    (folder / "other.json").write_text("[1, 2]")
    (folder / "notes.yaml").write_text("a: b")
    headings = [attributes["id"] for tag, attributes in report(folder).tags if tag == "h2"]
    assert {"merged", "agreement", "evaluation"} <= set(headings)


def test_a_checkpoint_shows_its_recipe_and_origin(report, donors, run, tmp_path):
    from frankenmerge.artefacts.recipe import Block, recipe_of

    (tmp_path / "run").mkdir()
    names = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 3)]
    (tmp_path / "run" / "recipe.yaml").write_text(
        recipe_of([Block(str(donors[name]), index) for name, index in names]).dump()
    )
    assert run("merge", tmp_path / "run" / "recipe.yaml", tmp_path / "run" / "merged")[0] == 0
    page = report(tmp_path / "run")
    provenance = json.loads((tmp_path / "run" / "merged" / "frankenmerge.json").read_text())
    assert provenance["recipe_sha256"] in page.text and all(
        donor["fingerprint"] in page.text for donor in provenance["donors"].values()
    )
    assert f"{len(provenance['tensors'])}; {len(provenance['tensors'])} by copy" in page.text
    assert "merged/recipe.yaml, recipe.yaml" in page.text  # the same recipe, shown once


@pytest.mark.parametrize(
    ("keys", "merged", "chosen"),
    [
        (("k1", "k2"), "k2", 2.0),
        (("k1", None), "k2", 2.0),
        (("k1", "k2"), "k3", None),
        (("k1", "k2"), None, 1.0),
        ((None, None), "k2", 1.0),
    ],
)
def test_the_plan_of_a_merge_is_found_by_its_key(folder, keys, merged, chosen):
    (plan,) = invented.evidence()["plans"]
    plans = [
        plan | {"predicted_damage": n + 1.0} | ({"key": key} if key else {})
        for n, key in enumerate(keys)
    ]
    invented.write(folder / "recipe.evidence.json", invented.evidence() | {"plans": plans})
    (folder / "merged").mkdir()
    (folder / "merged" / "recipe.yaml").write_text(invented.RECIPE)
    origin = invented.provenance() | ({"key": merged} if merged else {})
    invented.write(folder / "merged" / "frankenmerge.json", origin)
    run = read_run(folder)
    shown = chosen_plan(run, splices(run))
    assert (shown and shown.predicted_damage) == chosen


def test_a_donor_s_features_come_from_its_atlas(report, tmp_path):
    import numpy as np

    (tmp_path / "run").mkdir()
    tokens = np.arange(3 * 4 * 10, dtype=np.int32).reshape(3, 4, 10)
    top = {"plain": TopTokens(tokens, np.zeros(tokens.shape, np.float32))}
    atlas = Atlas(
        "org/donor",
        "a" * 32,
        top,
        np.zeros((3, 5, 4), np.float16),
        np.ones((3, 4), np.float32),
        [f"t{n}" for n in range(120)],
    )
    save_atlas(atlas, tmp_path / "run" / "x.atlas.safetensors")
    save_atlas(
        replace(atlas, provenance={"untrained": 7}), tmp_path / "run" / "y.atlas.safetensors"
    )
    page = report(tmp_path / "run")
    assert "neuron donor donor (untrained)" in page.text  # the control of the same donor
    assert (
        "After block 2" in page.text
        and "t80 t81 t82 t83 t84" in page.text
        and "t85" not in page.text
    )


HOSTILE = (
    "</script><script>window.pwned=1</script>",
    "\"'><img src=x onerror=window.pwned=1>",
    "\u202e\x00\x1b[2J",
    "{{7*7}}",
    "\ud800",
    "<!--",
)


def test_the_content_of_artefacts_does_nothing(report, tmp_path):
    from invented import write_run

    folder = write_run(tmp_path / "run", HOSTILE)
    evaluation = invented.evaluation(donors=(HOSTILE[1], HOSTILE[0]))
    evaluation["models"][0]["samples"] = [
        {"prompt": HOSTILE[0], "text": HOSTILE[1] + HOSTILE[2], "invalid": ["img", ".*"]}
    ]
    invented.write(folder / "evaluation.json", evaluation)
    (folder / "recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text() + "# </pre><script>window.pwned=1</script>\n"
    )
    text = (folder.parent / "report.html", report(folder))[0].read_text(encoding="utf-8")
    page = Reader(text)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2 and not [
        tag for tag, _ in page.tags if tag == "img"
    ]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "\u202e" not in text and "\x1b" not in text and "\x00" not in text and "{{7*7}}" in text


def test_nothing_is_requested_from_the_network_and_only_the_page_s_own_script_may_run(
    report, folder
):
    page = report(folder)
    links = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("href", "src")
    ]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    policy = next(
        attributes["content"]
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    assert not [1 for _, attributes in page.tags if "style" in attributes]


def test_the_same_run_gives_the_same_bytes(run, folder, tmp_path):
    for name in ("one.html", "two.html"):
        assert run("report", folder, "-o", tmp_path / name)[0] == 0
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_a_page_of_deep_donors_stays_small(report, tmp_path):
    from invented import write_run

    report(write_run(tmp_path / "run", blocks=(80, 80)))
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


BROKEN = (
    "{",
    '{"kind": "frankenmerge.evaluation/1"}',
    '{"kind": "frankenmerge.evaluation/9", "models": []}',
    '{"kind": "frankenmerge.evaluation/1", "models": [], "seams": [{"model": "x", "blocks": []}]}',
)


@pytest.mark.parametrize("content", BROKEN)
def test_an_unreadable_artefact_is_reported_and_the_others_are_shown(run, folder, content):
    (folder / "evaluation.json").write_text(content)
    code, _, err = run("report", folder, "-o", folder / "report.html")
    page = Reader((folder / "report.html").read_text())
    assert code == 0 and "evaluation.json" in err and "Traceback" not in err
    assert "evaluation.json" in page.text.split("Could not be read")[1] and "The merge" in page.text


def test_an_alignment_whose_parts_do_not_fit_is_reported(run, folder):
    from frankenmerge.artefacts.alignment import load_alignment, save_alignment

    whole = load_alignment(folder / "ab.alignment.safetensors")
    save_alignment(
        replace(whole, tokens=(whole.tokens[0][:, :2], whole.tokens[1])),
        folder / "ab.alignment.safetensors",
    )
    code, _, err = run("report", folder, "-o", folder / "report.html")
    assert code == 0 and "ab.alignment.safetensors" in err and "shapes" in err


def test_every_stage_of_a_recipe_is_shown(report, folder):
    (folder / "stages.yaml").write_text(
        "name: first\nmerge_method: linear\nmodels: [{model: p/q}, {model: r/s}]\n"
        "parameters: {weight: 1}\n---\n"
        + "merge_method: passthrough\nslices: [{sources: [{model: first, layer_range: [0, 3]}]}]\n"
    )
    page = report(folder)
    assert "stages.yaml, stage first" in page.text and "stages.yaml, the result" in page.text


@pytest.mark.parametrize("what", ["nothing", "file", "empty", "foreign", "broken"])
def test_a_folder_without_artefacts_is_a_mistake_reported_without_a_traceback(run, tmp_path, what):
    place = tmp_path / "run"
    if what == "file":
        place.write_text("")
    elif what != "nothing":
        place.mkdir()
        if what == "foreign":
            (place / "a.json").write_text("{}")
        if what == "broken":
            (place / "a.alignment.safetensors").write_text("no")
    code, out, err = run("report", place, "-o", tmp_path / "report.html")
    assert (
        code == 2 and out == "" and str(place) in err and "remedy" in err and "Traceback" not in err
    )
    assert not (tmp_path / "report.html").exists() and ("a.alignment" in err) == (what == "broken")


def test_it_says_where_the_page_is_to_go(run, folder):
    code, _, err = run("report", folder)
    assert code == 2 and "-o report.html" in err


def test_json_lists_what_was_written(run, folder, tmp_path):
    code, out, _ = run("report", folder, "-o", tmp_path / "r.html", "--json")
    assert code == 0 and json.loads(out) == {
        "run": str(folder),
        "written": [str(tmp_path / "r.html")],
        "refused": {},
    }


def test_a_number_that_is_none_or_endless_is_told():
    assert [
        number(value) for value in (None, math.nan, math.inf, -math.inf, 1234.5678, -0.0001)
    ] == [
        "–",
        "–",
        "∞",
        "-∞",
        "1,234.568",
        "0.000",
    ]
