"""All commands on two small models by other authors, from first look to evaluation."""

import json

import pytest
from safetensors import safe_open

TEXT = " ".join(
    """Once upon a time, there was a little girl named Lily. She liked to play in the park with her
friend Tom. One day, they saw a big dog. The dog was sad because it lost its ball. "Do not worry,"
said Lily. "We can help you find it." They looked under the tree and behind the house. At last, Tom
found the ball in the grass. The dog was very happy and ran around them. They all played until the
sun went down.
""".split()
)


@pytest.fixture
def printed(run):
    def call(*arguments: object) -> dict:
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


def tensors(folder) -> dict[str, tuple]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as handle:
            for name in handle.keys():  # noqa: SIM118
                array = handle.get_tensor(name)
                found[name] = handle.get_slice(name).get_dtype(), array.shape, array.tobytes()
    return found


def test_the_way_from_two_real_donors_to_their_evaluation(real, printed, tmp_path):
    first, other = real
    assert printed("inspect", first, other)["spliceable"] is True
    alignment = tmp_path / "ab.alignment.safetensors"
    scores = printed("align", first, other, "-o", alignment)["scores"]
    assert all(len(score["matrix"]) == 6 for score in scores.values())
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    (plan,) = printed("plan", alignment, "-o", recipe, "--depth", 7)["plans"]
    assert plan["depth"] == printed("check", recipe)["depth"] == 7

    merged = printed("merge", recipe, output, "--shard-size", "300KB")
    found, sources = tensors(output), {str(folder): tensors(folder) for folder in real}
    origins = json.loads((output / "frankenmerge.json").read_text())["tensors"]
    assert found.keys() == origins.keys() and len(found) == merged["tensors"]
    for name, origin in origins.items():
        assert found[name] == sources[origin["donor"]][origin["tensor"]]
    assert {origin["donor"] for origin in origins.values()} == set(sources)

    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert {kind: names for kind, names in info.items() if names} == {}
    assert model.config.num_hidden_layers == 7

    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    spliced, checkpoint, *donors = printed("evaluate", recipe, output, "--text", text)["models"]
    figures = ("bits_per_byte", "perplexity", "nats_per_token", "tokens")
    assert [spliced[key] for key in figures] == [checkpoint[key] for key in figures]
    assert {donor["name"] for donor in donors} == set(sources)
    assert all(donor["nats_per_token"] < 2.5 for donor in donors), "the donors can read this text"
    assert min(donor["bits_per_byte"] for donor in donors) < spliced["bits_per_byte"], (
        "trained apart, they make nothing better"
    )


def test_a_recipe_by_hand_is_merged_and_evaluated(real, printed, tmp_path):
    first, other = real
    recipe, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    recipe.write_text(f"""\
slices:
  - sources:
      - model: {other}
        layer_range: [0, 5]
merge_method: passthrough
tokenizer_source: {first}
""")
    text.write_text(TEXT)
    printed("merge", recipe, tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(other)
    copy, original, *_ = printed("evaluate", tmp_path / "out", other, "--text", text)["models"]
    assert copy["nats_per_token"] == original["nats_per_token"]


def test_real_donors_are_shown_in_tables(real, run):
    code, out, err = run("inspect", *real)
    assert (code, err) == (0, "")
    assert "These can be spliced." in out and "llama2xs-281K" in out
    assert "positions: 512 and 256" in out.replace("\n", " ")
