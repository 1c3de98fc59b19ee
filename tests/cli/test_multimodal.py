"""The command line on multimodal donors: each command works, or refuses with a reason."""

import pytest
from wrapped import TEXTS, config_of, write_wrapped


@pytest.fixture(scope="module", params=TEXTS)
def wrapped(request, tmp_path_factory):
    """Two donors of one wrapper."""
    folder, config = tmp_path_factory.mktemp(request.param), config_of(request.param)
    folders = [folder / "a", folder / "b"]
    for seed, path in enumerate(folders):
        write_wrapped(path, config, seed)
    return folders


@pytest.fixture
def commands(wrapped, tmp_path):
    """Commands from donors to a merged checkpoint, each of which needs those before it."""
    a, b = wrapped
    alignment, recipe = tmp_path / "ab.alignment.safetensors", tmp_path / "r.yaml"
    return (
        ("inspect", a, b),
        ("analyze", a, "-o", tmp_path / "a.atlas.safetensors"),
        ("align", a, b, "-o", alignment),
        ("plan", alignment, "-o", recipe, "--depth", "7"),
        ("check", recipe),
        ("merge", recipe, tmp_path / "merged"),
        ("check", tmp_path / "merged"),
    )


def test_every_command_works_or_says_why_not(commands, answer):
    for command in commands:
        code, output = answer(*command)
        print(command[0], code, output[-500:])
        if code:
            break
