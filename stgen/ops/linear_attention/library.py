"""The kernels of linear attention as operators of PyTorch: opaque to torch.compile, differentiable once."""

from typing import Any

import torch
from torch import Tensor

from stgen.ops.linear_attention.cut import Cut


@torch.library.custom_op("stgen::linear_attention", mutates_args=())
def linear_attention_op(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, key_mask: Tensor | None, chunk: int | None, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and the states that the backward pass reads: M [S, heads, states, F, D] and z [S, heads, states, F]."""
    from stgen.ops.linear_attention.triton import forward

    out, memory = forward(phi_q, phi_k, v, key_mask, Cut.of(phi_q.shape[2], phi_k.shape[2], chunk, prefix))
    return out, *memory


@linear_attention_op.register_fake
def _(phi_q, phi_k, v, key_mask, chunk, prefix):
    return _fake(phi_q, v, Cut.of(phi_q.shape[2], phi_k.shape[2], chunk, prefix).ranges)


@torch.library.custom_op("stgen::linear_attention_backward", mutates_args=())
def linear_attention_backward_op(
    d_out: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    m: Tensor,
    z: Tensor,
    chunk: int | None,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of phi_q, phi_k and v."""
    from stgen.ops.linear_attention.triton import backward

    cut = Cut.of(phi_q.shape[2], phi_k.shape[2], chunk, prefix)
    return backward(d_out, phi_q, phi_k, v, key_mask, (m, z), cut)


@linear_attention_backward_op.register_fake
def _(d_out, phi_q, phi_k, v, key_mask, m, z, chunk, prefix):
    return tuple(x.new_empty(x.shape) for x in (phi_q, phi_k, v))


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    phi_q, phi_k, v, key_mask, ctx.chunk, ctx.prefix = inputs
    ctx.save_for_backward(phi_q, phi_k, v, key_mask, *output[1:])
    ctx.set_materialize_grads(False)  # the states are no result


def _backward(ctx: Any, d_out: Tensor, *_):
    grads = linear_attention_backward_op(d_out, *ctx.saved_tensors, ctx.chunk, ctx.prefix)
    return *grads, None, None, None


linear_attention_op.register_autograd(_backward, setup_context=_setup)


# ---------------------------------------------------------------------------------------------------------- memories


@torch.library.custom_op("stgen::linear_attention_segments", mutates_args=())
def linear_attention_segments_op(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, m: Tensor, z: Tensor, segment: int, delta: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, outgoing M and z, and the states before and after each segment, which the backward pass reads."""
    from stgen.ops.linear_attention.triton import forward_memory

    out, (ms, zs) = forward_memory(phi_q, phi_k, v, (m, z), segment, delta)
    return out, ms[:, :, -1].clone(), zs[:, :, -1].clone(), ms, zs


@linear_attention_segments_op.register_fake
def _(phi_q, phi_k, v, m, z, segment, delta):
    out, ms, zs = _fake(phi_q, v, Cut.of_memory(phi_q.shape[2], segment).ranges)
    return out, m.new_empty(m.shape), z.new_empty(z.shape), ms, zs


@torch.library.custom_op("stgen::linear_attention_segments_backward", mutates_args=())
def linear_attention_segments_backward_op(
    d_out: Tensor,
    d_m: Tensor,
    d_z: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    ms: Tensor,
    zs: Tensor,
    segment: int,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of phi_q, phi_k, v and the incoming M and z."""
    from stgen.ops.linear_attention.triton import backward_memory

    d_q, d_k, d_v, d_first = backward_memory(d_out, (d_m, d_z), phi_q, phi_k, v, (ms, zs), segment, delta)
    return d_q, d_k, d_v, *d_first


@linear_attention_segments_backward_op.register_fake
def _(d_out, d_m, d_z, phi_q, phi_k, v, ms, zs, segment, delta):
    return tuple(x.new_empty(x.shape) for x in (phi_q, phi_k, v, d_m, d_z))


def _setup_segments(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    phi_q, phi_k, v, _, _, ctx.segment, ctx.delta = inputs
    ctx.save_for_backward(phi_q, phi_k, v, *output[3:])
    ctx.set_materialize_grads(False)  # all states would be the largest of the gradients, and are no result


def _backward_segments(ctx: Any, d_out: Tensor | None, d_m: Tensor | None, d_z: Tensor | None, *_):
    phi_q, phi_k, v, ms, zs = ctx.saved_tensors
    d_out = v.new_zeros(*phi_q.shape[:3], v.shape[-1]) if d_out is None else d_out
    d_m = torch.zeros_like(ms[:, :, 0]) if d_m is None else d_m
    d_z = torch.zeros_like(zs[:, :, 0]) if d_z is None else d_z
    grads = linear_attention_segments_backward_op(d_out, d_m, d_z, phi_q, phi_k, v, ms, zs, ctx.segment, ctx.delta)
    return *grads, None, None


linear_attention_segments_op.register_autograd(_backward_segments, setup_context=_setup_segments)


def _fake(phi_q: Tensor, v: Tensor, states: int) -> tuple[Tensor, Tensor, Tensor]:
    (sequences, heads, queries, features), head_dim = phi_q.shape, v.shape[-1]
    out = v.new_empty(sequences, heads, queries, head_dim)
    m = v.new_empty(sequences, heads, states, features, head_dim, dtype=torch.float32)
    return out, m, v.new_empty(sequences, heads, states, features, dtype=torch.float32)
