"""Frames up to one's own, of which the first and the last are kept: what a stream remembers.

The first tokens as a sink and a window of the last ones, of StreamingLLM (arXiv:2309.17453, section 3.2), by frames.
"""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from stgen.attention.pattern import Fixed


class Recent(Fixed):
    kind: Literal["recent"] = "recent"
    """Of the frames up to one's own the first and the last ones; what `memory: ring` lets a frame see."""
    sinks: NonNegativeInt = 1
    """First frames of the clip."""
    window: PositiveInt
    """Last frames, one's own among them."""

    def allows(self, q, k, frame):
        return (k.t <= q.t) & ((k.t < self.sinks) | (k.t > q.t - self.window))
