"""The result's tokenizer, read back by transformers: added tokens, and chat templates."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import resolved, write_donor
from transformers import AutoTokenizer

from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.errors import FrankenmergeError
from frankenmerge.splicing.tokenizer import TEMPLATES

TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "bye"},
]


def made(text: str, folder: Path):
    """The tokenizer of a recipe, loaded, and the vocabulary of its embedding and head."""
    recipe = parse_recipe(text, "r.yaml")
    splice = resolved(recipe)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text((splice.base.path / "config.json").read_text())
    for name, content in splice.tokenizer.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder), splice.vocabulary


def linear(*donors: Path, more: str = "") -> str:
    models = ", ".join(f"{{model: {donor}}}" for donor in donors)
    return f"merge_method: linear\nmodels: [{models}]\nparameters: {{weight: 1}}\n{more}\n"


@pytest.fixture
def chatty(tmp_path) -> Path:
    """A donor with two chat tokens and a letter of its own, under ids that others use otherwise."""
    donor = write_donor(tmp_path / "chatty", seed=5, vocab_size=51)
    data = json.loads((donor / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["é"] = 48
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    entry = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    data["added_tokens"] += [
        {"id": 49, "content": "<|im_start|>", **entry},
        {"id": 50, "content": "<|im_end|>", **entry},
    ]
    (donor / "tokenizer.json").write_text(json.dumps(data))
    return donor


def test_without_a_word_the_files_are_the_donor_s(donors, tmp_path):
    recipe = parse_recipe(linear(donors["a"], donors["b"]), "r.yaml")
    files = resolved(recipe).tokenizer
    assert (
        files
        == {path.name: path.read_bytes() for path in donors["a"].glob("*") if path.name in files}
        and "tokenizer.json" in files
    )


def test_a_union_reads_text_as_its_base_does_and_knows_every_token(donors, chatty, tmp_path):
    tokenizer, vocabulary = made(
        linear(donors["a"], chatty, more="tokenizer_source: union"), tmp_path / "out"
    )
    assert (
        vocabulary is not None
        and tokenizer.get_vocab() == vocabulary.tokens
        and vocabulary.rows == 51
    )
    base = AutoTokenizer.from_pretrained(donors["a"])
    assert tokenizer("abcab")["input_ids"] == base("abcab")["input_ids"]
    ids = tokenizer("a<|im_end|>é")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<|im_end|>", "é"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "aé"
    assert set(base.get_vocab().items()) < set(tokenizer.get_vocab().items())


def test_tokens_that_the_recipe_adds_are_known(donors, tmp_path):
    text = linear(
        donors["a"], more="tokenizer: {source: base, tokens: {'<new>': {source: {kind: zero}}}}"
    )
    tokenizer, vocabulary = made(text, tmp_path / "out")
    assert vocabulary is not None and vocabulary.tokens["<new>"] == 48
    assert tokenizer("a<new>b")["input_ids"] == [
        tokenizer.convert_tokens_to_ids("a"),
        48,
        tokenizer.convert_tokens_to_ids("b"),
    ]


def test_a_named_tokenizer_s_files_are_that_donor_s(donors, chatty, tmp_path):
    tokenizer, vocabulary = made(
        linear(donors["a"], chatty, more=f"tokenizer_source: {chatty}"), tmp_path / "out"
    )
    assert (
        vocabulary is not None
        and tokenizer.get_vocab()
        == AutoTokenizer.from_pretrained(chatty).get_vocab()
        == vocabulary.tokens
    )


def test_tokens_are_not_added_to_a_vocabulary_that_is_no_bpe(donors, chatty, tmp_path):
    other = Path(shutil.copytree(donors["a"], tmp_path / "unigram"))
    data = json.loads((other / "tokenizer.json").read_text())
    vocabulary = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    data["model"] = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [[token, 0.0] for token in vocabulary],
    }
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(FrankenmergeError) as caught:
        made(linear(other, chatty, more="tokenizer_source: union"), tmp_path / "out")
    assert "Unigram" in caught.value.faults[0].found


# Chat templates


EXPECTED = {
    "chatml": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"
    "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "<s>[INST] hello [/INST] hi<s>[INST] bye [/INST]",
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\n"
        "hello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
        "bye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "alpaca": (
        "<s>### Instruction:\nhello\n\n### Response:\nhi<s>\n\n### Instruction:\n"
        "bye\n\n### Response:\n"
    ),
    "exaone": "[|user|]hello\n[|assistant|]hi[|endofturn|]\n[|user|]bye\n[|assistant|]",
}
"""The same talk in each format; the tests' tokenizer begins and ends with <s>."""


