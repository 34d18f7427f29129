"""Boxes: which tokens of a video share a sequence, as geometry that kernels can address without moving tokens.

A grid of T x H x W tokens in raster order is cut into boxes of p x q x r; with a shift the first box starts that many
tokens before the grid, so that border boxes are cut. Every plain layout is one of these: temporal boxes are T x 1 x 1,
spatial ones 1 x H x W, a joint one is the whole grid.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Extent = tuple[int, int, int]  # frames, rows, columns


@dataclass(frozen=True)
class Boxes:
    """Box number and place of a token at (t, h, w): divide (x + shift) by size on each axis; both count in raster order.

    Raises:
        ValueError: an extent below 1, or a shift outside [0, size).
    """

    grid: Extent
    size: Extent
    shift: Extent = (0, 0, 0)

    def __post_init__(self):
        for axis, n, size, shift in zip("thw", self.grid, self.size, self.shift, strict=True):
            if n < 1 or size < 1 or not 0 <= shift < size:
                raise ValueError(
                    f"boxes of {self.size} shifted by {self.shift} on a grid of {self.grid}: on axis {axis} extents "
                    "should be at least 1 and the shift from 0 up to the box's size"
                )

    @property
    def counts(self) -> Extent:
        """Boxes along each axis."""
        t, h, w = (-(-(n + s) // b) for n, b, s in zip(self.grid, self.size, self.shift, strict=True))
        return t, h, w

    @property
    def count(self) -> int:
        """Boxes of one video."""
        return math.prod(self.counts)

    @property
    def places(self) -> int:
        """Places of a box, empty ones included."""
        return math.prod(self.size)

    @property
    def is_cut(self) -> bool:
        """Whether some place of some box holds no token."""
        return self.count * self.places != math.prod(self.grid)

    def tokens(self, device: torch.device | str = "cpu") -> Tensor:
        """The token at each place: [boxes, places] int64, raster number in the grid; -1 where there is none."""
        coordinate = []
        for n, size, shift, count in zip(self.grid, self.size, self.shift, self.counts, strict=True):
            x = torch.arange(count * size, device=device).view(count, size) - shift
            coordinate.append(torch.where((x >= 0) & (x < n), x, -1))
        t, h, w = coordinate
        t, h, w = t[:, None, None, :, None, None], h[None, :, None, None, :, None], w[None, None, :, None, None, :]
        number = (t * self.grid[1] + h) * self.grid[2] + w  # [boxes t, h, w, places t, h, w]
        return number.masked_fill((t < 0) | (h < 0) | (w < 0), -1).flatten(3).flatten(0, 2)

    def fold(self, x: Tensor) -> Tensor:
        """[B, N, heads, D] -> [B * boxes, heads, places, D], zeros at empty places."""
        tokens = self.tokens(x.device)
        folded = x[:, tokens.clamp(min=0).flatten()].unflatten(1, tokens.shape)  # [B, boxes, places, heads, D]
        return folded.masked_fill((tokens < 0)[None, :, :, None, None], 0).flatten(0, 1).transpose(1, 2)

    def unfold(self, x: Tensor) -> Tensor:
        """[B * boxes, heads, places, D] -> [B, N, heads, D]."""
        filled = torch.nonzero((tokens := self.tokens(x.device)).flatten() >= 0).flatten()
        places = torch.empty_like(filled).scatter_(0, tokens.flatten()[filled], filled)  # of each token
        return x.transpose(1, 2).unflatten(0, (-1, self.count)).flatten(1, 2)[:, places]

    def present(self, device: torch.device | str = "cpu") -> Tensor | None:
        """Which places hold a token: [boxes, places] bool; None where all do."""
        return self.tokens(device) >= 0 if self.is_cut else None
