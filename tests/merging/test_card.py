"""The model card: what the hub reads of it, and what people see."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from conftest import resolved
from huggingface_hub import ModelCard

from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.merging.card import card_diagram, model_card


@pytest.fixture
def splice(donors, tmp_path):
    """A splice of donors as if they had come from the hub, each with a card of its own if given."""
    import shutil

    def made(*cards: str | None, names=("org/one", "org/two@v1+org/lora")):
        opened = {}
        for name, folder, card in zip(names, ("a", "b"), [*cards, None, None], strict=False):
            copy = shutil.copytree(donors[folder], tmp_path / folder, dirs_exist_ok=True)
            if card is not None:
                (copy / "README.md").write_text(card)
            opened[name] = replace(open_checkpoint(str(copy)), name=name)
        recipe = recipe_of(
            [Block(names[0], 0), Block(names[0], 1), Block(names[1], 1), Block(names[1], 2)]
        )
        return resolved(recipe, opened)

    return made


def card(splice) -> ModelCard:
    return ModelCard(model_card(splice), ignore_metadata_errors=False)


def test_the_hub_reads_donors_library_and_tags(splice):
    data = card(splice()).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": ["org/one", "org/two", "org/lora"],
        "base_model_relation": "merge",
        "tags": ["merge", "frankenmerge"],
    }


def test_folders_are_not_named_as_models_of_the_hub(splice, tmp_path):
    made = card(splice(names=(str(tmp_path / "a"), str(tmp_path / "b"))))
    assert "base_model" not in made.data.to_dict() and str(tmp_path / "a") in made.text


LICENSED = "---\nlicense: apache-2.0\n---\n# one\n"


@pytest.mark.parametrize(
    ("one", "two", "licence"),
    [
        (LICENSED, LICENSED, "apache-2.0"),
        (LICENSED, "---\nlicense: mit\n---\n", None),
        (LICENSED, None, None),
        (None, None, None),
        ("---\nlicense: other\n---\n",) * 2 + (None,),
        ("---\n: [\n---\n",) * 2 + (None,),
        ("---\nlicense: [a, b]\n---\n",) * 2 + (None,),
    ],
)
def test_a_licence_is_named_only_where_all_donors_have_it(splice, one, two, licence):
    assert card(splice(one, two)).data.to_dict().get("license") == licence


def test_the_card_says_how_to_load_the_model_and_where_it_comes_from(splice):
    stacked = splice()
    text = card(stacked).text
    loading = text.split("```python\n")[1].split("```")[0]
    compile(loading, "card", "exec")
    assert "AutoModelForCausalLM" in loading and "](splice.svg)" in text
    assert all(donor.fingerprint in text for donor in stacked.donors.values())


def test_the_diagram_shows_every_donor(splice):
    root = ElementTree.fromstring(card_diagram(splice()))
    assert "block" in str(root.findtext("{http://www.w3.org/2000/svg}desc"))
    assert {"4 blocks", "result", "A 0–1", "B 1–2"} <= {
        text.text for text in root.iter("{http://www.w3.org/2000/svg}text")
    }


def test_what_was_measured_of_a_recipe_is_in_its_card(donors, run, text, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(recipe_of([Block(str(donors["a"]), 0), Block(str(donors["b"]), 3)]).dump())
    code, out, err = run("evaluate", recipe, "--text", text, "-o", tmp_path / "e.json", "--json")
    assert code == 0, err
    other = tmp_path / "other.yaml"
    other.write_text(recipe_of([Block(str(donors["a"]), 0)] * 2).dump())
    (tmp_path / "broken.json").write_text("{")
    for path, shown in ((recipe, True), (other, False)):
        assert run("merge", path, tmp_path / path.stem)[0] == 0
        made = (tmp_path / path.stem / "README.md").read_text()
        assert ("## Measured" in made) is shown
        for model in json.loads(out)["models"]:
            low, high = model["intervals"]["bits_per_byte"]
            row = f"| {model['bits_per_byte']:.4f} | {low:.4f} to {high:.4f} |"
            assert (row in made) is shown
        assert ("**this model**" in made and text.name in made) is shown
