"""norm_rope's kernels as operators of PyTorch: opaque to torch.compile, differentiable once."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("stgen::norm_rope", mutates_args=())
def norm_rope_op(
    qkv: Tensor,
    gain_q: Tensor | None,
    gain_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    block: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the pooled q and k, which have 0 blocks where `block` is None."""
    from stgen.ops.norm_rope.triton import forward

    return forward(qkv, gain_q, gain_k, cos, sin, eps, block)


@norm_rope_op.register_fake
def _(qkv, gain_q, gain_k, cos, sin, eps, block):
    batch, tokens, _, heads, head_dim = qkv.shape
    blocks = 0 if block is None else (tokens + block - 1) // block
    outputs = [qkv.new_empty(batch, tokens, heads, head_dim) for _ in range(3)]
    pooled = [qkv.new_empty(batch, heads, blocks, head_dim, dtype=torch.float32) for _ in range(2)]
    return *outputs, *pooled


@torch.library.custom_op("stgen::norm_rope_backward", mutates_args=())
def norm_rope_backward_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dpooled_q: Tensor | None,
    dpooled_k: Tensor | None,
    qkv: Tensor,
    gain_q: Tensor | None,
    gain_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    block: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv and of the gains, empty for a gain that is None."""
    from stgen.ops.norm_rope.triton import backward

    dq, dk, dv = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv))
    dpooled_q, dpooled_k = (None if x is None else x.contiguous() for x in (dpooled_q, dpooled_k))
    dqkv, *dgains = backward(dq, dk, dv, dpooled_q, dpooled_k, qkv, gain_q, gain_k, cos, sin, eps, block)
    dgain_q, dgain_k = (qkv.new_empty(0) if dgain is None else dgain for dgain in dgains)
    return dqkv, dgain_q, dgain_k


@norm_rope_backward_op.register_fake
def _(dq, dk, dv, dpooled_q, dpooled_k, qkv, gain_q, gain_k, cos, sin, eps, block):
    dgain_q, dgain_k = (qkv.new_empty(0) if x is None else x.new_empty(x.shape) for x in (gain_q, gain_k))
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), dgain_q, dgain_k


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.block = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # means that only chose blocks have no gradient


def _backward(ctx: Any, dq, dk, dv, dpooled_q, dpooled_k):
    qkv, gain_q, gain_k, cos, sin = ctx.saved_tensors
    grads = (torch.zeros_like(qkv[:, :, 0]) if x is None else x for x in (dq, dk, dv))
    dqkv, dgain_q, dgain_k = norm_rope_backward_op(
        *grads, dpooled_q, dpooled_k, qkv, gain_q, gain_k, cos, sin, ctx.eps, ctx.block
    )
    dgains = (None if gain is None else dgain for gain, dgain in ((gain_q, dgain_q), (gain_k, dgain_k)))
    return dqkv, *dgains, None, None, None, None


norm_rope_op.register_autograd(_backward, setup_context=_setup)
