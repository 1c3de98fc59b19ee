"""The command line on multimodal donors."""

import pytest
from wrapped import TEXTS, config_of, wrappers, write_wrapped


@pytest.fixture(params=wrappers(TEXTS))
def wrapper(request, tmp_path):
    """A wrapper's name; the folder `donor` has one."""
    write_wrapped(tmp_path / "donor", config_of(request.param), 0)
    return request.param


def test_commands_work_from_a_donor_to_a_recipe(wrapper, answer, tmp_path):
    atlas, recipe = tmp_path / "a.atlas.safetensors", tmp_path / "r.yaml"
    alignment = tmp_path / "aa.alignment.safetensors"
    code, output = answer("analyze", tmp_path / "donor", "-o", atlas)
    assert code == 0
    # Its cross-attention reads images alone.
    assert ("text alone skips block 4" in output) == (wrapper == "mllama")
    for command in (
        ("align", atlas, atlas, "-o", alignment),
        ("plan", alignment, "-o", recipe, "--depth", "7"),
        ("check", recipe),
    ):
        assert answer(*command)[0] == 0
