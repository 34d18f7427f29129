"""Queries, keys and values for attention from a packed projection: RMS norm per head, then RoPE, and block means.

The norm is that of ViT-22B (arXiv:2302.05442, section 2), RoPE that of RoFormer (arXiv:2104.09864, section 3.2) with
channel pairs (i, i + D/2).
"""

from typing import Literal

import torch
from torch import Tensor

from stgen.ops import dispatch
from stgen.ops.norm_rope.reference import norm_rope_reference, pooled_reference

Impl = Literal["auto", "reference", "triton"]
LARGEST_HEAD_DIM = 512  # half of it is the row of a tile


def norm_rope(
    qkv: Tensor,
    gain_q: Tensor | None,
    gain_k: Tensor | None,
    tables: tuple[Tensor, Tensor] | None,
    eps: float = 1e-6,
    *,
    block: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """RMS-normed and rotated queries and keys, and the values.

    PyTorch makes about 22 passes over tensors of the size of q forward (4 for the norms, 18 for the rotations) and 32
    backward, where autograd stacks the three gradients and adds up halves of pairs; `triton` makes 6 and 8. It copies v
    so that the backward writes the whole gradient of qkv, with no stack, zero-fill or add. It computes in float32
    and rounds once.

    Args:
        qkv: [B, N, 3, heads, D], any strides.
        gain_q, gain_k: [D]; None: no norm.
        tables: cosine and sine, [N, D/2] each, float32, constants; None: no rotation.
        eps: added to the mean square, positive.
        block: tokens of a block. If given, the means of the resulting q and of k over each `block` consecutive tokens
            (the last block may have fewer) are returned too.
        impl: `reference`, `triton` or `auto`.

    Returns:
        q, k, v, each [B, N, heads, D] (under `reference` v is a view of qkv), and with `block` the means of q and k,
        each [B, heads, blocks, D], float32 at least.

    Raises:
        ValueError: shapes that do not fit, tables that require gradients, an unknown impl, or `triton` where it cannot
            do the call.
    """
    _check(qkv, gain_q, gain_k, tables, eps, block)
    reason = unfit(qkv, gain_q, gain_k, tables)
    if impl == "auto":
        impl = "triton" if dispatch.by_kernels("norm_rope", qkv, reason, _trial, qkv.shape[-1]) else "reference"
    if impl == "reference":
        q, k, v = norm_rope_reference(qkv, gain_q, gain_k, tables, eps)
        return (q, k, v) if block is None else (q, k, v, pooled_reference(q, block), pooled_reference(k, block))
    if impl != "triton":
        raise ValueError(f"impl should be auto, reference or triton, got {impl!r}")
    if (reason := reason or dispatch.off_gpu(qkv)) is not None:
        raise ValueError(f"impl triton of norm_rope cannot do this call: {reason}; take reference")
    return _by_kernels(qkv, gain_q, gain_k, tables, eps, block)


def _trial(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """The smallest forward and backward pass of the kernels."""
    qkv = torch.zeros(1, 2, 3, 1, head_dim, dtype=dtype, device=device).requires_grad_()
    gain, table = torch.ones(head_dim, device=device), torch.ones(2, head_dim // 2, device=device)
    q, k, v = norm_rope(qkv, gain, gain, (table, table), impl="triton")[:3]
    (q + k + v).sum().backward()


def unfit(
    qkv: Tensor, gain_q: Tensor | None, gain_k: Tensor | None, tables: tuple[Tensor, Tensor] | None
) -> str | None:
    """Why the kernels cannot do this call, in a clause; None if they can."""
    head_dim = qkv.shape[-1]
    if qkv.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"qkv is {qkv.dtype}, not float32, float16 or bfloat16"
    if head_dim % 2 or head_dim > LARGEST_HEAD_DIM:
        return f"head dimension {head_dim} is odd or above {LARGEST_HEAD_DIM}"
    if qkv.numel() == 0:
        return f"qkv {list(qkv.shape)} is empty"
    if tables is not None and any(table.dtype != torch.float32 for table in tables):
        return f"tables are {tables[0].dtype} and {tables[1].dtype}, not float32"
    return None


def _check(
    qkv: Tensor,
    gain_q: Tensor | None,
    gain_k: Tensor | None,
    tables: tuple[Tensor, Tensor] | None,
    eps: float,
    block: int | None,
) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv should have shape [B, N, 3, heads, D], got {list(qkv.shape)}")
    for name, gain in (("gain_q", gain_q), ("gain_k", gain_k)):
        if gain is not None and gain.shape != qkv.shape[-1:]:
            raise ValueError(
                f"{name} should have shape [{qkv.shape[-1]}], one for each channel, got {list(gain.shape)}"
            )
    rows = (qkv.shape[1], qkv.shape[-1] // 2)
    for table in tables or ():
        if table.shape != rows or qkv.shape[-1] % 2:
            raise ValueError(f"tables should have shape {list(rows)}, [N, D/2] of an even D, got {list(table.shape)}")
        if table.requires_grad:
            raise ValueError("tables are constants and get no gradient; detach them")
    if not eps > 0:
        raise ValueError(f"eps should be positive, got {eps}")
    if block is not None and block < 1:
        raise ValueError(f"block should be at least 1 token, got {block}")


def _by_kernels(
    qkv: Tensor,
    gain_q: Tensor | None,
    gain_k: Tensor | None,
    tables: tuple[Tensor, Tensor] | None,
    eps: float,
    block: int | None,
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from stgen.ops.norm_rope.library import norm_rope_op

    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    gain_q, gain_k = (None if gain is None else gain.contiguous() for gain in (gain_q, gain_k))
    cos, sin = (None, None) if tables is None else (table.contiguous() for table in tables)
    q, k, v, pooled_q, pooled_k = norm_rope_op(qkv, gain_q, gain_k, cos, sin, eps, block)
    return (q, k, v) if block is None else (q, k, v, pooled_q, pooled_k)
