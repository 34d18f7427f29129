"""Block scores and what is kept of them, against loops over places in plain Python."""

import math

import pytest
import torch

from stgen.ops import block_scores as ops
from stgen.ops.support import Support


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some(*shape, seed=0):
    return draw(*shape, seed=seed) > 0


def kept_by(keep, scores, allowed):
    """Rows of the best, for a rule keep(scores falling, number kept so far, weight of those before) -> keep this one."""
    mask = torch.zeros_like(allowed)
    for i, row in enumerate(scores.tolist()):
        order = sorted((j for j in range(len(row)) if allowed[i, j]), key=lambda j: (-row[j], j))
        total = sum(math.exp(row[j]) for j in order)
        before = 0.0
        for rank, j in enumerate(order):
            weight = math.exp(row[j]) / total
            mask[i, j] = rank == 0 or keep(rank, weight, before)
            before += weight
    return mask


@pytest.mark.parametrize("n, block", [(11, 4), (8, 4), (1, 1), (3, 5)])
def test_pool_is_the_mean_of_the_places_that_hold_tokens(n, block):
    x, filled = draw(4, 2, n, 3).requires_grad_(), some(2, 1, n)
    blocks = -(-n // block)
    ours = ops.pool(x, filled, block)
    for s in range(4):
        for b in range(blocks):
            rows = [x[s, :, i] for i in range(b * block, min(n, (b + 1) * block)) if filled[s % 2, 0, i]]
            expected = torch.stack(rows).mean(0) if rows else torch.zeros(2, 3, dtype=torch.float64)
            torch.testing.assert_close(ours[s, :, b], expected, rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    empty = ~filled.repeat(2, 1, 1)[..., None]
    assert (gradient.masked_select(empty) == 0).all()
    assert torch.allclose(gradient.sum((2, 3)), 3.0 * filled_blocks(filled, block).repeat(2, 1).double())


def filled_blocks(filled, block):
    """Number of blocks that hold a token: [groups, heads]."""
    return sum(part.any(-1).long() for part in filled.split(block, dim=-1))


def test_scores_are_those_of_pools_over_queries_and_keys_that_take_part():
    q, k = draw(2, 2, 7, 3), draw(2, 2, 7, 3, seed=1)
    mask = some(1, 1, 7, 7, seed=2)
    mask[..., 5, :], mask[..., :, 2] = False, False
    ours = ops.block_scores(q, k, Support.from_mask(mask, (2, 3)))
    rows, columns = mask[0, 0].any(1), mask[0, 0].any(0)
    for a in range(4):
        for b in range(3):
            mean_q = q[:, :, 2 * a : 2 * a + 2][:, :, rows[2 * a : 2 * a + 2]].mean(2)
            mean_k = k[:, :, 3 * b : 3 * b + 3][:, :, columns[3 * b : 3 * b + 3]].mean(2)
            torch.testing.assert_close(ours[:, :, a, b], (mean_q * mean_k).sum(-1) / 3**0.5, rtol=0, atol=1e-14)


@pytest.mark.parametrize("m", [1, 5, 12])
def test_keep_top_is_the_exact_set_with_ties_to_the_lower_index(m):
    scores, allowed = (2 * draw(9, m)).round() / 2, some(9, m, seed=1)
    counts = torch.arange(9) % 4
    ours = ops.keep_top(scores, allowed, counts)
    for i in range(9):
        order = sorted((j for j in range(m) if allowed[i, j]), key=lambda j: (-float(scores[i, j]), j))
        assert ours[i].nonzero().flatten().tolist() == sorted(order[: counts[i]])


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9])
def test_keep_mass_is_the_fewest_that_reach_it(mass):
    scores, allowed = draw(9, 12), some(9, 12, seed=1)
    allowed[4] = False
    expected = kept_by(lambda rank, weight, before: before < mass, scores, allowed)
    ours = ops.keep_mass(scores, allowed, mass)
    assert torch.equal(ours, expected) and not ours[4].any()
    reached = (ops.masked_softmax(scores, allowed) * ours).sum(-1)
    assert (reached[allowed.any(-1)] >= mass - 1e-12).all()


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.9])
def test_keep_above_keeps_what_weighs_enough_and_always_the_best(threshold):
    scores, allowed = draw(9, 12), some(9, 12, seed=1)
    allowed[4] = False
    expected = kept_by(lambda rank, weight, before: weight >= threshold, scores, allowed)
    assert torch.equal(ops.keep_above(scores, allowed, threshold), expected)


@pytest.mark.parametrize(
    "ratio, number, expected", [(0.29, 100, 29), (0.7, 10, 7), (0.1, 5, 1), (0.5, 0, 0), (1, 3, 3)]
)
def test_share_of_is_the_floor_that_the_decimals_mean(ratio, number, expected):
    assert int(ops.share_of(torch.tensor(number), ratio)) == expected


@pytest.mark.parametrize("groups, heads", [(1, 1), (2, 1), (2, 2)])
def test_top_keys_do_not_depend_on_how_many_rows_are_looked_at_together(monkeypatch, groups, heads):
    n, m, block = 23, 17, (4, 3)
    q, k = draw(4, 2, n, 5), draw(4, 2, m, 5, seed=1)
    allowed = Support.from_mask(some(groups, heads, n, m, seed=2), block)
    together = ops.top_keys(q, k, allowed, 0.3)
    monkeypatch.setattr(ops, "BUILD_PAIRS", 1)
    apart = ops.top_keys(q, k, allowed, 0.3)
    assert torch.equal(together.table, apart.table) and torch.equal(together.bits, apart.bits)
    mask = allowed.dense().repeat(4 // groups, 2 // heads, 1, 1)
    assert torch.equal(together.dense() & mask, together.dense())
    assert torch.equal(together.per_query(), ops.share_of(mask.sum(-1), 0.3))


def test_selection_carries_no_gradient_and_scores_do():
    q, k = draw(1, 1, 8, 3).requires_grad_(), draw(1, 1, 8, 3, seed=1).requires_grad_()
    allowed = Support.full(8, 8, (2, 2))
    assert ops.top_blocks(q, k, allowed, 0.5).bias is None
    for gradient in torch.autograd.grad(ops.block_scores(q, k, allowed).square().sum(), [q, k]):
        assert (gradient != 0).all()


def test_pooled_keys_without_a_token_are_attended_by_none():
    filled = torch.tensor([[[True] * 5 + [False] * 4], [[True] * 9]])
    support = ops.over_blocks(filled, 7, 3)
    expected = torch.tensor([[True, True, False], [True, True, True]])
    assert support is not None and torch.equal(support.dense()[:, 0], expected[:, None].expand(2, 7, 3))
    assert ops.over_blocks(filled[1:], 7, 3) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_sixteen_bits_are_summed_in_thirty_two(dtype):
    q, k = draw(1, 2, 512, 16).to(dtype), draw(1, 2, 512, 16, seed=1).to(dtype)
    allowed = Support.full(512, 512, (64, 64))
    ours = ops.block_scores(q, k, allowed)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), ops.block_scores(q.double(), k.double(), allowed), rtol=0, atol=1e-6)
