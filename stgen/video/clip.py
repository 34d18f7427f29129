"""A clip, what a video says of itself, and why one cannot be read or written."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stgen.members import Member

MAX_SIDE = 16384
MAX_PIXELS = 2**27  # of a frame


class VideoError(ValueError):
    """A video that cannot be read or written; `reason` is one line, the message also names the path."""

    def __init__(self, path: str | Path | Member, reason: str):
        super().__init__(str(path), reason)  # both arguments, so that the error survives pickling
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Clip:
    frames: torch.Tensor  # uint8 [T, 3, H, W]
    fps: float


@dataclass(frozen=True)
class Info:
    """What a video is, as `read` would return it (rotation applied)."""

    frames: int
    fps: float
    height: int
    width: int


def offsets(num_frames: int, step: float) -> list[int]:
    """Source frames of a clip, counted from its first one: 0, step, 2 step, … rounded half up."""
    return [math.floor(i * step + 0.5) for i in range(num_frames)]


def check_size(path: Path, height: int, width: int) -> None:
    if not 0 < max(height, width) <= MAX_SIDE or height * width > MAX_PIXELS:
        most = f"at most {MAX_SIDE} a side and {MAX_PIXELS >> 20} million together can be read"
        raise VideoError(path, f"is {width} x {height} pixels; {most}")


def collect(path: Path, frames: Iterable[tuple[int, Any]], wanted: list[int], convert: Callable) -> list[np.ndarray]:
    """The `wanted` frames, each uint8 [H, W, 3], out of (number, frame) pairs in order of number."""
    needed, found = set(wanted), {}
    for number, frame in frames:
        if number in needed:
            found[number] = convert(frame)
        if number >= wanted[-1]:
            break
    if missing := sorted(needed - found.keys()):
        raise VideoError(path, f"frame {missing[0]} cannot be decoded ({len(found)} of {len(needed)} frames found)")
    return [found[number] for number in wanted]
