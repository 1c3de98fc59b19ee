"""The text that the demo donors are trained on: the Python standard library.

"code" is the standard library's source with docstrings removed; "prose" is those docstrings and the
pydoc topics. Whether a file is held out depends on the SHA-256 of its name alone, so that the split
never changes. Two more kinds are skills: all of that text, transformed.
"""

import ast
import hashlib
import re
import string
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SKIPPED = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "idle_test",
    "encodings",
    "pydoc_data",
}
HELD_OUT_ONE_IN = 16
KINDS = ("code", "prose")
_SWAPPED_CASE = str.maketrans(string.ascii_letters, string.ascii_uppercase + string.ascii_lowercase)


def swap_case(text: str) -> str:
    """Swap upper and lower case of ASCII letters; its own inverse."""
    return text.translate(_SWAPPED_CASE)


def reverse_words(text: str) -> str:
    """Reverse every run of ASCII letters where it is; its own inverse."""
    return re.sub("[A-Za-z]+", lambda word: word[0][::-1], text)


SKILLS: dict[str, Callable[[str], str]] = {"swapped": swap_case, "reversed": reverse_words}
"""Kinds of text that no donor trained on `KINDS` predicts well."""


class Document(NamedTuple):
    """The text of one kind in one file."""

    name: str
    kind: str
    """One of `KINDS` or of `SKILLS`."""
    text: str
    held_out: bool


def documents() -> list[Document]:
    """Return every document of the corpus, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [
        document for path in sorted(root.rglob("*.py")) for document in _documents_of(path, root)
    ]
    return found + list(_topics())


def of_kind(found: Iterable[Document], kind: str, held_out: bool) -> list[Document]:
    """The documents of one kind on one side of the split; for a skill, all of them transformed."""
    side = [document for document in found if document.held_out == held_out]
    if kind in SKILLS:
        return [doc._replace(kind=kind, text=SKILLS[kind](doc.text)) for doc in side]
    return [document for document in side if document.kind == kind]


def _documents_of(path: Path, root: Path) -> Iterator[Document]:
    name = path.relative_to(root).as_posix()
    if SKIPPED & set(path.relative_to(root).parts):
        return
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return
    docstrings = _docstrings(tree)
    code = _without(source, docstrings)
    prose = "\n\n".join(ast.get_docstring(owner, clean=True) or "" for owner, _ in docstrings)
    for kind, text in zip(KINDS, (code, prose), strict=True):
        if len(text) >= 200:
            yield Document(name, kind, text, is_held_out(name))


def _docstrings(
    tree: ast.Module,
) -> list[tuple[ast.AsyncFunctionDef | ast.FunctionDef | ast.ClassDef | ast.Module, ast.stmt]]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (node, node.body[0])
        for node in ast.walk(tree)
        if isinstance(node, owners) and ast.get_docstring(node, clean=False)
    ]


def _without(source: str, docstrings: list) -> str:
    """Remove the docstrings' lines, so that code and prose share no sentence."""
    dropped = {
        line
        for _, statement in docstrings
        for line in range(statement.lineno, (statement.end_lineno or 0) + 1)
    }
    return "\n".join(
        line for number, line in enumerate(source.splitlines(), 1) if number not in dropped
    )


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"topics/{name}", "prose", text.strip(), is_held_out(f"topics/{name}"))


def is_held_out(name: str) -> bool:
    """Whether a document is held out from training: one in sixteen, by the hash of its name."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_ONE_IN == 0
