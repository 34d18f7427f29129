"""Quick-select keeps the very set that sorting keeps: the definition, and Python's own sort."""

import pytest
import torch

from stgen.ops import block_scores as ops
from stgen.ops.block_scores import quick_select, reference
from stgen.ops.block_scores.quick_select import keep_top_by_pivots


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cases(rows, m):
    """Scores by name: distinct, many equal, all equal, some and all infinitely low, both zeros."""
    x = draw(rows, m)
    low = x.masked_fill(draw(rows, m, seed=3) > 0, -torch.inf)
    low[0] = -torch.inf
    zeros = torch.where(x > 0, 0.0, -0.0)
    return {"distinct": x, "equal": (2 * x).round(), "all equal": torch.ones_like(x), "low": low, "zeros": zeros}


def counts_of(kind, rows, m):
    if kind == "alike":
        return torch.full((rows,), max(1, m // 3))
    return torch.arange(rows) % (m + 3)  # none, all and more than there are among them


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", ["alike", "varied"])
@pytest.mark.parametrize("m", [1, 2, 31, 64, 129])
def test_it_is_the_set_that_sorting_keeps(m, counts, dtype):
    rows, number = 40, counts_of(counts, 40, m)
    for mask in (
        torch.ones(rows, m, dtype=torch.bool),
        draw(rows, m, seed=1) > 0,
        torch.zeros(rows, m, dtype=torch.bool),
    ):
        for name, scores in cases(rows, m).items():
            scores = scores.to(dtype)
            ours = keep_top_by_pivots(scores, mask, number)
            assert torch.equal(ours, reference.keep_top(scores, mask, number)), name
            finite = scores.isfinite().all(-1)
            for i in finite.nonzero().flatten().tolist():
                order = sorted((j for j in range(m) if mask[i, j]), key=lambda j: (-float(scores[i, j]), j))
                assert ours[i].nonzero().flatten().tolist() == sorted(order[: int(number[i])]), name


def test_batches_of_rows_and_counts_that_broadcast():
    scores, allowed = (4 * draw(2, 3, 5, 40)).round(), draw(2, 3, 5, 40, seed=1) > 0
    for counts in (torch.tensor(7), torch.tensor([0, 3, 50, 1, 9]), torch.full((2, 1, 1), 4, dtype=torch.int32)):
        expected = reference.keep_top(scores, allowed, counts.expand(2, 3, 5))
        assert torch.equal(keep_top_by_pivots(scores, allowed, counts), expected)


def test_the_door_takes_it_for_long_rows_of_numbers(monkeypatch):
    taken = []
    monkeypatch.setattr(quick_select, "keep_top_by_pivots", lambda *given: taken.append(given[0].shape[-1]))
    for m in (1, quick_select.FEWEST - 1, quick_select.FEWEST, 1000):
        ops.keep_top(draw(3, m), torch.ones(3, m, dtype=torch.bool), torch.ones(3, dtype=torch.long))
    assert taken == [quick_select.FEWEST, 1000]
    assert not quick_select.fits(torch.zeros(0, 64)) and not quick_select.fits(torch.zeros(2, 64, device="meta"))


def test_what_it_is_given_is_not_changed():
    scores, allowed = draw(4, 50), draw(4, 50, seed=1) > 0
    before = scores.clone(), allowed.clone()
    keep_top_by_pivots(scores, allowed, torch.tensor([3, 0, 60, 5]))
    assert torch.equal(scores, before[0]) and torch.equal(allowed, before[1])
