"""Block by block, compared with transformers' own pass from end to end."""

import os

import pytest
import torch
from block_passes import IDS, assert_close, outputs_of, whole
from conftest import changed, write_donor

from frankenmerge.donors.checkpoint import open_checkpoint
from frankenmerge.donors.families import FAMILIES
from frankenmerge.errors import FrankenmergeError
from frankenmerge.models import streaming
from frankenmerge.models.hooks import attention_of, blocks_of
from frankenmerge.models.loading import Placement, load_model
from frankenmerge.models.passes import Passage
from frankenmerge.models.streaming import each_block, stream_model, streamable


@pytest.fixture(scope="module")
def family_donors(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {
        family: open_checkpoint(str(write_donor(root / family, family, seed=7)))
        for family in FAMILIES
    }


@pytest.mark.parametrize("prefix", [(), (3,), (3, 9, 1)])
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_in_turn_give_what_the_whole_model_gives(family_donors, family, length, prefix):
    model = load_model(family_donors[family])
    ids = IDS[:, :length]
    assert_close(outputs_of(model, ids, prefix=prefix), whole(model, ids, prefix))


@pytest.mark.parametrize(
    "options", [{"site": "attention"}, {"isolated": True}, {"site": "attention", "isolated": True}]
)
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("donor", ["a", "g"])
def test_sites_and_isolated_blocks_too(donors, donor, length, options):
    model = load_model(open_checkpoint(str(donors[donor])))
    assert_close(
        outputs_of(model, IDS[:, :length], **options), whole(model, IDS[:, :length], **options)
    )
    assert_close(
        outputs_of(model, IDS[:, :length], prefix=(3, 9), **options),
        whole(model, IDS[:, :length], (3, 9), **options),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_donor_gives_the_same_bits_as_one_in_memory(family_donors, family, dtype):
    checkpoint = family_donors[family]
    if not streamable(checkpoint):
        pytest.skip("its blocks are stored otherwise than they are run")
    streamed, resident = (
        stream_model(checkpoint, dtype=dtype),
        load_model(checkpoint, Placement(dtype)),
    )
    for value in (
        resident.parameters()
    ):  # mapped from the file they have odd addresses, on which kernels' last bits depend
        value.data = value.data.clone()
    for ids, prefix in ((IDS[:, :1], ()), (IDS[:, :1], (3,)), (IDS, ())):
        pairs = zip(
            outputs_of(streamed, ids, prefix=prefix),
            outputs_of(resident, ids, prefix=prefix),
            strict=True,
        )
        assert all(torch.equal(state, other) for state, other in pairs)


def test_a_streamed_donor_holds_one_block_at_a_time(donors):
    streamed = stream_model(open_checkpoint(str(donors["deep"])))
    blocks = blocks_of(streamed.model)

    def there() -> list[int]:
        return [
            number
            for number, block in enumerate(blocks, 1)
            if not any(value.is_meta for value in block.parameters())
        ]

    assert there() == []
    for index, _ in each_block(streamed):
        assert there() == [index]
    assert there() == []
    assert streamed.model.get_output_embeddings().weight.is_meta


def test_blocks_are_read_from_where_the_work_is(donors):
    streamed = stream_model(open_checkpoint(str(donors["deep"])))
    assert [index for index, _ in each_block(streamed, 5)] == [5, 6]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_queries_and_keys_a_single_token_gives_the_same(family_donors, family):
    model = load_model(family_donors[family])
    short, full = (
        outputs_of(model, torch.arange(48)[:, None], shortcut=shortcut)
        for shortcut in (True, False)
    )
    assert_close(short, full)
    if FAMILIES[
        family
    ].queries_keys:  # of a fused map fewer outputs are computed, maybe by another kernel
        assert all(torch.equal(state, other) for state, other in zip(short, full, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shortcut_does_leave_out_queries_and_keys(family_donors, family):
    """Other queries and keys change nothing for a single token, but something for two."""
    model, architecture = load_model(family_donors[family]), FAMILIES[family]
    if not architecture.queries_keys:
        pytest.skip("queries and keys have no maps of their own")
    before = [outputs_of(model, IDS[:, :length]) for length in (1, 2)]
    with torch.no_grad():
        for block in blocks_of(model):
            for name in architecture.queries_keys:
                attention_of(block).get_submodule(name).weight.normal_(0, 2)
    after = [outputs_of(model, IDS[:, :length]) for length in (1, 2)]
    assert all(torch.equal(state, other) for state, other in zip(before[0], after[0], strict=True))
    assert not torch.equal(before[1][-1], after[1][-1])


@pytest.mark.parametrize("batch", [1, 2, 16, 64])
def test_an_input_has_the_same_bits_alone_and_among_others(donors, batch):
    model = load_model(open_checkpoint(str(donors["a"])))
    ids = torch.arange(48)[:, None]
    together = outputs_of(model, ids, batch=batch)
    alone = outputs_of(model, ids[:5], batch=batch)
    if batch <= 16:  # with 64, both are one batch, of different sizes
        assert all(
            torch.equal(state[:5], other) for state, other in zip(together, alone, strict=True)
        )
    assert_close([state[:5] for state in together], alone)


def test_what_has_passed_can_be_taken_up_by_another_passage(donors):
    model = load_model(open_checkpoint(str(donors["a"])))
    first, second = (Passage(model, IDS, prefix=(3,)) for _ in range(2))
    for index, block in list(each_block(model))[:2]:
        list(first.through(index, block))
    second.state = {name: value.clone() for name, value in first.state.items()}
    for index, block in each_block(model, 3):
        ours, theirs = (
            torch.cat([states for _, states in passage.through(index, block)])
            for passage in (first, second)
        )
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, whole(model, IDS, (3,))[4], rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was(donors):
    model = load_model(open_checkpoint(str(donors["g"])))
    before = whole(model, IDS)
    outputs_of(model, IDS[:, :1], site="attention", isolated=True)
    assert all(
        torch.equal(state, other) for state, other in zip(before, whole(model, IDS), strict=True)
    )
    assert not any(
        "forward" in module.__dict__ or module._forward_hooks for module in model.modules()
    )


def test_a_block_that_lacks_a_tensor_is_refused(donors, tmp_path):
    def without(tensors):
        return {
            name: value
            for name, value in tensors.items()
            if not name.endswith("input_layernorm.weight")
        }

    broken = changed(donors["a"], tmp_path / "broken", without)
    streamed = stream_model(open_checkpoint(str(broken)))
    with pytest.raises(FrankenmergeError, match="input_layernorm"):
        list(each_block(streamed))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice on files")
def test_a_block_is_announced_before_it_is_read(donors, monkeypatch):
    advised, read = [], []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _file, start, count, _advice: advised.append((start, count))
    )
    original = streaming.read_tensor
    monkeypatch.setattr(
        streaming,
        "read_tensor",
        lambda tensor: read.append((tensor.start, tensor.bytes)) or original(tensor),
    )
    streamed = stream_model(open_checkpoint(str(donors["a"])))
    read.clear()
    blocks = each_block(streamed)
    next(blocks)
    announced = set(advised)
    assert len(read) == len(announced) == 9 and not announced & set(read)
    read.clear()
    next(blocks)
    assert set(read) == announced
