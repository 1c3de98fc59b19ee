"""Puts every command's help, as the terminal shows it, into the page of commands. A hook of mkdocs."""

import re
from collections.abc import Iterator
from typing import Any

import click

from frankenmerge.cli import cli

HERE = "<!-- every command -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark in a page by the help of all commands."""
    return markdown.replace(HERE, "\n\n".join(sections()))


def sections() -> Iterator[str]:
    """One section for each command."""
    parent = click.Context(cli, info_name="frankenmerge")
    for name in cli.list_commands(parent):
        command = cli.get_command(parent, name)
        assert command
        with click.Context(
            command, info_name=name, parent=parent, terminal_width=80, max_content_width=80
        ) as context:
            told = command.get_help(context)
        # The terminal's copy says what may be repeated or is a default; nothing of it is to be read
        # as markup.
        yield f"## {name}\n\n```text\n{re.sub(r'[ ]+$', '', told, flags=re.MULTILINE)}\n```"
