"""Local (truncated, neighbourhood) attention: keys near the query on the grid.

Cut at the border as in Longformer (arXiv:2004.05150, section 3.1), or clamped so that every query keeps a box of the
same size, as in neighbourhood attention (arXiv:2204.07143, section 3).
"""

from typing import Literal

from stgen.attention.pattern import Fixed, Radius, per_axis


class Local(Fixed):
    kind: Literal["local"] = "local"
    """Keys within a box round the query."""
    radius: Radius
    """Tokens to either side: one number, or [frames, rows, columns]; as large as the grid is full attention."""
    border: Literal["cut", "clamp"] = "cut"
    """At the border of the grid the box is cut, or moved inwards so that its size stays."""

    def allows(self, q, k, frame):
        near = True
        sides = zip((q.t, q.h, q.w), (k.t, k.h, k.w), per_axis(self.radius), frame.grid, strict=True)
        for i, j, radius, extent in sides:
            if self.border == "clamp" and 2 * radius + 1 <= extent:
                i = i.clamp(radius, extent - 1 - radius)
            elif self.border == "clamp":
                radius = extent  # the box holds the whole axis
            near = near & ((i - j).abs() <= radius)
        return near
