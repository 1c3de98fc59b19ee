"""Donors on the hub, read by their headers alone: the command line against a hub on loopback."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import write_donor
from hub_server import COMMIT, TOKEN, Repository, serving

SMALL = (".json", ".txt", ".model", ".jinja")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("repositories")
    return {
        "one": write_donor(root / "one", seed=1),
        "sharded": write_donor(root / "sharded", seed=2, shard="20KB"),
    }


@pytest.fixture
def hub(folders):
    with serving() as found:
        found.repositories = {f"org/{name}": Repository(folder) for name, folder in folders.items()}
        yield found


@pytest.fixture
def call(hub, tmp_path):
    """Run the command line against the hub: (exit status, standard output, standard error)."""

    def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "frankenmerge", *map(str, arguments)]
        own = {**os.environ, **hub.environment(tmp_path), **environment}
        ended = subprocess.run(
            command, capture_output=True, text=True, env=own, cwd=tmp_path, timeout=120
        )
        return ended.returncode, ended.stdout, ended.stderr

    return run


@pytest.fixture
def refused(call):
    def run(*arguments: object, **environment: str) -> str:
        code, out, err = call(*arguments, **environment)
        assert (code, out) == (2, "") and "Traceback" not in err, err
        return " ".join(err.split())

    return run


@pytest.fixture
def recipe(tmp_path) -> Path:
    parts = [
        {"sources": [{"model": name, "layer_range": [0, 4]}]}
        for name in ("org/one", "org/sharded@v1")
    ]
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"slices": parts, "merge_method": "passthrough"}))
    return path


def header_bytes(file: Path) -> int:
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]


def weights(folder: Path) -> dict[str, int]:
    """Bytes of the headers by file."""
    return {file.name: header_bytes(file) for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("command", ["check", "dry-run"])
def test_a_recipe_is_checked_by_headers_alone(call, hub, folders, recipe, tmp_path, command):
    arguments = (
        ["check", recipe]
        if command == "check"
        else ["merge", recipe, tmp_path / "out", "--dry-run"]
    )
    code, out, err = call(*arguments, "--download", "--json")
    assert code == 0, err
    local = yaml.safe_load(recipe.read_text())
    for part, name in zip(local["slices"], ("one", "sharded"), strict=True):
        part["sources"][0]["model"] = str(folders[name])
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(local))
    local_record = json.loads(call("check", tmp_path / "local.yaml", "--json")[1])
    assert {**json.loads(out), "recipe": ""} == {**local_record, "recipe": ""}
    assert {name: count for name, count in hub.served.items() if name.endswith(".safetensors")} == {
        **weights(folders["one"]),
        **weights(folders["sharded"]),
    }
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_a_second_check_asks_for_the_revisions_alone_and_none_needs_a_network(call, hub, recipe):
    first = call("check", recipe, "--download", "--json")
    hub.asked.clear()
    assert call("check", recipe, "--download", "--json") == first
    assert sorted(hub.asked) == [
        "GET /api/models/org/one/revision/main",
        "GET /api/models/org/sharded/revision/v1",
    ]
    hub.asked.clear()
    assert (
        call("check", recipe, "--json")
        == first
        == call("check", recipe, "--json", HF_HUB_OFFLINE="1")
    )
    assert hub.asked == []


def test_nothing_is_asked_without_consent(refused, hub, recipe):
    message = refused("check", recipe)
    assert "org/one" in message and "org/sharded@v1" in message and "--download" in message
    assert hub.asked == []


def test_inspect_reports_a_donor_without_its_weights(call, hub, folders):
    code, out, err = call("inspect", "org/one", "--download", "--json")
    assert code == 0, err
    found, local_record = (
        json.loads(out)["donors"][0],
        json.loads(call("inspect", folders["one"], "--json")[1])["donors"][0],
    )
    assert found == {**local_record, "name": "org/one", "fingerprint": None}
    assert local_record["fingerprint"]
    assert hub.served["model.safetensors"] == header_bytes(folders["one"] / "model.safetensors")
    assert "weights not available" in call("inspect", "org/one")[1]


def test_a_mixture_of_donors_on_the_hub_is_checked_by_headers(call, refused, tmp_path):
    experts = [
        {"source_model": f"org/{name}", "positive_prompts": [prompt]}
        for name, prompt in (("one", "the quick"), ("sharded", "brown fox"))
    ]
    config = tmp_path / "moe.yaml"
    config.write_text(yaml.safe_dump({"base_model": "org/one", "experts": experts}))
    code, out, err = call("check", config, "--download", "--json")
    assert code == 0, err
    assert "--download" in refused("moe", config, tmp_path / "out")
    code, written, err = call("moe", config, tmp_path / "out", "--download", "--json")
    assert code == 0, err
    assert json.loads(written)["experts"] == 2
    assert json.loads(written)["bytes"] == json.loads(out)["bytes"]


def test_a_merge_after_a_check_needs_the_weights_and_says_so(
    call, refused, hub, folders, recipe, tmp_path
):
    assert call("check", recipe, "--download")[0] == 0
    message = refused("merge", recipe, tmp_path / "out")
    assert "org/one" in message and "--download" in message and not (tmp_path / "out").exists()
    code, _, err = call("merge", recipe, tmp_path / "out", "--download")
    assert code == 0, err
    donor, _, made = (
        (folders["one"] / "model.safetensors"),
        None,
        json.loads((tmp_path / "out" / "frankenmerge.json").read_text()),
    )
    assert set(made["donors"]) == {"org/one", "org/sharded@v1"}
    assert (
        hub.served["model.safetensors"] == header_bytes(donor) + donor.stat().st_size
    )  # the header once, and the whole
    assert call("check", tmp_path / "out")[0] == 0
    hub.asked.clear()
    assert call("inspect", "org/one", "--json")[0] == 0 and hub.asked == []


def test_a_lora_on_the_hub_is_known_by_its_header_alone(call, hub, folders, tmp_path):
    from safetensors.numpy import save_file

    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file(
        {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": __import__(
                "numpy"
            ).zeros((4, 16), "float32")
        },
        lora / "adapter_model.safetensors",
    )
    hub.repositories["org/lora"] = Repository(lora)
    code, _, err = call("inspect", "org/one+org/lora", "--download")
    assert code == 0, err
    assert hub.served["adapter_model.safetensors"] == header_bytes(
        lora / "adapter_model.safetensors"
    )


@pytest.mark.slow
def test_an_adapter_on_the_hub_is_measured_on_the_base_that_it_names(call, hub, tmp_path):
    source = {"model": "org/sharded@v1", "layer_range": [0, 4]}
    recipe, text = tmp_path / "self.yaml", tmp_path / "text.txt"
    recipe.write_text(
        yaml.safe_dump({"slices": [{"sources": [source]}] * 2, "merge_method": "passthrough"})
    )
    text.write_text("the cat sat on a mat")
    code, _, err = call("merge", recipe, tmp_path / "adapter", "--adapter", "--download")
    assert code == 0, err
    headers = weights(hub.repositories["org/sharded"].folder)
    assert {name: hub.served[name] for name in headers} == headers
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/sharded", "v1")
    hub.repositories["org/adapter"] = Repository(tmp_path / "adapter")
    options = ("--text", text, "--json")
    assert "--download" in call("evaluate", "org/adapter", *options)[2]
    code, out, err = call("evaluate", "org/adapter", recipe, *options, "--download")
    assert code == 0, err
    losses = {each["name"]: each["nats_per_token"] for each in json.loads(out)["models"]}
    assert losses["org/adapter"] == losses[str(recipe)] != losses["org/sharded@v1"]


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("org/none", None, "no repository of this name, or a private one"),
        ("org/one@v2", None, "a revision of the repository"),
        ("org/one", (403, "GatedRepo"), "ask for access"),
        ("org/one", (401, "RepoNotFound"), "private"),
        ("org/one", (403, "DisabledRepo"), "a response from the hub"),
    ],
)
def test_what_may_not_be_read_has_its_own_message(refused, hub, name, error, message):
    hub.repositories["org/one"].error = error
    assert message in refused("inspect", name, "--download")


def test_a_hub_that_does_not_answer_is_reported(refused):
    message = refused("inspect", "org/one", "--download", HF_ENDPOINT="http://127.0.0.1:9")
    assert "org/one" in message and "check the name and the network" in message


def test_a_server_that_sends_no_ranges_is_reported_and_not_read_from(
    refused, hub, tmp_path, folders
):
    large = tmp_path / "large"
    shutil.copytree(folders["one"], large)
    with (large / "model.safetensors").open("ab") as file:
        file.truncate(40_000_000)
    hub.repositories["org/one"] = Repository(large, whole=True)
    assert "this server sends no ranges" in refused("inspect", "org/one", "--download")
    assert hub.served["model.safetensors"] < 20_000_000


def test_an_answer_that_is_cut_off_is_reported(refused, hub):
    hub.repositories["org/one"].cut = 3
    assert "cut off" in refused("inspect", "org/one", "--download")


@pytest.mark.parametrize(
    "content, message",
    [
        (struct.pack("<Q", 1 << 60) + b"{}", "a complete safetensors file"),
        (struct.pack("<Q", 200_000_000) + bytes(10), "a complete safetensors file"),
        (b"abc", "8 bytes"),
        (b"", "a response from the hub"),
        (struct.pack("<Q", 2) + b"[]" + bytes(64), "a JSON object"),
        (struct.pack("<Q", 0), "a safetensors header"),
        (struct.pack("<Q", 2) + b"{}" + bytes(64), "as its header says"),
    ],
)
def test_a_header_that_is_none_is_refused_before_it_is_fetched_or_read(
    refused, hub, content, message
):
    hub.repositories["org/one"].files["model.safetensors"] = content
    assert message in refused("inspect", "org/one", "--download")
    assert hub.served.get("model.safetensors", 0) <= 10


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "/etc/passwd", "..", ""])
def test_an_index_that_leaves_the_repository_is_refused(refused, hub, folders, shard):
    index = json.loads((folders["sharded"] / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = shard
    hub.repositories["org/sharded"].files["model.safetensors.index.json"] = json.dumps(
        index
    ).encode()
    message = refused("inspect", "org/sharded", "--download")
    assert "model.safetensors.index.json" in message or "regular file" in message
    assert not any("secret" in path or "passwd" in path or "/.." in path for path in hub.asked)


def test_a_shard_that_the_repository_lacks_is_named(refused, hub, tmp_path, folders):
    shutil.copytree(folders["sharded"], tmp_path / "some")
    lost = sorted((tmp_path / "some").glob("*.safetensors"))[1]
    lost.unlink()
    hub.repositories["org/sharded"] = Repository(tmp_path / "some")
    assert lost.name in refused("inspect", "org/sharded", "--download")


def test_a_header_is_kept_by_commit(call, hub, tmp_path):
    assert call("inspect", "org/one", "--download")[0] == 0
    assert [
        path.name for path in (tmp_path / "cache/frankenmerge/headers/org--one" / COMMIT).iterdir()
    ] == ["model.safetensors.header"]


def test_repositories_of_pickles_alone_are_reported(refused, hub, tmp_path, folders):
    shutil.copytree(folders["one"], tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "pytorch_model.bin")
    hub.repositories["org/old"] = Repository(tmp_path / "old")
    assert "model.safetensors or model.safetensors.index.json" in refused(
        "inspect", "org/old", "--download"
    )


@pytest.mark.parametrize("name", ["a/b--c", "a/.b", "a/b@../../c", "a/b@x/../y"])
def test_a_name_that_the_hub_does_not_know_is_refused(refused, name):
    assert name in refused("inspect", name, "--download")


# A merge put on the hub


@pytest.fixture
def local(folders, tmp_path) -> Path:
    parts = [
        {"sources": [{"model": str(folders[name]), "layer_range": [0, 4]}]}
        for name in ("one", "sharded")
    ]
    path = tmp_path / "local.yaml"
    path.write_text(yaml.safe_dump({"slices": parts, "merge_method": "passthrough"}))
    return path


@pytest.mark.parametrize(
    "name, private", [("me/merged", True), ("us/merged", False), ("merged", False)]
)
def test_a_finished_merge_is_put_into_a_new_repository(call, hub, local, tmp_path, name, private):
    options = ["--private"] if private else []
    code, out, err = call(
        "merge",
        local,
        tmp_path / "out",
        "--push-to-hub",
        name,
        "--shard-size",
        "20KB",
        *options,
        "--json",
        HF_TOKEN=TOKEN,
    )
    assert code == 0, err
    full = name if "/" in name else f"me/{name}"
    assert json.loads(out)["repository"] == f"{hub.address}/{full}"
    assert hub.private[full] == private
    assert hub.repositories[full].files == {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()
    }
    assert sum(file.endswith(".safetensors") for file in hub.repositories[full].files) > 1


def test_a_merge_that_was_put_there_is_a_donor(call, hub, local, tmp_path):
    assert (
        call("merge", local, tmp_path / "out", "--push-to-hub", "me/merged", HF_TOKEN=TOKEN)[0] == 0
    )
    hub.repositories["me/merged"] = Repository(
        tmp_path / "out", files=hub.repositories["me/merged"].files
    )
    code, out, err = call("inspect", "me/merged", "--download", "--json")
    assert code == 0, err
    assert json.loads(out)["donors"][0]["blocks"] == 8


def test_a_lora_is_extracted_from_donors_of_the_hub_and_put_there(call, hub, tmp_path):
    code, out, err = call(
        "extract-lora",
        "org/one",
        "org/sharded@v1",
        tmp_path / "out",
        "--push-to-hub",
        "me/lora",
        "--download",
        "--json",
        HF_TOKEN=TOKEN,
    )
    assert code == 0, err
    assert json.loads(out)["repository"] == f"{hub.address}/me/lora"
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.repositories["me/lora"].files == files
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/sharded", "v1")
    assert b"base_model:\n- org/sharded\n" in files["README.md"]
    assert b"base_model_relation: adapter" in files["README.md"]


def test_a_lora_of_another_shape_is_refused_by_headers(refused, hub, folders, tmp_path):
    from conftest import write_donor

    other = write_donor(tmp_path / "wide", seed=1, hidden_size=32)
    hub.repositories["org/wide"] = Repository(other)
    found = refused("extract-lora", "org/one", "org/wide", tmp_path / "out", "--download")
    assert "hidden_size" in found and not list((tmp_path / "hf").rglob("*.safetensors"))


def test_nothing_is_put_anywhere_unless_it_was_asked_for(call, hub, local, tmp_path):
    assert call("merge", local, tmp_path / "out", HF_TOKEN=TOKEN)[0] == 0
    assert (
        call(
            "merge",
            local,
            tmp_path / "other",
            "--push-to-hub",
            "me/merged",
            "--dry-run",
            HF_TOKEN=TOKEN,
        )[0]
        == 0
    )
    assert not any(asked.startswith(("POST", "PUT")) for asked in hub.asked)


@pytest.mark.parametrize(
    "name, token, message",
    [
        ("me/merged", "", "log in with"),
        ("me/merged", "hf_wrong", "log in with"),
        ("them/merged", TOKEN, "a repository of me, us"),
        ("a/b/c", TOKEN, "correct --push-to-hub"),
        ("../merged", TOKEN, "a repository of me, us"),
        ("me/full", TOKEN, "one with model.safetensors"),
    ],
)
def test_what_cannot_be_put_there_is_reported_before_the_merge(
    refused, hub, local, folders, tmp_path, name, token, message
):
    hub.repositories["me/full"] = Repository(tmp_path / "full")
    (tmp_path / "full").mkdir()
    shutil.copy(folders["one"] / "model.safetensors", tmp_path / "full")
    assert message in refused(
        "merge", local, tmp_path / "out", "--push-to-hub", name, HF_TOKEN=token
    )
    assert not (tmp_path / "out").exists()


def test_a_right_that_is_missing_is_reported_and_the_merge_stays(
    refused, call, hub, local, tmp_path
):
    hub.refused = True
    message = refused(
        "merge", local, tmp_path / "out", "--push-to-hub", "me/merged", HF_TOKEN=TOKEN
    )
    assert (
        "do not have the rights" in message and f"hf upload me/merged {tmp_path / 'out'}" in message
    )
    assert call("check", tmp_path / "out")[0] == 0


def test_private_alone_is_a_mistake(refused, local, tmp_path):
    assert "--push-to-hub" in refused("merge", local, tmp_path / "out", "--private")


def test_a_card_names_the_repositories_and_no_folders(call, hub, folders, recipe, tmp_path):
    text = yaml.safe_load(recipe.read_text())
    text["slices"][0]["sources"][0]["model"] = str(folders["one"])
    recipe.write_text(yaml.safe_dump(text))
    code, _, err = call("merge", recipe, tmp_path / "out", "--download")
    assert code == 0, err
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == ["org/sharded"]


def test_a_second_copy_of_the_weights_is_not_fetched(call, hub, folders, tmp_path):
    for folder in (folders["one"], folders["sharded"]):
        for extra in ("consolidated.safetensors", "model.fp16.safetensors"):
            shutil.copy(next(folder.glob("model*.safetensors")), folder / extra)
    recipe = tmp_path / "recipe.yaml"
    for name in ("org/one", "org/sharded"):
        recipe.write_text(
            "merge_method: passthrough\n"
            f"slices:\n- sources: [{{model: {name}, layer_range: [0, 4]}}]\n"
        )
        code, _, errors = call("merge", recipe, tmp_path / name.replace("/", "-"), "--download")
        assert code == 0, errors
    served = {name for name in hub.served if name.endswith(".safetensors")}
    named = json.loads((folders["sharded"] / "model.safetensors.index.json").read_text())
    assert served == {"model.safetensors", *named["weight_map"].values()}
