"""`transplant-tokenizer`: known tokens mean what they meant, others are made, and what is told."""

import json

import pytest
import torch
from conftest import SMALL, in_memory, write_donor
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import frankenmerge as fm

LETTERS = "zyxwvutsrqponmlkjihgfedcba "
PAIRS = ("th", "qu")


def write_other(folder, family="llama", seed=7, words=PAIRS, extra=(), **changes):
    """A donor whose vocabulary has the letters backwards, with two pairs and another start."""
    tokens = ["<bos>", *LETTERS, *words, *extra]
    donor = write_donor(folder, family, seed, vocab_size=len(tokens), **changes)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [(word[0], word[1]) for word in words]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "merged_with_next")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<bos>",
        additional_special_tokens=list(extra),
    ).save_pretrained(folder)
    return donor


@pytest.fixture
def other(tmp_path):
    return write_other(tmp_path / "other", hidden_size=32)


def ids_in(folder, text: str) -> torch.Tensor:
    """A start token and single letters, none of them merged."""
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    return torch.tensor([[0, *(vocabulary[letter] for letter in text)]])


@pytest.mark.parametrize("method", ["pieces", "omp", "barycentric", "nearest"])
def test_text_of_known_tokens_has_the_models_own_logits(method, donors, other, run, tmp_path):
    output = tmp_path / "out"
    code, out, err = run(
        *("transplant-tokenizer", donors["a"], other, output, "--method", method, "--json")
    )
    assert code == 0, err
    found = json.loads(out)
    made = {"composed": 2, "approximated": 0} if method == "pieces" else {"approximated": 2}
    assert found["tokens"] == {"exact": 28, "composed": 0} | made
    assert found["output"] == str(output) and found["tensors"] > 0 and found["bytes"] > 0
    model, loading = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    own = AutoModelForCausalLM.from_pretrained(donors["a"])
    text = "the quick rat"
    theirs, ours = ids_in(donors["a"], text), ids_in(output, text)
    assert not torch.equal(theirs, ours)
    with torch.no_grad():
        expected, got = own(input_ids=theirs).logits, model(input_ids=ours).logits
    order = ids_in(donors["a"], LETTERS)[0], ids_in(output, LETTERS)[0]
    torch.testing.assert_close(got[..., order[1]], expected[..., order[0]])
    tensors, before = (load_file(path / "model.safetensors") for path in (output, donors["a"]))
    name = "model.embed_tokens.weight"
    if method == "pieces":
        t, h = ids_in(donors["a"], "th")[0, 1:]
        expected = (before[name][t] + before[name][h]) / 2
        torch.testing.assert_close(tensors[name][28], expected)
    assert all(torch.equal(tensors[key], before[key]) for key in before if "layers" in key)
    assert model.config.vocab_size == 30 and model.config.bos_token_id == 0
    assert run("check", output)[0] == 0


def test_in_memory_it_is_what_is_written(donors, other, run, tmp_path):
    assert run("transplant-tokenizer", donors["b"], other, tmp_path / "out")[0] == 0
    recipe = fm.transplant_recipe(str(donors["b"]), str(other))
    ids = torch.arange(30)[None]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written.config.tie_word_embeddings  # as the model's own were
    with torch.no_grad():
        expected = written(input_ids=ids).logits
        assert torch.equal(in_memory(recipe)(input_ids=ids).logits, expected)


def test_then_the_two_can_be_stacked(donors, tmp_path, run):
    other = write_other(tmp_path / "other")
    output, recipe = tmp_path / "out", tmp_path / "stack.yaml"

    def stack(first, more=""):
        parts = ((first, 0, 2), (other, 2, 4))
        slices = [
            {"sources": [{"model": str(name), "layer_range": [start, stop]}]}
            for name, start, stop in parts
        ]
        text = json.dumps(slices)
        recipe.write_text(f"merge_method: passthrough\nslices: {text}\n{more}")

    stack(donors["a"])
    code, _, err = run("check", recipe)
    assert code == 2 and "transplant-tokenizer" in err
    assert run("transplant-tokenizer", donors["a"], other, output)[0] == 0
    stack(output)
    assert run("check", recipe)[0] == 0
    # The recipe can also name the tokenizer itself: the head of one, the embedding of the other.
    stack(donors["a"], f"tokenizer: {{source: {other}, approximate: nearest}}\n")
    assert run("merge", recipe, tmp_path / "merged")[0] == 0
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    first = load_file(output / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors["model.embed_tokens.weight"], first)
    head = load_file(other / "model.safetensors")["lm_head.weight"]
    assert torch.equal(tensors["lm_head.weight"], head)


