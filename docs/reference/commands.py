"""A hook of mkdocs that puts every command's help into the page of commands."""

import re
from collections.abc import Iterator
from typing import Any

import click

from frankenmerge.cli import cli

HERE = "<!-- every command -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker in a page by the help of all commands."""
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
            text = command.get_help(context)
        # As text: nothing in it is markup.
        yield f"## {name}\n\n```text\n{re.sub(r'[ ]+$', '', text, flags=re.MULTILINE)}\n```"
