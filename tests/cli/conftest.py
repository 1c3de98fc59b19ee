"""Commands that must never end with a traceback."""

import pytest
import yaml


@pytest.fixture
def answer(run):
    """Run a command that must succeed or report a mistake: (exit status, all that it prints)."""

    def call(*arguments: object) -> tuple[int, str]:
        code, out, err = run(*arguments)
        faults = [line for line in err.splitlines() if not line.startswith("Note: ")]
        assert code in (0, 2) and "Traceback" not in err and bool(faults) == bool(code), err
        assert not any(letter in out + err for letter in "\x1b\x07\u202e\r\udc80")
        return code, " ".join((out + err).split())

    return call


@pytest.fixture
def check(answer, tmp_path):
    """Check a recipe, given as keys or as text."""

    def call(recipe: dict | str) -> tuple[int, str]:
        text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe)
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        return answer("check", tmp_path / "r.yaml")

    return call
