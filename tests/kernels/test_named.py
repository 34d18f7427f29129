"""Kernels asked for by name where they cannot run say so, before Triton says something of its own."""

import pytest
import torch

from stgen.ops.block_scores import pool, select_blocks
from stgen.ops.block_sparse_attention import block_sparse_attention
from stgen.ops.boxes import Boxes
from stgen.ops.linear_attention import linear_attention, linear_attention_segments
from stgen.ops.modulated_norm import modulated_norm
from stgen.ops.norm_rope import norm_rope
from stgen.ops.short_attention import short_attention
from stgen.ops.support import Support

X = torch.rand(1, 2, 16, 32)
EVERY = torch.ones(1, 1, 16, 16, dtype=torch.bool)
BOXES = Boxes((1, 4, 4), (1, 4, 4))
CALLS = {
    "short_attention": lambda: short_attention(*(X.transpose(1, 2),) * 3, BOXES, impl="triton"),
    "block_sparse_attention": lambda: block_sparse_attention(X, X, X, Support.full(16, 16, (16, 16)), impl="triton"),
    "linear_attention": lambda: linear_attention(X, X, X, impl="triton"),
    "segments": lambda: linear_attention_segments(X, X, X, 8, impl="triton"),
    "norm_rope": lambda: norm_rope(torch.rand(1, 16, 3, 2, 32), None, None, None, impl="triton"),
    "modulated_norm": lambda: modulated_norm(X[0], X[0], X[0], impl="triton"),
    "pool": lambda: pool(X, EVERY[:, :, 0], 8, impl="triton"),
    "select_blocks": lambda: select_blocks(X, X, EVERY, mass=0.9, impl="triton"),
    "transposed": lambda: select_blocks(X, X, EVERY, mass=0.9, impl="reference").transposed(impl="triton"),
}


@pytest.mark.parametrize("name", CALLS)
def test_on_a_cpu_without_the_interpreter(monkeypatch, name):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"triton.* (on cpu|on a GPU, not on cpu).*TRITON_INTERPRET=1"):
        CALLS[name]()


def test_features_and_places_of_linear_attention():
    with pytest.raises(ValueError, match=r"phi_q \[1, 2, 16, 32\] and phi_k \[1, 2, 16, 8\] should have the same feat"):
        linear_attention(X, X[..., :8], X)
    with pytest.raises(ValueError, match=r"v \[1, 2, 9, 32\] the same places"):
        linear_attention(X, X, X[:, :, :9])
