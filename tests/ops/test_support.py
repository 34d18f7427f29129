"""A support is a mask kept as blocks: whatever is done to one is what is done to the other."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stgen.ops.block_sparse_attention import IMPLS, block_sparse_attention
from stgen.ops.dense_attention import attention_map
from stgen.ops.support import ALL, NONE, SOME, Support

Block = tuple[int, int]


@st.composite
def masks(draw) -> tuple[Tensor, Tensor, Block]:
    """A mask [groups, heads, n, m] that may be full or empty, a second one for all groups and heads, and blocks."""
    groups, heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    n, m = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    mask = torch.rand(groups, heads, n, m, generator=g) < share
    other = torch.rand(1, 1, n, m, generator=g) < draw(st.sampled_from([0.3, 1.0]))
    return mask, other, (draw(st.integers(1, 5)), draw(st.integers(1, 5)))


many = settings(max_examples=100, deadline=None)


def same(a: Support, b: Support) -> bool:
    return torch.equal(a.table, b.table) and torch.equal(a.bits, b.bits)


@many
@given(masks())
def test_a_mask_goes_in_and_comes_out(given_masks):
    mask, _, block = given_masks
    support = Support.from_mask(mask, block)
    assert torch.equal(support.dense(), mask)
    assert torch.equal(support.attended(), mask.any(2))
    assert torch.equal(support.per_query(), mask.sum(-1))
    touched = [part.any(-1).any(-1) for rows in mask.split(block[0], 2) for part in rows.split(block[1], 3)]
    of_places, of_blocks = support.density()
    assert of_places == pytest.approx(float(mask.double().mean()), abs=1e-12)
    assert of_blocks == pytest.approx(float(torch.stack(touched).double().mean()), abs=1e-12)


@many
@given(masks())
def test_union_and_intersection_are_or_and_and(given_masks):
    mask, other, block = given_masks
    a, b = Support.from_mask(mask, block), Support.from_mask(other, block)
    for combined, expected in ((a | b, mask | other), (b & a, mask & other)):
        assert torch.equal(combined.dense(), expected)
        assert same(combined, Support.from_mask(expected, block)), "a block that became whole or empty is kept as such"


@many
@given(masks())
def test_transposing_expanding_and_the_predicate_agree_with_the_mask(given_masks):
    mask, _, block = given_masks
    support = Support.from_mask(mask, block)
    assert torch.equal(support.transpose().dense(), mask.mT)
    assert same(support.transpose().transpose(), support)
    groups, heads, n, m = mask.shape
    assert torch.equal(support.expand(2 * groups, 2 * heads).dense(), mask.repeat(2, 2, 1, 1))
    rows = Support.from_predicate(lambda i: mask[:, 0, i], n, m, block, groups)
    assert same(rows, Support.from_mask(mask[:, :1], block))


def test_a_predicate_is_asked_for_rows_in_parts(monkeypatch):
    monkeypatch.setattr("stgen.ops.support.BUILD_PAIRS", 20)
    mask = torch.rand(2, 11, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    asked: list[int] = []

    def allows(rows: Tensor) -> Tensor:
        asked.append(len(rows))
        return mask[:, rows]

    support = Support.from_predicate(allows, 11, 7, (3, 2), groups=2)
    assert asked == [3, 3, 3, 2]
    assert torch.equal(support.dense()[:, 0], mask)


@many
@given(masks(), st.integers(0, 4), st.integers(0, 4), st.booleans())
def test_places_before_the_others_see_and_are_seen(given_masks, queries, keys, padded):
    mask, other, (bq, bk) = given_masks
    present = other[0, :, 0] if padded else None
    grown = Support.from_mask(mask, (bq, bk)).extended(queries, keys, present)
    rows, columns = -(-queries // bq) * bq, -(-keys // bk) * bk
    dense = grown.dense()
    assert dense.shape[-2:] == (rows + mask.shape[-2], columns + mask.shape[-1])
    assert torch.equal(dense[:, :, rows:, columns:], mask)
    assert dense[:, :, rows:, :keys].all() and not dense[:, :, :, keys:columns].any()
    assert dense[:, :, :queries, :keys].all() and not dense[:, :, queries:rows].any()
    expected = torch.ones(mask.shape[-1], dtype=torch.bool) if present is None else present[0]
    assert torch.equal(dense[:, :, :queries, columns:], expected.expand(*mask.shape[:2], queries, -1))


@many
@given(masks())
def test_lists_name_the_kept_blocks_in_order(given_masks):
    mask, _, block = given_masks
    support = Support.from_mask(mask, block)
    for kept, row, count in zip(
        support.kept.flatten(0, 2), support.lists.flatten(0, 2), support.counts.flatten(), strict=True
    ):
        assert row[: int(count)].tolist() == torch.nonzero(kept).flatten().tolist()


def test_full_has_no_bits_and_keeps_everything():
    support = Support.full(7, 5, (3, 2))
    assert support.table.eq(ALL).all() and support.table.shape == (1, 1, 3, 3) and len(support.bits) == 0
    assert support.dense().all() and support.dense().shape == (1, 1, 7, 5)


def test_the_table_tells_none_some_and_all_apart():
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 0, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)[None, None]
    table = Support.from_mask(mask, (2, 2)).table[0, 0]
    assert table.tolist() == [[ALL, SOME, ALL], [NONE, NONE, ALL]]


def test_biases_follow_their_blocks():
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 1, 5, 6, generator=g) < 0.6
    support = Support.from_mask(mask, (2, 3))
    bias = torch.randn(support.table.shape, generator=g)
    support = replace(support, bias=bias)
    plain = Support.from_mask(mask, (2, 3))
    for combined in (support & plain, plain | support):
        assert combined.bias is bias
    assert torch.equal((support & support).bias, 2 * bias)
    assert torch.equal(support.transpose().bias, bias.mT)
    assert torch.equal(support.expand(4, 3).bias, bias.repeat(2, 3, 1, 1))
    grown = support.extended(1, 2).bias
    assert torch.equal(grown[:, :, 1:, 1:], bias) and not grown[:, :, 0].any() and not grown[..., 0].any()


def test_supports_of_other_sizes_are_not_combined():
    with pytest.raises(ValueError, match="cannot be combined"):
        Support.full(4, 4, (2, 2)) | Support.full(4, 4, (2, 4))


# -------------------------------------------------------------------------------------------------------------- orders


def shuffled(mask: Tensor, block: Block, seed: int, sides: str = "qk") -> Support:
    """The support of a mask [groups, heads, n, m] whose blocks hold queries, keys or both in random orders."""
    generator, orders = torch.Generator().manual_seed(seed), {}
    for side, length in (("q", mask.shape[2]), ("k", mask.shape[3])):
        own = torch.arange(length).expand(*mask.shape[:2], length)
        random = torch.rand(own.shape, generator=generator).argsort(-1)
        orders[side] = random if side in sides else own
    mask = mask.gather(2, orders["q"].unsqueeze(-1).expand_as(mask)).gather(3, orders["k"].unsqueeze(2).expand_as(mask))
    given = (orders[side] if side in sides else None for side in "qk")
    return replace(Support.from_mask(mask, block), **dict(zip(("query_order", "key_order"), given, strict=True)))


orderings = given(masks(), st.integers(0, 2**20), st.sampled_from(["q", "k", "qk"]))


@many
@orderings
def test_an_ordered_support_is_the_mask_in_its_own_order(given_masks, seed, sides):
    mask, _, block = given_masks
    support = shuffled(mask, block, seed, sides)
    groups, heads = mask.shape[:2]
    assert torch.equal(support.dense(), mask)
    assert torch.equal(support.attended(), mask.any(2))
    assert torch.equal(support.per_query(), mask.sum(-1))
    assert support.density()[0] == pytest.approx(float(mask.double().mean()), abs=1e-12)
    assert torch.equal(support.transpose().dense(), mask.mT)
    assert torch.equal(support.transpose().transpose().dense(), mask)
    assert torch.equal(support.expand(2 * groups, 2 * heads).dense(), mask.repeat(2, 2, 1, 1))
    assert same(support.unordered(), Support.from_mask(mask, block)) and not support.unordered().is_ordered


@many
@orderings
def test_ordered_supports_are_combined_in_their_own_order(given_masks, seed, sides):
    mask, other, block = given_masks
    a, b, plain = shuffled(mask, block, seed, sides), shuffled(other, block, seed + 1), Support.from_mask(other, block)
    for second in (b, plain):
        assert same(a | second, Support.from_mask(mask | other, block))
        assert same(second & a, Support.from_mask(mask & other, block))
    whole = mask[:, :, : mask.shape[2] // block[0] * block[0]]
    if whole.shape[2]:
        joined = Support.join([shuffled(whole, block, seed, sides), a], dim=2)
        assert same(joined, Support.from_mask(torch.cat([whole, mask], 2), block)) and not joined.is_ordered


@many
@orderings
def test_places_stand_before_ordered_ones_in_the_same_way(given_masks, seed, sides):
    mask, other, block = given_masks
    for queries, keys, present in ((2, 2, other[0, :, 0]), (0, 3, None), (4, 0, None), (0, 0, None)):
        plain = Support.from_mask(mask, block).extended(queries, keys, present)
        grown = shuffled(mask, block, seed, sides).extended(queries, keys, present)
        assert torch.equal(grown.dense(), plain.dense())
        assert (grown.query_order is not None, grown.key_order is not None) == ("q" in sides, "k" in sides)


@pytest.mark.parametrize("sides", ["q", "k", "qk"])
@pytest.mark.parametrize("normaliser", ["softmax", "relu"])
@pytest.mark.parametrize("impl", IMPLS)
def test_attending_in_another_order_changes_nothing(impl, normaliser, sides):
    """Values, LSE, map and gradients; two groups for four sequences, a row without keys, registers, sinks, a logit."""
    g = torch.Generator().manual_seed(0)
    for heads, n, m, block in ((3, 13, 11, (4, 3)), (1, 13, 11, (4, 3)), (3, 1, 1, (2, 2))):
        mask = torch.rand(2, heads, n, m, generator=g) < 0.4
        mask[:, :, n // 2] = False
        plain, ordered = (x.extended(1, 2) for x in (Support.from_mask(mask, block), shuffled(mask, block, 5, sides)))
        q = torch.randn(4, 3, plain.queries, 5, dtype=torch.float64, generator=g, requires_grad=True)
        k, v = (torch.randn(4, 3, plain.keys, 5, dtype=torch.float64, generator=g, requires_grad=True) for _ in "kv")
        sink = torch.randn(3, dtype=torch.float64, generator=g, requires_grad=True) if normaliser == "softmax" else None
        results = []
        for support in (plain, ordered):
            if sink is None:
                outputs = (block_sparse_attention(q, k, v, support, normaliser, impl=impl),)
            else:
                outputs = block_sparse_attention(q, k, v, support, normaliser, sink, return_lse=True, impl=impl)
            weights = tuple(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in outputs)
            given = [x for x in (q, k, v, sink) if x is not None]
            gradients = torch.autograd.grad(outputs, given, weights)
            results.append([*outputs, attention_map(q, k, None, support, normaliser, sink), *gradients])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_an_order_and_a_bias_are_refused_together():
    ordered = shuffled(torch.ones(1, 1, 4, 4, dtype=torch.bool), (2, 2), 0)
    with pytest.raises(ValueError, match="takes no bias"):
        replace(ordered, bias=torch.zeros(1, 1, 2, 2))
