"""modulated_norm's kernels as operators of PyTorch: opaque to torch.compile, differentiable once."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("stgen::modulated_norm", mutates_args=())
def modulated_norm_op(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    from stgen.ops.modulated_norm.triton import forward

    return forward(x, shift, scale, eps)


@modulated_norm_op.register_fake
def _(x, shift, scale, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("stgen::modulated_norm_backward", mutates_args=())
def modulated_norm_backward_op(g: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale."""
    from stgen.ops.modulated_norm.triton import backward

    return backward(g if g.stride(-1) == 1 else g.contiguous(), x, scale, eps)


@modulated_norm_backward_op.register_fake
def _(g, x, scale, eps):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        scale.new_empty(scale.shape),
        scale.new_empty(scale.shape),
    )


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, _, scale, ctx.eps = inputs
    ctx.save_for_backward(x, scale)


def _backward(ctx: Any, g: Tensor):
    return *modulated_norm_backward_op(g, *ctx.saved_tensors, ctx.eps), None


modulated_norm_op.register_autograd(_backward, setup_context=_setup)
