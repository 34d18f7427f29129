"""Adaptive layer norm: LayerNorm(x) (1 + scale) + shift with shift and scale from the conditioning (adaLN of DiT,
arXiv:2212.09748, section 3.2)."""

from typing import Literal

import torch
from torch import Tensor

from stgen.ops import dispatch
from stgen.ops.modulated_norm.reference import modulated_norm_reference

Impl = Literal["auto", "reference", "triton"]
WIDEST = 4096  # channels; a row is one tile


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, impl: Impl = "auto") -> Tensor:
    """LayerNorm over the last axis without affine, times 1 + scale, plus shift.

    PyTorch makes 4 passes over tensors of the size of x forward and 12 backward; `triton` makes 2 and 3. It keeps x and
    scale for the backward, computes in float32 and rounds once.

    Args:
        x: [B, N, C].
        shift, scale: 3-D, broadcasting to x: one row for all tokens, [B or 1, 1, C], or one for each.
        eps: added to the variance, positive.
        impl: `reference`, `triton` or `auto`.

    Returns:
        [B, N, C]; under `triton` in the type of x.

    Raises:
        ValueError: shapes that do not fit, an unknown impl, or `triton` where it cannot do the call.
    """
    _check(x, shift, scale, eps)
    reason = unfit(x, shift, scale)
    if impl == "auto":
        impl = "triton" if dispatch.by_kernels("modulated_norm", x, reason, _trial, x.shape[-1]) else "reference"
    if impl == "reference":
        return modulated_norm_reference(x, shift, scale, eps)
    if impl != "triton":
        raise ValueError(f"impl should be auto, reference or triton, got {impl!r}")
    if (reason := reason or dispatch.off_gpu(x)) is not None:
        raise ValueError(f"impl triton of modulated_norm cannot do this call: {reason}; take reference")
    from stgen.ops.modulated_norm.library import modulated_norm_op

    return modulated_norm_op(*(t if t.stride(-1) == 1 else t.contiguous() for t in (x, shift, scale)), eps)


def _trial(device: torch.device, dtype: torch.dtype, channels: int) -> None:
    """The smallest forward and backward pass of the kernels."""
    x = torch.zeros(1, 2, channels, dtype=dtype, device=device).requires_grad_()
    modulated_norm(x, x[:, :1], x[:, :1], impl="triton").sum().backward()


def unfit(x: Tensor, shift: Tensor, scale: Tensor) -> str | None:
    """Why the kernels cannot do this call, in a clause; None if they can."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}, not float32, float16 or bfloat16"
    if x.numel() == 0:
        return f"x {list(x.shape)} is empty"
    if x.shape[-1] > WIDEST:
        return f"{x.shape[-1]} channels are more than {WIDEST}"
    if shift.shape != scale.shape or shift.dtype != scale.dtype:
        return f"shift {list(shift.shape)} {shift.dtype} and scale {list(scale.shape)} {scale.dtype} differ"
    if shift.dtype not in (torch.float32, x.dtype):
        return f"shift and scale are {shift.dtype}, neither float32 nor {x.dtype} as x"
    return None


def _check(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> None:
    if x.dim() != 3:
        raise ValueError(f"x should have shape [B, N, C], got {list(x.shape)}")
    for name, given in (("shift", shift), ("scale", scale)):
        fits = given.dim() == 3 and all(a in (1, b) for a, b in zip(given.shape, x.shape, strict=True))
        if not fits or given.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"{name} should have shape [B or 1, N or 1, C] for x {list(x.shape)}, got {list(given.shape)}"
            )
    if not eps > 0:
        raise ValueError(f"eps should be positive, got {eps}")
