"""Radial attention: the farther a frame, the smaller the box of it that is kept (arXiv:2506.19852).

At a distance of d frames, 2^g <= d < 2^(g+1), the kept box has 2^-g of the frame's area, so that each doubling of the
distance costs the same: a query keeps at most density * h * w pairs of each doubling, before and after it. Where the
box would be smaller than a token, the query's own pixel is kept in one of every 2^n frames. Boxes are cut out on the
grid, per axis, not on the flat index.
"""

from math import sqrt
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from stgen.attention.pattern import Fixed

NOTHING = (-1, -1)


class Radial(Fixed):
    kind: Literal["radial"] = "radial"
    """Neighbouring frames whole; of farther ones a box round the query whose area halves with each doubling of the
    distance."""
    density: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the area of the boxes; at 1 that of distance 2 is half of the frame."""
    sink_frames: NonNegativeInt = 1
    """First frames, which every query attends whole."""

    def allows(self, q, k, frame):
        reach = [self._reach(distance, *frame.grid[1:]) for distance in range(frame.grid[0])]
        apart = (q.t - k.t).abs()
        rows, columns = (q.t.new_tensor(radius)[apart] for radius in zip(*reach, strict=True))
        return (((q.h - k.h).abs() <= rows) & ((q.w - k.w).abs() <= columns)) | (k.t < self.sink_frames)

    def _reach(self, distance: int, h: int, w: int) -> tuple[int, int]:
        """Rows and columns to either side that are kept of a frame at this distance."""
        if distance <= 1:
            return h, w
        share = self.density / 2 ** (distance.bit_length() - 1)
        area = share * h * w
        if area < 1:
            period = 1
            while period * area < 1:
                period *= 2
            return NOTHING if distance % period else (0, 0)
        # A box in the shape of the frame, at least one token high and wide; of its sides the largest odd number.
        sides = (min(area, max(1.0, side * sqrt(share))) for side in (h, w))
        rows, columns = (int(side - 1) // 2 for side in sides)
        return rows, columns
