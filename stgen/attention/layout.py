"""Layouts: which tokens share a sequence.

`fold` lays queries, keys or values [B, N, heads, D] out as sequences [S, heads, n, D]; `unfold` brings results back.
Every layout equals joint attention under the mask of `same_sequence`, which is its definition.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from stgen.tokens import Grid, coordinates

_AXES = {
    "joint": ("b (t h w) c d", "b c (t h w) d"),
    "spatial": ("b (t h w) c d", "(b t) c (h w) d"),
    "temporal": ("b (t h w) c d", "(b h w) c t d"),
    "height": ("b (t h w) c d", "(b t w) c h d"),
    "width": ("b (t h w) c d", "(b t h) c w d"),
}
_FIXED = {"joint": (), "spatial": (0,), "temporal": (1, 2), "height": (0, 2), "width": (0, 1)}  # coordinates shared


@dataclass(frozen=True)
class Plain:
    """joint, spatial, temporal, height or width: whole axes of the grid form the sequences."""

    kind: str

    def fold(self, x: Tensor, grid: Grid) -> Tensor:
        tokens, sequences = _AXES[self.kind]
        return rearrange(x, f"{tokens} -> {sequences}", t=grid.t, h=grid.h, w=grid.w)

    def unfold(self, x: Tensor, grid: Grid) -> Tensor:
        tokens, sequences = _AXES[self.kind]
        return rearrange(x, f"{sequences} -> {tokens}", t=grid.t, h=grid.h, w=grid.w)

    def key_mask(self, grid: Grid, device: torch.device) -> Tensor | None:
        """Which places of a sequence hold a token; None where all do."""
        return None

    def same_sequence(self, grid: Grid) -> Tensor:
        """Dense definition: [N, N], true where two tokens share a sequence."""
        where = coordinates(grid)[:, list(_FIXED[self.kind])]
        return (where[:, None] == where[None]).all(-1)

    def sequence(self, grid: Grid) -> tuple[int, int]:
        """Number of sequences of one clip and places in each."""
        count = math.prod((grid.t, grid.h, grid.w)[axis] for axis in _FIXED[self.kind])
        return count, grid.tokens // count


@dataclass(frozen=True)
class Window:
    """Boxes of `size` tokens; a shifted partition starts `shift` tokens before the grid, so its border boxes are cut.

    A token at x belongs to box (x + shift) // size on each axis. On an axis that fits into one box the shift is 0.
    """

    size: tuple[int, int, int]
    shift: tuple[int, int, int] = (0, 0, 0)

    def fold(self, x: Tensor, grid: Grid) -> Tensor:
        x = rearrange(x, "b (t h w) c d -> b t h w c d", t=grid.t, h=grid.h, w=grid.w)
        x = pad(x, (0, 0, 0, 0, *self._padding(grid)))
        p, q, r = self._size(grid)
        return rearrange(x, "b (t p) (h q) (w r) c d -> (b t h w) c (p q r) d", p=p, q=q, r=r)

    def unfold(self, x: Tensor, grid: Grid) -> Tensor:
        (t, h, w), (p, q, r) = self._boxes(grid), self._size(grid)
        x = rearrange(x, "(b t h w) c (p q r) d -> b (t p) (h q) (w r) c d", t=t, h=h, w=w, p=p, q=q, r=r)
        a, b, c = self._shift(grid)
        return x[:, a : a + grid.t, b : b + grid.h, c : c + grid.w].flatten(1, 3)  # [B, N, heads, D]

    def key_mask(self, grid: Grid, device: torch.device) -> Tensor | None:
        """Which places of a box hold a token: [boxes, n] of one clip; None where all do."""
        if not any(self._padding(grid)):
            return None
        present = torch.ones(1, grid.tokens, 1, 1, dtype=torch.bool, device=device)
        return self.fold(present, grid)[:, 0, :, 0]

    def same_sequence(self, grid: Grid) -> Tensor:
        """Dense definition: [N, N], true where two tokens share a box."""
        box = (coordinates(grid) + torch.tensor(self._shift(grid))) // torch.tensor(self._size(grid))
        return (box[:, None] == box[None]).all(-1)

    def sequence(self, grid: Grid) -> tuple[int, int]:
        """Number of boxes of one clip and places in each, cut ones counted whole."""
        return math.prod(self._boxes(grid)), math.prod(self._size(grid))

    def _size(self, grid: Grid) -> tuple[int, int, int]:
        """Extents of a box; an axis shorter than the box is taken whole, without padding."""
        return min(self.size[0], grid.t), min(self.size[1], grid.h), min(self.size[2], grid.w)

    def _shift(self, grid: Grid) -> tuple[int, ...]:
        extents = (grid.t, grid.h, grid.w)
        return tuple(0 if size >= n else s for s, size, n in zip(self.shift, self.size, extents, strict=True))

    def _boxes(self, grid: Grid) -> tuple[int, ...]:
        extents = (grid.t, grid.h, grid.w)
        return tuple(
            -(-(n + s) // size) for n, s, size in zip(extents, self._shift(grid), self._size(grid), strict=True)
        )

    def _padding(self, grid: Grid) -> list[int]:
        """Places before and after each axis in the order of torch's pad: columns, rows, frames."""
        sides = []
        axes = zip((grid.t, grid.h, grid.w), self._shift(grid), self._boxes(grid), self._size(grid), strict=True)
        for extent, before, boxes, size in reversed(list(axes)):
            sides += [before, boxes * size - before - extent]
        return sides


def build(
    kind: str, size: tuple[int, int, int] | None = None, shift: tuple[int, int, int] = (0, 0, 0)
) -> Plain | Window:
    """The layout that a mixer's keys describe."""
    if kind == "window":
        assert size is not None, "the schema refuses a window without size"
        (t, h, w), (a, b, c) = size, shift
        return Window((t, h, w), (a, b, c))
    return Plain(kind)
