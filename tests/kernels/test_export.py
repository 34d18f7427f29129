"""The operators of the kernels stand in an exported program, and it computes what they compute."""

import pytest
import torch
from torch import nn

from stgen.ops.block_sparse_attention import block_sparse_attention
from stgen.ops.boxes import Boxes
from stgen.ops.linear_attention import linear_attention
from stgen.ops.modulated_norm import modulated_norm
from stgen.ops.norm_rope import norm_rope
from stgen.ops.short_attention import short_attention
from stgen.ops.support import Support


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


BOXES, EVERY = Boxes((4, 2, 2), (4, 1, 1)), Support.full(40, 40, (16, 16))
CALLS = {
    "short_attention": (lambda q: short_attention(q, q, q, BOXES, impl="triton"), numbers(1, 16, 2, 32)),
    "block_sparse_attention": (lambda q: block_sparse_attention(q, q, q, EVERY, impl="triton"), numbers(1, 2, 40, 32)),
    "linear_attention": (lambda x: linear_attention(x.relu(), x.relu(), x, impl="triton"), numbers(1, 2, 40, 32)),
    "norm_rope": (lambda x: norm_rope(x, None, None, None, impl="triton")[0], numbers(1, 8, 3, 2, 32)),
    "modulated_norm": (lambda x: modulated_norm(x, x[:, :1], x[:, :1], impl="triton"), numbers(2, 8, 64)),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_exported_program_holds_the_operator(name):
    call, x = CALLS[name]

    class Calls(nn.Module):
        def forward(self, x):
            return call(x)

    call(x)  # the lists of a support are made once, before
    program = torch.export.export(Calls(), (x,))
    graphs = [str(module.graph) for module in program.graph_module.modules() if hasattr(module, "graph")]
    assert any(f"stgen.{name}" in graph for graph in graphs)
    torch.testing.assert_close(program.module()(x), call(x), rtol=0, atol=0)
