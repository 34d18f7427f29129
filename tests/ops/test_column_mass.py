"""Column mass against a loop over queries and keys, and its independence of how queries are taken together."""

import math

import pytest
import torch

from stgen.ops.column_mass import column_mass


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weight(kind, score):
    return math.exp(score) if kind == "softmax" else max(0.0, score) ** (2 if kind == "relu2" else 1)


@pytest.mark.parametrize(("n", "m"), [(7, 5), (1, 1), (3, 8)])
@pytest.mark.parametrize(("kind", "sink"), [("softmax", False), ("softmax", True), ("relu", False), ("relu2", False)])
def test_it_is_the_sum_of_each_column(kind, sink, n, m):
    q, k, logit = draw(2, 3, n, 4), draw(2, 3, m, 4, seed=1), draw(3, seed=2)
    expected = torch.zeros(2, m, dtype=torch.float64)
    for s in range(2):
        for h in range(3):
            for i in range(n):
                row = [weight(kind, float(q[s, h, i] @ key) / 2) for key in k[s, h]]
                mass = sum(row) + (math.exp(float(logit[h])) if sink else 0) if kind == "softmax" else m
                expected[s] += torch.tensor(row, dtype=torch.float64) / mass
    ours = column_mass(q, k, kind, logit if sink else None)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", [1, 9 * 4, 9 * 22, 9 * 23 * 2, 9 * 23 * 5])
def test_it_does_not_depend_on_how_many_queries_and_heads_are_looked_at_together(part):
    q, k, sink = draw(2, 3, 23, 4), draw(2, 3, 9, 4, seed=1), draw(3, seed=2)
    for logit in (None, sink):
        torch.testing.assert_close(
            column_mass(q, k, sink=logit, part=part), column_mass(q, k, sink=logit), rtol=0, atol=1e-12
        )
    torch.testing.assert_close(column_mass(q, k, part=part).sum(1), torch.full((2,), 3.0 * 23, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_thirty_two_and_carry_no_gradient(dtype):
    q, k = draw(1, 2, 600, 16).to(dtype).requires_grad_(), draw(1, 2, 300, 16, seed=1).to(dtype).requires_grad_()
    ours = column_mass(q, k)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    exact = column_mass(q.double(), k.double())
    torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=0)
