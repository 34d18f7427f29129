"""Tokens of a video: the grid they lie on, patches in and out, and where each token stands."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Extents of the token grid in frames, rows and columns; tokens lie in raster order, the column running fastest."""

    t: int
    h: int
    w: int

    @property
    def tokens(self) -> int:
        return self.t * self.h * self.w

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}"


def grid_of(latent: Sequence[int], patch: Sequence[int]) -> Grid:
    """The grid of latents of extent `latent` (frames, rows, columns) cut into patches.

    Raises ValueError when a patch does not divide the latents.
    """
    for axis, extent, size in zip(("frames", "rows", "columns"), latent, patch, strict=True):
        if extent % size:
            raise ValueError(f"{extent} latent {axis} are not divisible by {size} of tokens.patch_size {list(patch)}")
    t, h, w = (extent // size for extent, size in zip(latent, patch, strict=True))
    return Grid(t, h, w)


def patchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """[B, C, T, H, W] -> [B, N, C * p * q * r] with one row for each p x q x r patch."""
    p, q, r = patch
    return rearrange(x, "b c (t p) (h q) (w r) -> b (t h w) (c p q r)", p=p, q=q, r=r)


def unpatchify(x: Tensor, grid: Grid, patch: Sequence[int]) -> Tensor:
    """The inverse of `patchify`: [B, N, C * p * q * r] -> [B, C, T, H, W]."""
    p, q, r = patch
    return rearrange(x, "b (t h w) (c p q r) -> b c (t p) (h q) (w r)", t=grid.t, h=grid.h, w=grid.w, p=p, q=q, r=r)


def coordinates(grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """Frame, row and column of every token: [N, 3], int64, raster order."""
    axes = (torch.arange(n, device=device) for n in (grid.t, grid.h, grid.w))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)  # [N, 3]


def _thirds(total: int) -> tuple[int, int, int]:
    """`total` shared over time, rows and columns; time takes what does not divide."""
    return total - 2 * (total // 3), total // 3, total // 3


def _frequencies(count: int, theta: float, device: torch.device | str) -> Tensor:
    return theta ** (-torch.arange(count, device=device, dtype=torch.float64) / max(count, 1))


def _phases(where: Tensor, count: int, theta: float) -> Tensor:
    """Angles of `count` frequencies shared over the three axes of places [N, 3]: [N, count], float64."""
    where = where.double()
    parts = [where[:, a, None] * _frequencies(n, theta, where.device) for a, n in enumerate(_thirds(count))]
    return torch.cat(parts, dim=-1)


def sincos_positions(grid: Grid, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Fixed embeddings [N, width]: sines and cosines of frame, row and column (Vaswani et al. 2017, section 3.5)."""
    phases = _phases(coordinates(grid, device), width // 2, 10_000.0)  # [N, width // 2]
    table = torch.cat([phases.sin(), phases.cos()], dim=-1).float()
    return torch.nn.functional.pad(table, (0, width - table.shape[-1]))


# Axes of a video's token grid are a few hundred long at most, so wavelengths up to 2 pi * 100 cover them; the 10 000
# of language models would leave most channels without a turn.
ROPE_THETA = 100.0


def rope_tables(grid: Grid, head_dim: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each [N, head_dim // 2] (RoFormer, arXiv:2104.09864, per axis).

    Raises ValueError for an odd head_dim.
    """
    return rope_tables_at(coordinates(grid, device), head_dim)


def rope_tables_at(where: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The same for places at any frame, row and column [N, 3]."""
    if head_dim % 2:
        raise ValueError(f"RoPE turns pairs of channels; head dimension {head_dim} is odd")
    phases = _phases(where, head_dim // 2, ROPE_THETA)
    return phases.cos().float(), phases.sin().float()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel pairs (i, i + D/2) of x [B, N, heads, D] by the angles of each token."""
    cos, sin = (table.to(x.dtype)[:, None, :] for table in tables)  # [N, 1, D/2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
