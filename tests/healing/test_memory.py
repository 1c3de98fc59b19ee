"""Memory: closed forms for the shapes of known models, and the scope that fits."""

import pytest

from frankenmerge.errors import FrankenmergeError
from frankenmerge.healing.memory import Sizes, check_memory, memory_of

SHAPES = {
    "7B": (4096, 32, 11008),
    "13B": (5120, 40, 13824),
    "70B": (8192, 80, 28672),
}
GB = 10**9


def sizes(name: str, bytes_of: int = 2) -> Sizes:
    """Llama 2 with as many heads for keys as for queries, of which one model is in memory."""
    width, blocks, inner = SHAPES[name]
    block = 4 * width * width + 3 * width * inner + 2 * width
    total = blocks * block + 2 * 32000 * width + width
    lora = blocks * 16 * (4 * 2 * width + 3 * (width + inner))
    norms = (2 * blocks + 1) * width
    trained = {"seams": 4 * block, "norms": norms, "lora": lora, "all": total}
    return Sizes(bytes_of * total, trained, width, blocks, inner, 32000, 1, 128, 2)


@pytest.mark.parametrize(
    ("name", "billions", "seams"), [("7B", 6.738, 0.8095), ("13B", 13.016, 1.2687)]
)
def test_figures_of_known_shapes(name, billions, seams):
    found = memory_of(sizes(name), "all")
    assert found.weights / 2 == pytest.approx(billions * GB, rel=1e-3)
    # Weights and those of the best check, gradients, two moments: 20 bytes a parameter.
    assert found.trained + found.gradients + found.optimiser == pytest.approx(
        20 * billions * GB, rel=1e-3
    )
    assert found.total == sum(found)
    few = memory_of(sizes(name), "seams")
    assert few.trained + few.gradients + few.optimiser == pytest.approx(20 * seams * GB, rel=1e-3)


def test_checkpointing_keeps_one_state_for_every_block():
    found = memory_of(sizes("70B"), "norms", checkpointing=True)
    assert found.activations == 4 * 128 * 80 * 8192
    assert found.activations < memory_of(sizes("70B"), "norms").activations / 10


def test_what_does_not_fit_is_refused_with_the_scope_that_does():
    with pytest.raises(FrankenmergeError) as caught:
        check_memory(sizes("7B"), "all", 40 * GB)
    assert "--scope seams fits" in str(caught.value)
    assert "37.3 GiB available" in str(caught.value)
    with pytest.raises(FrankenmergeError) as caught:
        check_memory(sizes("7B"), "all", 20 * GB)
    assert "--scope lora fits" in str(caught.value)
    with pytest.raises(FrankenmergeError) as caught:
        check_memory(sizes("70B"), "norms", 40 * GB)
    assert "--dtype bfloat16" in str(caught.value)
    assert check_memory(sizes("7B"), "all", None).total > 100 * GB


def test_an_offloaded_optimiser_leaves_parameters_and_gradients():
    whole, found = (memory_of(sizes("7B"), "all", offload=offload) for offload in (False, True))
    assert found.optimiser == 0 and found.trained == found.gradients == whole.gradients
    assert found.activations == whole.activations // sizes("7B").blocks


def test_several_devices_hold_a_share_of_everything_but_the_logits():
    one, four = (memory_of(sizes("70B")._replace(devices=count), "norms") for count in (1, 4))
    assert four.weights == one.weights / 4 and four.activations == one.activations / 4
    assert four.logits == one.logits
    with pytest.raises(FrankenmergeError) as caught:
        check_memory(sizes("70B")._replace(devices=4), "norms", 20 * GB)
    assert "on each of 4 devices" in str(caught.value)