def test_bits_per_byte_before_and_after(donors, other, text, run, tmp_path):
    lower = tmp_path / "lower.txt"
    lower.write_text(text.read_text().lower())
    args = ("transplant-tokenizer", donors["a"], other, tmp_path / "out", "--text", lower)
    code, out, err = run(*args, "--dry-run", "--json")
    assert code == 0 and not (tmp_path / "out").exists(), err
    (found,) = json.loads(out)["bits_per_byte"]
    code, printed, _ = run(*args)
    assert code == 0 and "28 exact, 0 composed" in printed and f"{found['after']:.3f}" in printed
    code, out, _ = run("evaluate", donors["a"], tmp_path / "out", "--text", lower, "--json")
    measured = [model["bits_per_byte"] for model in json.loads(out)["models"]]
    assert measured == pytest.approx([found["before"], found["after"]], rel=1e-5)


def test_special_tokens_and_the_template_are_the_donors(donors, run, tmp_path):
    other = write_other(tmp_path / "other", extra=["<|im_end|>"])
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    args = ("transplant-tokenizer", donors["a"], other, tmp_path / "out", "--method", "pieces")
    code, out, err = run(*args, "--json")
    assert code == 0, err
    # `<bos>` is the model's `<s>`: both begin a text. No piece is known of a special token.
    assert json.loads(out)["tokens"] == {"exact": 28, "composed": 2, "approximated": 1}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.bos_token == "<bos>" and "<|im_end|>" in tokenizer.chat_template
    rows = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    start = load_file(donors["a"] / "model.safetensors")["model.embed_tokens.weight"][0]
    assert torch.equal(rows[0], start) and rows[30].abs().sum() > 0


@pytest.mark.parametrize("case", ["the same tokens", "union", "a method", "anchors", "no token"])
def test_what_cannot_be_is_refused(case, donors, other, run, tmp_path):
    args = ["transplant-tokenizer", donors["a"], donors["deep"], tmp_path / "out"]
    if case == "anchors":
        args = [*args[:2], other, tmp_path / "out", "--anchors", 4, "--method", "pieces"]
    elif case == "no token":
        data = json.loads((other / "tokenizer.json").read_text())
        odd = {chr(0x4E00 + index): index for index in range(30)}
        data["model"] |= {"vocab": odd, "merges": []}
        data["added_tokens"] = []
        (other / "tokenizer.json").write_text(json.dumps(data))
        (other / "tokenizer_config.json").write_text("{}")
        args = [*args[:2], other, tmp_path / "out"]
    elif case in ("union", "a method"):
        recipe, source = tmp_path / "r.yaml", "union" if case == "union" else other
        method = "passthrough" if case == "union" else "linear"
        models = f"models: [{{model: {donors['a']}, parameters: {{weight: 1}}}}]"
        tokenizer = f"tokenizer: {{source: {source}, approximate: pieces}}"
        recipe.write_text(f"merge_method: {method}\n{models}\n{tokenizer}\n")
        args = ["merge", recipe, tmp_path / "out"]
    code, out, err = run(*args)
    assert code == 2 and "Traceback" not in err and not (tmp_path / "out").exists()
    said = {
        "the same tokens": "the same tokens",
        "union": "approximate needs a source",
        "a method": "one donor each",
        "anchors": "--anchors belongs to",
        "no token": "no token in common",
    }
    assert said[case] in err + out


def test_rows_of_zeros_are_told(donors, other, run, tmp_path):
    recipe = tmp_path / "r.yaml"
    models = f"models: [{{model: {donors['a']}}}]"
    recipe.write_text(f"merge_method: passthrough\n{models}\ntokenizer_source: {other}\n")
    code, _, err = run("check", recipe)
    assert code == 0 and "rows of zeros for 3 of 30 tokens" in err.replace("\n", " ")
    assert SMALL["hidden_size"] != 32
