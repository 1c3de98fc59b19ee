"""The documentation is true: its examples run, its commands exist, its links have targets."""

import re
import shlex
from pathlib import Path

import click
import pytest
from conftest import DEMO

from frankenmerge.artefacts.recipe_file import load_recipes
from frankenmerge.cli import cli
from frankenmerge.splicing.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
EXAMPLE = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"^[ \t]*(?:\$ )?(?:accelerate launch [^\n]*?-m )?(frankenmerge [a-z][^\n]*)", re.MULTILINE
)
INLINE = re.compile(r"`(frankenmerge [a-z][^`\n]*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
README_LINES = 95
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def examples(page: Path) -> list[tuple[str, str]]:
    return EXAMPLE.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    lines = [*COMMAND.findall(text), *INLINE.findall(text)]
    return [
        command.split(" #")[0].split("   ")[0].rstrip()
        for command in lines
        if "DONOR..." not in command
    ]


def parse(command: str) -> None:
    """Let click parse a command; it raises the error that a user would see."""
    _, name, *words = [word for word in shlex.split(command) if word not in ("...", "[...]")]
    entry = cli.get_command(click.Context(cli), name)
    assert entry, f"no command {name}"
    entry.make_parser(click.Context(entry)).parse_args(words)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.S)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in HEADING.findall(text))
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}


def broken_links(page: Path) -> list[str]:
    broken = []
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}")
    return broken


def test_commands_are_parsed():
    parse("frankenmerge plan a.alignment.safetensors -o recipe.yaml --depth 12")
    with pytest.raises(click.NoSuchOption):
        parse("frankenmerge plan a.alignment.safetensors --dpeth 12")
    with pytest.raises(AssertionError, match="no command"):
        parse("frankenmerge mrege recipe.yaml out")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_command_in_the_documentation_exists(page):
    for command in commands(page):
        parse(command)


def test_commands_are_found_in_the_documentation():
    assert sum(len(commands(page)) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_have_targets(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# The way\n\n```\n# a comment\n```\n\n## 2. Does it `work`?\n")
    page.write_text("[a](other.md#2-does-it-work) [b](other.md) [c](#here)\n\n## Here\n")
    assert broken_links(page) == []
    page.write_text("[a](other.md#a-comment) [b](missing.md) [c](#there)\n\n## Here\n")
    assert broken_links(page) == ["other.md#a-comment", "missing.md#", "#there"]


def test_every_merge_method_is_in_the_documentation():
    table = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert set(METHODS) <= listed


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path, run):
    donors = {donor for recipe in load_recipes(path) for donor in recipe.donors}
    assert donors
    if all((Path(donor) / "model.safetensors").is_file() for donor in donors):
        code, _, err = run("check", path)
        assert code == 0, err


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parts[-2] == "docs" and examples(page)], ids=page_name
)
def test_examples_run(page, run, tmp_path, monkeypatch):
    if not (DEMO / "donors" / "code" / "model.safetensors").is_file():
        pytest.skip("the demo's donors are missing")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, example in examples(page):
        if language == "python":
            exec(compile(example, str(page), "exec"), names)  # noqa: S102 - code of this repository
            continue
        for line in example.splitlines():
            assert line.startswith("$ frankenmerge "), (
                f"{line!r}: a console example contains commands only"
            )
            code, _, err = run(*shlex.split(line)[2:])
            assert code == 0, f"{line}\n{err}"
