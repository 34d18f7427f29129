"""Block-sparse attention by kernels as operations of PyTorch: opaque to torch.compile, differentiable once.

The operation returns the output, the level and the mass of each row. The LSE is computed from the mass outside, so that
its gradient comes back as that of the mass; the level is a constant of the backward.
"""

import math
from typing import Any

import torch
from torch import Tensor

from stgen.ops.block_sparse_attention.lists import BlockLists
from stgen.ops.normaliser import Normaliser
from stgen.ops.support import Support


def block_sparse_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    support: Support,
    normaliser: Normaliser,
    sink: Tensor | None,
    with_lse: bool,
    fast: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Output [S, heads, n, D] and, where asked for, LSE [S, heads, n]; `fast` is of the backward."""
    lists = BlockLists.of(support)
    bias = None if support.bias is None else support.bias.contiguous()
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out, level, mass = forward_op(
        q, k, v, sink, bias, lists.tensors(), list(lists.block), normaliser.kind, normaliser.cut, fast
    )
    if not with_lse:
        return out, None
    if normaliser.kind == "softmax":  # kernels give its level as a power of two
        level = level * math.log(2)
    return out, normaliser.log_mass(mass, level)


def _descriptors(q: Tensor) -> bool:
    """Whether loads go by tensor descriptors: the units for that come with sm_90."""
    return q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device)[0] >= 9


@torch.library.custom_op("stgen::block_sparse_attention", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    bias: Tensor | None,
    lists: list[Tensor],
    block: list[int],
    kind: str,
    cut: float | None,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from stgen.ops.block_sparse_attention import triton

    read = BlockLists.from_tensors(lists, block)
    return triton.forward(q, k, v, read, Normaliser(kind, cut), sink, bias, _descriptors(q))  # type: ignore[arg-type]


@forward_op.register_fake
def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    level, mass = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(q), level, mass


@torch.library.custom_op("stgen::block_sparse_attention_backward", mutates_args=())
def backward_op(
    d_out: Tensor,
    d_mass: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    level: Tensor,
    mass: Tensor,
    sink: Tensor | None,
    bias: Tensor | None,
    lists: list[Tensor],
    block: list[int],
    kind: str,
    cut: float | None,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, sink and bias; without elements for a sink or bias that is not there."""
    from stgen.ops.block_sparse_attention import triton

    read, normaliser = BlockLists.from_tensors(lists, block), Normaliser(kind, cut)  # type: ignore[arg-type]
    d_out = d_out if d_out.stride(3) == 1 else d_out.contiguous()
    *of_qkv, d_sink, d_bias = triton.backward(
        d_out, d_mass, q, k, v, out, level, mass, read, normaliser, sink, bias, fast, _descriptors(q)
    )
    d_sink, d_bias = (q.new_empty(0) if x is None else x for x in (d_sink, d_bias))
    return (*of_qkv, d_sink, d_bias)  # type: ignore[return-value]


@backward_op.register_fake
def _backward_fake(d_out: Tensor, d_mass: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    sink, bias = rest[3:5]
    optional = (q.new_empty(0) if x is None else torch.empty_like(x) for x in (sink, bias))
    return (*map(torch.empty_like, (q, k, v)), *optional)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, sink, bias, lists, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, sink, bias, *lists)


def _gradient(ctx: Any, d_out: Tensor, _: Tensor, d_mass: Tensor) -> tuple:
    q, k, v, out, level, mass, sink, bias, *lists = ctx.saved_tensors
    grads = backward_op(d_out, d_mass.contiguous(), q, k, v, out, level, mass, sink, bias, lists, *ctx.options)
    d_sink, d_bias = (None if x is None else d for x, d in zip((sink, bias), grads[3:], strict=True))
    return (*grads[:3], d_sink, d_bias, [None] * len(lists), None, None, None, None)


forward_op.register_autograd(_gradient, setup_context=_setup)


def _refuse(*_: Any) -> None:
    raise RuntimeError("block_sparse_attention by triton has no second derivative; take impl='reference' for one")


backward_op.register_autograd(_refuse)
