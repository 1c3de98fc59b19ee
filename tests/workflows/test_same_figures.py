"""`evaluate` of a recipe and of its merge give the same figures, whatever the method."""

import json

import pytest
import torch
import yaml
from conftest import write_donor
from transformers import AutoModelForCausalLM

import frankenmerge as fm
from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.splicing.methods import METHODS
from frankenmerge.workflows.evaluating import EvaluateOptions

TEXT = {"text": "the quick brown fox jumps over the lazy dog and The Cat sat on a mat " * 4}
REQUIRED = {"weight": 0.5, "t": 0.25, "scale": 0.75}


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[str]:
    """A base and two fine-tunes of it."""
    root = tmp_path_factory.mktemp("three")
    base = write_donor(root / "base", seed=1)
    folders = [str(base)]
    for seed, name in enumerate("xy"):
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(root / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (root / name / file).write_bytes((base / file).read_bytes())
        folders.append(str(root / name))
    return folders


def recipe_of(method: str, three: list[str], **more) -> dict:
    base, *models = three
    spec = METHODS[method]
    names = models[: spec.models[1] or 2]
    parameters = {name: value for name, value in REQUIRED.items() if name in spec.parameters}
    if method == "passthrough":
        stack = [{"sources": [{"model": models[0], "layer_range": [0, 3]}]}]
        stack += [{"sources": [{"model": models[1], "layer_range": [2, 4]}]}]
        return {"merge_method": method, "slices": stack, "parameters": parameters, **more}
    recipe = {"merge_method": method, "models": [{"model": name} for name in names]}
    if spec.base != "none":
        recipe["base_model"] = base
    return recipe | {"parameters": parameters, "seed": 5, **more}


@pytest.mark.parametrize("method", METHODS)
def test_through_the_api(three, tmp_path, method):
    recipe = parse_recipe(yaml.safe_dump(recipe_of(method, three, dtype="bfloat16")), "recipe")
    merged = tmp_path / "merged"
    fm.merge(recipe, merged)
    found = fm.evaluate(recipe, merged, texts=TEXT)
    ours, theirs = found.results[:2]
    assert (ours.role, theirs.role) == ("recipe", "model")
    assert ours.total.nats.tolist() == theirs.total.nats.tolist()
    assert ours.key == json.loads((merged / "frankenmerge.json").read_text())["key"]
    assert ours.lineage.blocks == theirs.lineage.blocks


def test_through_the_command_line(three, tmp_path, run, text):
    path, merged = tmp_path / "recipe.yaml", tmp_path / "merged"
    path.write_text(yaml.safe_dump(recipe_of("ties", three)))
    assert run("merge", path, merged)[0] == 0
    code, out, err = run("evaluate", path, merged, "--text", text, "--json")
    assert code == 0, err
    ours, theirs = json.loads(out)["models"][:2]
    different = {key for key in ours if ours[key] != theirs.get(key)}
    assert different == {"name", "role", "key"} and "key" not in theirs
    assert ours["key"] == json.loads((merged / "frankenmerge.json").read_text())["key"]


STAGES = """
name: first
merge_method: linear
models: [{{model: {x}}}, {{model: {y}}}]
parameters: {{weight: 0.5}}
---
merge_method: passthrough
slices:
- sources: [{{model: first, layer_range: [0, 3]}}]
- sources: [{{model: {y}, layer_range: [1, 4]}}]
- sources: [{{model: first, layer_range: [2, 4], parameters: {{scale: 0.5}}}}]
"""


def test_stages(three, tmp_path, run, text):
    _, x, y = three
    path, merged = tmp_path / "stages.yaml", tmp_path / "merged"
    path.write_text(STAGES.format(x=x, y=y))
    before = sorted(tmp_path.iterdir())
    code, out, err = run("evaluate", path, "--text", text, "--json")
    assert code == 0, err
    assert sorted(each for each in tmp_path.iterdir() if each.name != "cache") == before
    found = json.loads(out)["models"]
    assert [model["role"] for model in found] == ["recipe", "donor", "donor"]
    assert run("merge", path, merged)[0] == 0
    code, out, err = run("evaluate", merged, "--text", text, "--json")
    assert code == 0, err
    again = json.loads(out)["models"][0]
    for key in ("bits_per_byte", "nats_per_token", "accuracy", "tokens", "intervals"):
        assert found[0][key] == again[key]
    assert found[0]["key"] == json.loads((merged / "frankenmerge.json").read_text())["key"]


def test_two_recipes_of_one_summary_are_two(three, tmp_path, run, text):
    _, x, y = three
    texts = {"text": text.read_text()}
    recipes = []
    for weight in (0.25, 0.75):
        models = [{"model": x, "parameters": {"weight": weight}}, {"model": y}]
        data = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}
        recipes.append(parse_recipe(yaml.safe_dump(data), "recipe"))
    assert str(recipes[0]) == str(recipes[1])
    alone = [fm.evaluate(recipe, texts=texts).results[0] for recipe in recipes]
    both = fm.evaluate(*recipes, texts=texts).results[:2]
    assert [each.total.nats.tolist() for each in both] == [
        each.total.nats.tolist() for each in alone
    ]
    assert both[0].total.bits_per_byte != both[1].total.bits_per_byte
    assert both[0].name != both[1].name and both[0].key != both[1].key
    paths = []
    for number, recipe in enumerate(recipes):
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_text(recipe.dump())
    code, out, err = run("evaluate", *paths, "--text", text, "--json")
    assert code == 0, err
    models = json.loads(out)["models"][:2]
    assert [model["key"] for model in models] == [each.key for each in both]
    assert [model["bits_per_byte"] for model in models] == [
        each.total.bits_per_byte for each in both
    ]


def test_one_recipe_given_twice_is_measured_once(three):
    recipe = parse_recipe(yaml.safe_dump(recipe_of("linear", three)), "recipe")
    found = fm.evaluate(recipe, recipe, texts=TEXT, options=EvaluateOptions())
    assert [result.role for result in found.results] == ["recipe", "donor", "donor"]


def test_seams_of_a_recipe_of_stages_lead_to_its_donors(three, tmp_path, run, text):
    _, x, y = three
    path = tmp_path / "stages.yaml"
    path.write_text(STAGES.format(x=x, y=y))
    code, out, err = run("evaluate", path, "--text", text, "--seams", "--json")
    assert code == 0, err
    (entry,) = json.loads(out)["seams"]
    origins = [(block["donor"], block["donor_block"]) for block in entry["blocks"]]
    assert origins == [
        *((x, index) for index in range(3)),
        *((y, index) for index in range(1, 4)),
        *((x, index) for index in range(2, 4)),
    ]
