"""Damped recipes: what is scaled and by how much, the same on disk and in memory."""

import numpy as np
import pytest
import torch
from conftest import in_memory, resolved, written
from safetensors.torch import load_file

from frankenmerge.analysis.align import align
from frankenmerge.analysis.analyze import analyze
from frankenmerge.artefacts.recipe import Block, recipe_of
from frankenmerge.artefacts.recipe_file import parse_recipe
from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.models.loading import load_model
from frankenmerge.planning.damping import damped, dampings
from frankenmerge.splicing.opening import open_donors

BLOCKS = [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("a", 3)]
WRITES = {"llama": ("self_attn.o_proj", "mlp.down_proj"), "gpt2": ("attn.c_proj", "mlp.c_proj")}


def recipe_from(donors, names=("a", "b")):
    return recipe_of([Block(str(donors[names[donor == "b"]]), index) for donor, index in BLOCKS])


@pytest.mark.parametrize("family, names", [("llama", ("a", "b")), ("gpt2", ("g", "h"))])
def test_a_merge_and_a_splice_in_memory_scale_equally(donors, tmp_path, family, names):
    factors = [1, 0.7, 0.3, 0.7071, 0.9, 1]
    recipe = parse_recipe(
        damped(recipe_from(donors, names), factors, WRITES[family]).dump(), "recipe"
    )
    opened = open_donors(recipe)
    assert {
        name: donor.architecture.stream.writes for name, donor in opened.items()
    } == dict.fromkeys(opened, WRITES[family])
    written(recipe, tmp_path / "merged", donors=opened)
    scaled = load_file(tmp_path / "merged" / "model.safetensors")
    prefix = "model.layers.{}." if family == "llama" else "transformer.h.{}."
    for position, (block, factor) in enumerate(zip(recipe.blocks, factors, strict=True)):
        source = load_file(f"{block.model}/model.safetensors")
        names_here = [name for name in source if name.startswith(prefix.format(block.index))]
        assert names_here
        for name in names_here:
            expected = source[name] * (
                factor if any(write in name for write in WRITES[family]) else 1
            )
            torch.testing.assert_close(
                scaled[name.replace(prefix.format(block.index), prefix.format(position), 1)],
                expected,
            )
    ids = torch.arange(40).view(2, 20)
    virtual = in_memory(recipe, opened)
    merged = load_model(open_checkpoint(str(tmp_path / "merged")))
    assert torch.equal(virtual(input_ids=ids).logits, merged(input_ids=ids).logits)


def test_slices_are_cut_where_the_factor_changes_and_no_seam_is_added(donors):
    recipe = recipe_from(donors)
    found = damped(recipe, [1, 1, 0.5, 0.5, 1, 1], WRITES["llama"])
    assert found.blocks == recipe.blocks and found.seams == recipe.seams
    slices = [
        (source.layer_range, source.parameters and source.parameters["scale"][0]["value"])
        for source in found.sources
    ]
    assert slices == [([0, 2], None), ([2, 3], 0.5), ([1, 2], 0.5), ([2, 3], None), ([3, 4], None)]


def test_the_ways_of_damping_follow_passes_and_norms(donors):
    atlases = [analyze(open_checkpoint(str(donors[name]))) for name in ("a", "b")]
    alignment = align(*atlases)
    ways = {
        way.name: way.recipe for way in dampings(recipe_from(donors), [alignment], WRITES["llama"])
    }

    def factors(recipe) -> list[float]:
        scales = [
            (
                source.parameters["scale"][0]["value"] if source.parameters else 1.0,
                source.layer_range,
            )
            for source in recipe.sources
        ]
        return [value for value, (start, stop) in scales for _ in range(start, stop)]

    assert factors(ways["1/n"]) == [1, 0.5, 0.5, 0.5, 0.5, 1]
    assert factors(ways["1/sqrt(n)"]) == pytest.approx([1, 0.7071, 0.7071, 0.7071, 0.7071, 1])
    # B's blocks 1 and 2 are entered after three blocks of A: the ratio of the norms there, over
    # all probes.
    norms = [
        np.linalg.norm(atlas.activations(block), axis=1)
        for atlas, block in zip(atlases, (3, 1), strict=True)
    ]
    ratio = np.mean(np.minimum(*norms) / np.maximum(*norms))
    assert factors(ways["norms"]) == pytest.approx([1, 1, 1, ratio, ratio, 1], abs=1e-3)


def test_what_repeats_nothing_is_not_damped(donors):
    recipe = recipe_of([Block(str(donors["a"]), index) for index in range(4)])
    assert dampings(recipe, [], WRITES["llama"]) == []


def test_a_parameter_that_the_method_lacks_is_refused(donors):
    from frankenmerge.errors import FrankenmergeError

    recipe = recipe_from(donors).model_copy(update={"parameters": {"scales": 1.0}})
    with pytest.raises(FrankenmergeError, match="scale"):
        resolved(recipe)
