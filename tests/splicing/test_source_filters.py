"""Filters of sources select tensors by their names in the source."""

import pytest
from lettered import faults_of, layer, whole

TEXT = """\
merge_method: passthrough
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [1, 3], filter: FILTER}
"""


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("layers.1.mlp.up_proj", [layer(0, "mlp.up_proj.weight")]),
        ("layers.2.mlp.up_proj", [layer(1, "mlp.up_proj.weight")]),
        ("up_proj", [layer(index, "mlp.up_proj.weight") for index in range(2)]),
    ],
)
def test_a_filter_may_name_a_block_of_its_source(text, names, donors, tmp_path):
    splice = whole(TEXT.replace("FILTER", text), donors, tmp_path)
    taken = [each for each in splice.operations if each.donor == str(donors["b"])]
    assert [each.name for each in taken] == names
    assert all(text in each.source for each in taken)


@pytest.mark.parametrize("text", ["layers.0.mlp", "layers.3.mlp", "embed_tokens", "mpl"])
def test_a_filter_that_selects_nothing_of_its_source_is_refused(text, donors, tmp_path):
    (fault,) = faults_of(TEXT.replace("FILTER", f"[up_proj, {text}]"), donors, tmp_path)
    assert fault.place.endswith("slices[0].sources[1].filter")
    assert fault.found == text and "model.layers.2." in fault.remedy
