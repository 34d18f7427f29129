"""Attention over a video's tokens: project, norm, turn, fold, attend, unfold, project."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stgen.attention.layout import Plain, Window
from stgen.ops.cost import attention_flops, linear_flops
from stgen.ops.dense_attention import dense_attention
from stgen.ops.rms_norm import rms_norm
from stgen.tokens import Grid, rotate


@dataclass(frozen=True)
class MixerSpec:
    """What one mixer of a plan does with its share of the heads."""

    name: str
    layout: Plain | Window


class QKNorm(nn.Module):
    """RMS norm of queries and keys per head, with a gain each (Henry et al. 2020; ViT-22B, arXiv:2302.05442)."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.q_gain = nn.Parameter(torch.ones(head_dim))
        self.k_gain = nn.Parameter(torch.ones(head_dim))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(q, self.q_gain), rms_norm(k, self.k_gain)


class Attention(nn.Module):
    """Self-attention whose heads are shared evenly by the mixers in `specs` (one mixer: all heads)."""

    def __init__(self, width: int, heads: int, specs: tuple[MixerSpec, ...], qk_norm: bool = True):
        super().__init__()
        self.heads, self.head_dim, self.specs = heads, width // heads, specs
        self.to_qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(self.head_dim) if qk_norm else None
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, grid: Grid, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [B, N, C] -> [B, N, C]; `rope` holds the tables of `tokens.rope_tables` for this grid."""
        qkv: Tensor = self.to_qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = qkv.unbind(2)  # [B, N, heads, D]
        if self.norm is not None:
            q, k = self.norm(q, k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        share = self.heads // len(self.specs)
        parts = [
            self._attend(spec.layout, grid, *(y[:, :, i * share : (i + 1) * share] for y in (q, k, v)))
            for i, spec in enumerate(self.specs)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)  # [B, N, heads, D]
        return self.to_out(out.flatten(2))

    @staticmethod
    def _attend(layout: Plain | Window, grid: Grid, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = layout.key_mask(grid, q.device)  # [sequences of a clip, n]
        if mask is not None:
            mask = mask.repeat(q.shape[0], 1)
        out = dense_attention(layout.fold(q, grid), layout.fold(k, grid), layout.fold(v, grid), mask)
        return layout.unfold(out, grid)

    def flops(self, grid: Grid) -> int:
        """Operations of a forward pass over one clip."""
        width = self.heads * self.head_dim
        total = linear_flops(grid.tokens, width, 3 * width) + linear_flops(grid.tokens, width, width)
        for spec in self.specs:
            sequences, length = spec.layout.sequence(grid)
            total += sequences * attention_flops(length, length, width // len(self.specs))
        return total


class CrossAttention(nn.Module):
    """Tokens attend the prompt; masked prompt places have no effect."""

    def __init__(self, width: int, heads: int, qk_norm: bool = True):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.norm = QKNorm(self.head_dim) if qk_norm else None
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        """x [B, N, C], text [B, L, C], text_mask [B, L] or None for all -> [B, N, C]."""
        q = self.to_q(x).unflatten(-1, (self.heads, self.head_dim))  # [B, N, heads, D]
        k, v = self.to_kv(text).unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)  # [B, L, heads, D]
        if self.norm is not None:
            q, k = self.norm(q, k)
        out = dense_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), text_mask)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def flops(self, tokens: int, text_tokens: int) -> int:
        width = self.heads * self.head_dim
        return (
            2 * linear_flops(tokens, width, width)
            + linear_flops(text_tokens, width, 2 * width)
            + attention_flops(tokens, text_tokens, width)
        )
