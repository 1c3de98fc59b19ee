"""Rows for tokens that a model lacks: closed forms and brute force."""

from itertools import combinations, product

import numpy as np
import pytest
import torch

from frankenmerge.donors.token_bytes import TokenBytes
from frankenmerge.splicing.token_maps import NO_ROW, pieces, token_map
from frankenmerge.splicing.transplanting import (
    barycentric,
    nearest,
    orthogonal_matching_pursuit,
    transplanted,
)

FINDERS = (orthogonal_matching_pursuit, barycentric, nearest)


def combined(found, anchors):
    return (found.weights[:, :, None] * anchors[found.rows]).sum(1)


def test_pieces_are_the_fewest():
    tokens = [b"a", b"b", b"c", b"ab", b"bca", b"cab", b"abc"]
    ids = {token: index for index, token in enumerate(tokens)}
    for length in range(1, 7):
        for letters in product(b"abc", repeat=length):
            text = bytes(letters)
            found = pieces(text, ids)
            assert b"".join(tokens[index] for index in found) == text
            cuts = [
                [text[start:stop] for start, stop in zip((0, *cut), (*cut, length), strict=True)]
                for count in range(length)
                for cut in combinations(range(1, length), count)
            ]
            known = [len(cut) for cut in cuts if all(part in ids for part in cut)]
            assert len(found) == min(known)
    assert pieces(b"abx", ids) == [] and pieces(b"", ids) == []


def test_tokens_are_found_by_what_they_stand_for():
    model = TokenBytes(
        {0: b"\n", 3: b" the", 4: b"t", 5: b"re", 6: b"e", 7: b"t"}, frozenset({0, 7}), {1: "<s>"}
    )
    donor = TokenBytes({0: b"t", 1: b" there", 2: b" thet", 3: b"x"}, frozenset(), {4: "<bos>"})
    found = token_map(model, donor, {"<bos>": 1}, 7)
    assert found.exact.tolist() == [4, NO_ROW, NO_ROW, NO_ROW, 1, NO_ROW, NO_ROW]
    listed = [[index for index in row if index != NO_ROW] for row in found.pieces.tolist()]
    assert listed == [[], [3, 5], [3, 4], [], [], [], []]
    assert found.composed.tolist() == [False, True, True, False, False, False, False]
    # A token that is a byte on its own is its counterpart first.
    single = token_map(model, TokenBytes({0: b"t"}, frozenset({0}), {}), {}, 1)
    assert single.exact.tolist() == [7]


@pytest.mark.parametrize("find", FINDERS)
def test_an_anchor_itself_is_found(find):
    anchors = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    found = find(anchors[:5], anchors, 1)
    assert found.rows.squeeze(1).tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(combined(found, anchors), anchors[:5])


def test_pursuit_finds_a_sparse_combination_exactly():
    generator = torch.Generator().manual_seed(1)
    anchors = torch.linalg.qr(torch.randn(30, 30, generator=generator)).Q * 3
    anchors = torch.cat([anchors, anchors[:1] * 0.5])  # one that adds nothing
    weights = torch.tensor([[2.0, -1.0, 0.5]])
    target = weights @ anchors[[4, 9, 20]]
    found = orthogonal_matching_pursuit(target, anchors, 3)
    assert sorted(found.rows[0].tolist()) == [4, 9, 20]
    torch.testing.assert_close(combined(found, anchors), target)


def test_pursuit_is_greedy_and_projects_on_all_that_it_chose():
    generator = torch.Generator().manual_seed(2)
    anchors, targets = (torch.randn(n, 10, generator=generator) for n in (25, 6))
    found = orthogonal_matching_pursuit(targets, anchors, 4)
    for target, rows, weights in zip(targets, found.rows, found.weights, strict=True):
        chosen: list[int] = []
        left = target
        for _ in range(4):
            scores = (anchors @ left).abs() / anchors.norm(dim=1)
            scores[chosen] = -1
            chosen.append(int(scores.argmax()))
            basis = anchors[chosen].T
            fitted = torch.linalg.lstsq(basis, target[:, None]).solution
            left = target - (basis @ fitted).squeeze(1)
        assert rows.tolist() == chosen
        torch.testing.assert_close(weights, fitted.squeeze(1), atol=1e-4, rtol=1e-3)


def test_barycentric_weights_sum_to_one_and_recover_a_point_between():
    anchors = torch.tensor([[0.0, 0], [1, 0], [0, 1], [9, 9]])
    target = torch.tensor([[0.25, 0.25]])
    found = barycentric(target, anchors, 3)
    assert sorted(found.rows[0].tolist()) == [0, 1, 2]
    torch.testing.assert_close(found.weights.sum(1), torch.ones(1))
    torch.testing.assert_close(combined(found, anchors), target, atol=0.02, rtol=0)


def case():
    generator = torch.Generator().manual_seed(3)
    matrix, reference = (torch.randn(n, d, generator=generator) for n, d in ((6, 5), (7, 4)))
    donor = TokenBytes(
        {0: b"a", 1: b"b", 2: b"ab", 3: b"?", 4: b"c"}, frozenset(), {5: "<s>"}
    )  # and a row that pads
    model = TokenBytes({2: b"a", 3: b"b", 4: b"c"}, frozenset(), {0: "<s>"})
    return matrix, reference, token_map(model, donor, {}, 8)


@pytest.mark.parametrize("approximation", ["pieces", "omp", "barycentric", "nearest"])
def test_known_tokens_keep_their_rows_and_others_are_made(approximation):
    matrix, reference, tokens = case()
    made = transplanted(matrix, reference, tokens, approximation, 2)
    assert torch.equal(made[[0, 1, 4, 5]], matrix[[2, 3, 4, 0]])
    if approximation == "pieces":
        torch.testing.assert_close(made[2], (matrix[2] + matrix[3]) / 2)
    shared, rows = [0, 1, 4, 5], matrix[[2, 3, 4, 0]]
    find = {"barycentric": barycentric, "omp": orthogonal_matching_pursuit}.get(
        approximation, nearest
    )
    size = rows.norm(dim=1).mean() / reference[shared].norm(dim=1).mean()
    for index in (3, 6):  # a token without pieces, and a row that pads
        expected = combined(find(reference[[index]], reference[shared], 2), rows)[0]
        if find is not nearest:
            expected *= size * reference[index].norm() / expected.norm()
        torch.testing.assert_close(made[index], expected)
    assert not made[7].any()  # behind the donor's matrix


def test_a_bias_is_put_together_from_pieces():
    matrix, reference, tokens = case()
    made = transplanted(matrix[:, 0], None, tokens, "omp", 2)
    assert made.shape == (8,)
    torch.testing.assert_close(made[:3], torch.stack([matrix[2, 0], matrix[3, 0], made[:2].mean()]))
    torch.testing.assert_close(made[3], matrix[[2, 3, 4, 0], 0].mean())
    assert np.isfinite(made.numpy()).all() and reference.shape == (7, 4)
