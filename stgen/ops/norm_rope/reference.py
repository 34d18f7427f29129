"""The definition of norm_rope in PyTorch, one operation at a time."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from stgen.ops.rms_norm import rms_norm


def norm_rope_reference(
    qkv: Tensor, gain_q: Tensor | None, gain_k: Tensor | None, tables: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, N, heads, D] of qkv [B, N, 3, heads, D]; v is a view of it."""
    q, k, v = qkv.unbind(2)
    return _place(q, gain_q, tables, eps), _place(k, gain_k, tables, eps), v


def pooled_reference(x: Tensor, block: int) -> Tensor:
    """Means of x [B, N, heads, D] over blocks of tokens, the last of what it has: [B, heads, blocks, D]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = pad(wide, (0, 0, 0, 0, 0, -x.shape[1] % block)).unflatten(1, (-1, block)).sum(2)  # [B, blocks, heads, D]
    numbers = (x.shape[1] - torch.arange(0, x.shape[1], block, device=x.device)).clamp(max=block)
    return (sums / numbers[:, None, None]).transpose(1, 2)


def _place(x: Tensor, gain: Tensor | None, tables: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    if gain is not None:
        x = rms_norm(x, gain, eps)
    if tables is None:
        return x
    cos, sin = (table.to(x.dtype)[:, None] for table in tables)  # [N, 1, D/2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
