"""Sliding tile attention: the tiles round the query's own (STA, arXiv:2502.04507, section 3).

All tokens of a tile attend the same tiles, and tiles are the blocks of the sequence, so blocks are kept whole or not
at all, except tiles that the far border of the grid cuts.
"""

from typing import Literal

from stgen.attention.pattern import Extent3D, Fixed


class SlidingTile(Fixed):
    kind: Literal["sliding_tile"] = "sliding_tile"
    """A window of tiles round the query's tile; a tile is the mixer's `block`."""
    window: Extent3D = (3, 3, 3)
    """Tiles of the window: [frames, rows, columns]. At a border it is moved inwards, so that its size stays; of an
    even number the one more lies after the query's tile."""

    by_blocks = True
    needs_tiles = True

    def allows(self, q, k, frame):
        within = True
        sides = zip((q.t, q.h, q.w), (k.t, k.h, k.w), self.window, frame.block, frame.grid, strict=True)
        for i, j, window, tile, extent in sides:
            tiles = -(-extent // tile)
            first = (i // tile - (window - 1) // 2).clamp(0, max(0, tiles - window))
            within = within & (j // tile >= first) & (j // tile < first + window)
        return within
