"""Sizes of clips, and which of several a video suits best."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from stgen.video import Info

NEAR = math.log(1.05)  # aspect ratios that differ by less count as alike


class Size(NamedTuple):
    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    @property
    def pixels(self) -> int:
        return self.height * self.width


def best(info: Info, sizes: Sequence[Size], fits: Sequence[bool]) -> int | None:
    """The place of the size that a video suits best among those that its frames suffice for (`fits`); None without one.

    First the nearest aspect ratio, where differences of 5 % count for nothing; then the largest frame that needs no
    enlarging, or else the one that needs least; then the longest clip. One frame is for images, and for videos that are
    too short for all others.
    """
    able = [i for i, fit in enumerate(fits) if fit]
    able = [i for i in able if sizes[i].num_frames > 1] or able
    if not able:
        return None
    nearest = min(_bend(info, sizes[i]) for i in able)
    able = [i for i in able if _bend(info, sizes[i]) <= nearest + NEAR]

    def merit(i: int) -> tuple[bool, float, int]:
        enlarged = scale(info, sizes[i]) > 1
        return (not enlarged, -scale(info, sizes[i]) if enlarged else sizes[i].pixels, sizes[i].num_frames)

    return max(able, key=merit)


def _bend(info: Info, size: Size) -> float:
    """How far the aspect ratios lie apart."""
    return abs(math.log(info.width / info.height * size.height / size.width))


def scale(info: Info, size: Size) -> float:
    """By how much frames are enlarged to cover the size."""
    return max(size.height / info.height, size.width / info.width)
