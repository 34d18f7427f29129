"""Checkerboard attention: keys on the fields of the query's colour. The example of how a pattern is added."""

from typing import Literal

from stgen.attention.pattern import Fixed


class Checkerboard(Fixed):
    kind: Literal["checkerboard"] = "checkerboard"
    """Keys whose frame + row + column is even or odd as the query's is: half of all."""

    def allows(self, q, k, frame):
        return (q.t + q.h + q.w - k.t - k.h - k.w) % 2 == 0