def test_every_built_in_template_is_tested():
    assert set(TEMPLATES) == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_built_in_template_writes_its_format(donors, tmp_path, name):
    tokenizer, _ = made(linear(donors["a"], more=f"chat_template: {name}"), tmp_path / "out")
    assert (
        tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
        == EXPECTED[name]
    )


def test_a_template_written_out_is_taken_and_replaces_the_donor_s(donors, tmp_path):
    own = Path(shutil.copytree(donors["a"], tmp_path / "own"))
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": "{{ 'old' }}"})
    )
    tokenizer, _ = made(
        linear(own, more='chat_template: "{{ messages | length }}"'), tmp_path / "out"
    )
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == "3"
    assert "old" not in "".join(path.read_text() for path in (tmp_path / "out").iterdir())


def test_auto_is_what_most_donors_have_and_the_first_of_equals(donors, tmp_path):
    written = {"one": "{{ 'one' }}", "two": "{{ 'two' }}", "three": "{{ 'two' }}", "none": None}
    folders = {}
    for name, template in written.items():
        folders[name] = Path(shutil.copytree(donors["a"], tmp_path / name))
        if name == "two":
            (folders[name] / "chat_template.jinja").write_text(str(template))
        elif template:
            settings = json.loads((folders[name] / "tokenizer_config.json").read_text())
            form = (
                [{"name": "tool", "template": "x"}, {"name": "default", "template": template}]
                if name == "three"
                else template
            )
            (folders[name] / "tokenizer_config.json").write_text(
                json.dumps(settings | {"chat_template": form})
            )
    for names, expected in (
        (["one", "two", "three"], "two"),
        (["one", "two"], "one"),
        (["none", "two", "one"], "two"),
    ):
        tokenizer, _ = made(
            linear(*(folders[name] for name in names), more="chat_template: auto"), tmp_path / "out"
        )
        assert tokenizer.apply_chat_template(TALK, tokenize=False) == expected
    with pytest.raises(FrankenmergeError) as caught:
        made(linear(folders["none"], more="chat_template: auto"), tmp_path / "out")
    assert caught.value.faults[0].place == "recipe: chat_template"


def test_a_template_of_no_known_name_is_refused(donors, tmp_path):
    with pytest.raises(FrankenmergeError) as caught:
        made(linear(donors["a"], more="chat_template: chatlm"), tmp_path / "out")
    assert "chatml" in caught.value.faults[0].expected


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ messages", "{% for message in messages %}{{ message.content }}"]
)
def test_a_template_that_is_no_jinja_is_refused(donors, tmp_path, template):
    with pytest.raises(FrankenmergeError) as caught:
        made(linear(donors["a"], more=f"chat_template: {json.dumps(template)}"), tmp_path / "out")
    assert (
        caught.value.faults[0].place == "recipe: chat_template"
        and "line 1" in caught.value.faults[0].found
    )


def test_a_template_may_mark_what_the_model_generates(donors, tmp_path):
    template = (
        "{% for message in messages %}{%- generation -%}{{ message.content }}"
        "{% endgeneration %}{% break %}{% endfor %}"
    )
    tokenizer, _ = made(
        linear(donors["a"], more=f"chat_template: {json.dumps(template)}"), tmp_path / "out"
    )
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == TALK[0]["content"]


@pytest.mark.parametrize(
    "more", ["", "chat_template: chatml", "chat_template: auto", "tokenizer_source: union"]
)
@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff\xfe\x00"])
def test_settings_that_cannot_be_read_are_reported(donors, tmp_path, run, content, more):
    broken = Path(shutil.copytree(donors["a"], tmp_path / "broken"))
    (broken / "tokenizer_config.json").write_bytes(content)
    (tmp_path / "r.yaml").write_text(linear(broken, donors["b"], more=more))
    for command in (("check",), ("merge", "--dry-run")):
        code, _, err = run(
            command[0],
            tmp_path / "r.yaml",
            *(["out"] if command[0] == "merge" else []),
            *command[1:],
        )
        assert (
            code == 2 and f"{broken / 'tokenizer_config.json'}\n" in err and "Traceback" not in err
        ), err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("chat_template.jinja", b"\xff\xfe\x00", "UTF-8"),
        (
            "tokenizer_config.json",
            b'{"chat_template": [5, {"name": 3}]}',
            "a donor with a chat template",
        ),
        ("chat_template.json", b"[]", "a JSON object"),
    ],
)
def test_a_donor_s_template_that_is_none_is_reported(donors, tmp_path, name, content, said):
    broken = Path(shutil.copytree(donors["a"], tmp_path / "broken"))
    (broken / name).write_bytes(content)
    with pytest.raises(FrankenmergeError) as caught:
        made(linear(broken, more="chat_template: auto"), tmp_path / "out")
    assert said in caught.value.faults[0].expected
