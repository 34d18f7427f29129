"""Layouts: which tokens share a sequence, and in what order they lie in it.

`fold` lays queries, keys or values [B, N, heads, D] out as sequences [S, heads, n, D]; `unfold` brings results back.
Every layout equals joint attention under the mask of `same_sequence`, which is its definition; the order of tokens
changes no result, only the blocks that sparse patterns are kept in.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from stgen.ops.boxes import Boxes, Extent
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
        length = math.prod(self.extents(grid))
        return grid.tokens // length, length

    def extents(self, grid: Grid) -> Extent:
        """Frames, rows and columns that a sequence spans, which are in raster order."""
        t, h, w = (1 if axis in _FIXED[self.kind] else n for axis, n in enumerate((grid.t, grid.h, grid.w)))
        return t, h, w

    def boxes(self, grid: Grid) -> Boxes | None:
        """The same sequences as geometry, for kernels that leave the tokens where they are."""
        return Boxes((grid.t, grid.h, grid.w), self.extents(grid))


@dataclass(frozen=True)
class Window:
    """Boxes of `size` tokens; a shifted partition starts `shift` tokens before the grid, so its border boxes are cut.

    A token at x belongs to box (x + shift) // size on each axis. On an axis that fits into one box the shift is 0.
    """

    size: Extent
    shift: Extent = (0, 0, 0)

    def fold(self, x: Tensor, grid: Grid) -> Tensor:
        x = rearrange(x, "b (t h w) c d -> b t h w c d", t=grid.t, h=grid.h, w=grid.w)
        x = pad(x, (0, 0, 0, 0, *self._padding(grid)))
        p, q, r = self.extents(grid)
        return rearrange(x, "b (t p) (h q) (w r) c d -> (b t h w) c (p q r) d", p=p, q=q, r=r)

    def unfold(self, x: Tensor, grid: Grid) -> Tensor:
        (t, h, w), (p, q, r) = self._boxes(grid), self.extents(grid)
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
        box = (coordinates(grid) + torch.tensor(self._shift(grid))) // torch.tensor(self.extents(grid))
        return (box[:, None] == box[None]).all(-1)

    def sequence(self, grid: Grid) -> tuple[int, int]:
        """Number of boxes of one clip and places in each, cut ones counted whole."""
        return math.prod(self._boxes(grid)), math.prod(self.extents(grid))

    def extents(self, grid: Grid) -> Extent:
        """Extents of a box; an axis shorter than the box is taken whole, without padding."""
        return min(self.size[0], grid.t), min(self.size[1], grid.h), min(self.size[2], grid.w)

    def boxes(self, grid: Grid) -> Boxes | None:
        """The same sequences as geometry, for kernels that leave the tokens where they are."""
        return Boxes((grid.t, grid.h, grid.w), self.extents(grid), self._shift(grid))

    def _shift(self, grid: Grid) -> Extent:
        extents = (grid.t, grid.h, grid.w)
        a, b, c = (0 if size >= n else s for s, size, n in zip(self.shift, self.size, extents, strict=True))
        return a, b, c

    def _boxes(self, grid: Grid) -> tuple[int, ...]:
        extents = (grid.t, grid.h, grid.w)
        return tuple(
            -(-(n + s) // size) for n, s, size in zip(extents, self._shift(grid), self.extents(grid), strict=True)
        )

    def _padding(self, grid: Grid) -> list[int]:
        """Places before and after each axis in the order of torch's pad: columns, rows, frames."""
        sides = []
        axes = zip((grid.t, grid.h, grid.w), self._shift(grid), self._boxes(grid), self.extents(grid), strict=True)
        for extent, before, boxes, size in reversed(list(axes)):
            sides += [before, boxes * size - before - extent]
        return sides


@dataclass(frozen=True)
class Tiled:
    """The sequences of another layout with their tokens tile by tile, filled up to whole tiles."""

    inner: Plain | Window
    tile: Extent

    def fold(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.inner.fold(x, grid).unflatten(2, self.inner.extents(grid))  # [S, heads, frames, rows, columns, D]
        sides = [side for missing in reversed(self._missing(grid)) for side in (0, missing)]
        p, q, r = self.block(grid)
        return rearrange(pad(x, (0, 0, *sides)), "s c (t p) (h q) (w r) d -> s c (t h w p q r) d", p=p, q=q, r=r)

    def unfold(self, x: Tensor, grid: Grid) -> Tensor:
        (t, h, w), (p, q, r) = self.tiles(grid), self.block(grid)
        x = rearrange(x, "s c (t h w p q r) d -> s c (t p) (h q) (w r) d", t=t, h=h, w=w, p=p, q=q, r=r)
        a, b, c = self.extents(grid)
        return self.inner.unfold(x[:, :, :a, :b, :c].flatten(2, 4), grid)

    def key_mask(self, grid: Grid, device: torch.device) -> Tensor | None:
        """Which places hold a token: [sequences of a clip, n]; None where all do."""
        whole = not any(self._missing(grid)) and self.inner.key_mask(grid, device) is None
        return None if whole else places(self, grid, device)[1]

    def same_sequence(self, grid: Grid) -> Tensor:
        """Dense definition: [N, N], true where two tokens share a sequence."""
        return self.inner.same_sequence(grid)

    def sequence(self, grid: Grid) -> tuple[int, int]:
        """Number of sequences of one clip and places in each, filling included."""
        return self.inner.sequence(grid)[0], math.prod(self.tiles(grid)) * math.prod(self.block(grid))

    def extents(self, grid: Grid) -> Extent:
        """Frames, rows and columns that a sequence spans."""
        return self.inner.extents(grid)

    def boxes(self, grid: Grid) -> Boxes | None:
        """None: the places of a sequence are not in the order of a box."""
        return None

    def block(self, grid: Grid) -> Extent:
        """Extents of a tile: cut to the sequence."""
        t, h, w = (min(a, b) for a, b in zip(self.tile, self.extents(grid), strict=True))
        return t, h, w

    def tiles(self, grid: Grid) -> tuple[int, ...]:
        """Tiles of a sequence along each axis."""
        return tuple(-(-a // b) for a, b in zip(self.extents(grid), self.block(grid), strict=True))

    def _missing(self, grid: Grid) -> list[int]:
        return [-a % b for a, b in zip(self.extents(grid), self.block(grid), strict=True)]


Layout = Plain | Window | Tiled


def places(layout: Layout, grid: Grid, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Of every place of one clip's sequences its frame, row and column [sequences, n, 3], and whether it holds a token."""
    where = coordinates(grid, device)[None, :, None]  # [1, N, 1, 3]
    present = torch.ones(1, grid.tokens, 1, 1, dtype=torch.bool, device=device)
    return layout.fold(where, grid)[:, 0], layout.fold(present, grid)[:, 0, :, 0]


def build(
    kind: str, size: Extent | None = None, shift: Extent = (0, 0, 0), order: str = "raster", tile: Extent = (4, 4, 4)
) -> Layout:
    """The layout that a mixer's keys describe."""
    if kind == "window":
        assert size is not None, "the schema refuses a window without size"
        inner: Plain | Window = Window(size, shift)
    else:
        inner = Plain(kind)
    return Tiled(inner, tile) if order == "tile" else inner
