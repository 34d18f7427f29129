"""Probing and reading: one door to all kinds of videos, behind which nothing comes back short."""

import math
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stgen.members import Member
from stgen.video.clip import Clip, Info, VideoError, check_size, offsets
from stgen.video.files import as_path, explained, is_image
from stgen.video.stills import frame_files, probe_folder, probe_gif, probe_image, read_folder, read_gif, read_image
from stgen.video.streams import probe_stream, read_stream

MAX_CLIP = 2**33  # bytes of the frames that are held at once


def probe(path: str | Path | Member) -> Info:
    """Length, rate and size of a video, from its header and its first frame.

    Containers that do not say their length are counted packet by packet. Raises VideoError for anything that is not
    a readable video with a frame rate and sides up to 16384 pixels, and for what says itself that a part of it is lost.
    """
    file = as_path(path)
    with explained(file):
        _check_kind(file)
        status = file.stat()
        return _info(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)  # a video is read at many places; size and time of change keep the memory true
def _info(file: Any, size: int, changed: int) -> Info:
    info = _SOURCES[_kind(file)].probe(file)
    if info.frames < 1:
        raise VideoError(file, "has no frames")
    if not (math.isfinite(info.fps) and info.fps > 0):
        raise VideoError(file, "has no frame rate")
    check_size(file, info.height, info.width)
    return info


def read(path: str | Path | Member, start: int = 0, num_frames: int | None = None, step: float = 1.0) -> Clip:
    """Frames start, start + step, start + 2 step, … of a video, rounded to whole frames; None reads to the end.

    Exact to the frame wherever it starts. A step below 1 repeats frames; the clip's fps is the source's / step.
    Raises VideoError, never returns a short clip, when a frame asked for cannot be decoded.
    """
    file = as_path(path)
    info = probe(file)
    if num_frames is None:
        num_frames = _fitting(info.frames - start, step)
    if start < 0 or step <= 0 or num_frames < 1:
        raise VideoError(path, f"has {info.frames} frames; start {start}, step {step} leaves {num_frames} to read")
    wanted = [start + offset for offset in offsets(num_frames, step)]
    if wanted[-1] >= info.frames:
        raise VideoError(path, f"has {info.frames} frames, but frame {wanted[-1]} was asked for")
    if (size := 3 * info.height * info.width * num_frames) > MAX_CLIP:
        raise VideoError(path, f"needs {size / 2**30:.0f} GB for {num_frames} frames; make it smaller or ask for fewer")
    with explained(file):
        arrays = _SOURCES[_kind(file)].read(file, wanted)
        if len({array.shape for array in arrays}) > 1:
            raise VideoError(path, "changes its frame size on the way")
        frames = np.empty((num_frames, 3, *arrays[0].shape[:2]), np.uint8)
        while arrays:  # let go of one by one, or a long clip would be held twice
            array = arrays.pop()
            frames[len(arrays)] = array.transpose(2, 0, 1)
        return Clip(torch.from_numpy(frames), info.fps / step)  # [T, 3, H, W]


def _fitting(frames: int, step: float) -> int:
    """How many steps fit into `frames` source frames."""
    count = max(0, math.ceil(frames / step) + 1)
    while count and math.floor((count - 1) * step + 0.5) >= frames:
        count -= 1
    return count


def _check_kind(path: Path) -> None:
    """Refuse, before anything is opened, what is neither a regular file with content nor a folder of frames."""
    status = path.stat()  # opening a FIFO could wait for ever; asking what it is cannot
    if stat.S_ISDIR(status.st_mode):
        if not frame_files(path):
            raise VideoError(path, "is a folder, but not one of numbered images only")
    elif not stat.S_ISREG(status.st_mode):
        raise VideoError(path, "is not a regular file")
    elif not status.st_size:
        raise VideoError(path, "is an empty file")


def _kind(path: Path) -> str:
    if path.is_dir():
        return "folder"
    return "gif" if path.suffix.lower() == ".gif" else "image" if is_image(path) else "stream"


@dataclass(frozen=True)
class _Source:
    probe: Callable[[Path], Info]
    read: Callable[[Path, list[int]], list[np.ndarray]]


_SOURCES = {
    "folder": _Source(probe_folder, read_folder),
    "gif": _Source(probe_gif, read_gif),
    "image": _Source(probe_image, read_image),
    "stream": _Source(probe_stream, read_stream),
}
