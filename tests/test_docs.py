"""What the documentation says is so: its examples run, its commands exist, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import click
import pytest
from conftest import DEMO

from frankenmerge.cli import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
EXAMPLE = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"^[ \t]*(?:\$ )?(?:accelerate launch [^\n]*?-m )?(frankenmerge [a-z][^\n]*)", re.MULTILINE
)
INLINE = re.compile(r"`(frankenmerge [a-z][^`\n]*)`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


def told(page: Path) -> str:
    return str(page.relative_to(ROOT))


def examples(page: Path) -> list[tuple[str, str]]:
    return EXAMPLE.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    found = [*COMMAND.findall(text), *INLINE.findall(text)]
    return [
        command.split(" #")[0].split("   ")[0].rstrip()
        for command in found
        if "DONOR..." not in command
    ]


def parsed(command: str) -> None:
    """Have click read a command's words; raises what it would tell a user."""
    _, name, *words = [word for word in shlex.split(command) if word not in ("...", "[...]")]
    found = cli.get_command(click.Context(cli), name)
    assert found, f"no command {name}"
    found.make_parser(click.Context(found)).parse_args(words)


def test_commands_are_read():
    parsed("frankenmerge plan a.alignment.safetensors -o recipe.yaml --depth 12")
    with pytest.raises(click.NoSuchOption):
        parsed("frankenmerge plan a.alignment.safetensors --dpeth 12")
    with pytest.raises(AssertionError, match="no command"):
        parsed("frankenmerge mrege recipe.yaml out")


@pytest.mark.parametrize("page", PAGES, ids=told)
def test_every_command_that_is_shown_exists(page):
    for command in commands(page):
        parsed(command)


def test_commands_are_found_in_the_documentation():
    assert sum(len(commands(page)) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=told)
def test_links_lead_somewhere(page):
    broken = [
        link
        for link in LINK.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]
    assert not broken


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parts[-2] == "docs" and examples(page)], ids=told
)
def test_examples_run(page, run, tmp_path, monkeypatch):
    if not (DEMO / "donors" / "code" / "model.safetensors").is_file():
        pytest.skip("the demo's donors are not there")
    monkeypatch.chdir(tmp_path)
    known: dict = {}
    for language, example in examples(page):
        if language == "python":
            exec(compile(example, str(page), "exec"), known)  # noqa: S102 - the documentation's own code
            continue
        for line in example.splitlines():
            assert line.startswith("$ frankenmerge "), (
                f"{line!r}: an example on the console is a command"
            )
            code, _, err = run(*shlex.split(line)[2:])
            assert code == 0, f"{line}\n{err}"
