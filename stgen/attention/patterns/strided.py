"""Strided (dilated) attention: keys a whole number of strides away on every axis.

The strided factor of Sparse Transformers (arXiv:1904.10509, section 4.3), taken per axis of the grid instead of along
a flat index; `[{kind: local, ...}, {kind: strided, ...}]` is their union with the local one.
"""

from typing import Literal

from pydantic import field_validator

from stgen.attention.pattern import Fixed, per_axis


class Strided(Fixed):
    kind: Literal["strided"] = "strided"
    """Keys a whole number of strides away on every axis."""
    stride: int | tuple[int, int, int]
    """Tokens from one key to the next: one number, or [frames, rows, columns]; 1 takes every token of an axis."""

    @field_validator("stride")
    @classmethod
    def _positive(cls, stride):
        if min(per_axis(stride)) < 1:
            raise ValueError("a stride counts tokens from one key to the next; write 1 to take every token of an axis")
        return stride

    def allows(self, q, k, frame):
        t, h, w = per_axis(self.stride)
        return ((q.t - k.t) % t == 0) & ((q.h - k.h) % h == 0) & ((q.w - k.w) % w == 0)
